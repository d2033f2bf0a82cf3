//! What KVM keeps of a virtual machine, as device state.
//!
//! | section | | loaded |
//! |---|---|---|
//! | `interrupt-controllers` | both PICs and the I/O APIC | first: local APICs look at them |
//! | `pit` | the timer | |
//! | `clock` | KVM's clock and all time stamp counters | before the virtual CPUs: their timers look at these |
//! | `vcpu` | one for each virtual CPU | |

mod interrupts;
mod registers;
mod vcpu;
mod vm;
mod xsave;

use kvm_ioctls::{Cap, VmFd};

use super::fpu::MIN_XSAVE_WORDS;
use crate::error::{GuestError, StateError};

pub(crate) use vcpu::{Vcpu, VcpuState};
pub(crate) use vm::{
    Clock, ClockState, Counters, InterruptControllers, InterruptControllersState, Pit, PitState,
};
pub(crate) use xsave::{read_xsave, write_xsave};

/// What KVM offers here and so belongs to the state.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "independent capabilities of KVM")]
pub(crate) struct Capabilities {
    pub(crate) irqchip: bool,
    pub(crate) pit: bool,
    pub(crate) clock: bool,
    pub(crate) xcrs: bool,
    pub(crate) tsc_khz: bool,
    pub(crate) tsc_control: bool,
    pub(crate) xsave_words: usize,
    /// That XSAVE areas may have, besides x87 and SSE.
    pub(crate) xsave_components: u64,
    pub(crate) msrs: Vec<u32>,
}

impl Capabilities {
    /// Length of XSAVE areas, as KVM tells it.
    pub(crate) fn xsave_words(vm: &VmFd) -> usize {
        // Zero or less where KVM_GET_XSAVE2 is not offered.
        let len_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        len_bytes.div_ceil(4).max(MIN_XSAVE_WORDS)
    }
}

/// Names a failed call.
pub(crate) fn failed(operation: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> GuestError {
    let operation = operation.into();
    move |source| GuestError::Kvm { operation, source }
}

/// A time stamp counter this close to the wanted frequency is left alone, as KVM does.
const TSC_TOLERANCE_PPM: u64 = 250;

fn is_same_frequency(khz: u32, here_khz: u32) -> bool {
    let difference = u64::from(khz.abs_diff(here_khz));
    difference * 1_000_000 <= u64::from(here_khz) * TSC_TOLERANCE_PPM
}

pub(crate) fn same<T: PartialEq + ToString>(
    what: &'static str,
    found: T,
    expected: T,
) -> Result<(), StateError> {
    if found == expected {
        return Ok(());
    }
    let [found, expected] = [found, expected].map(|value| value.to_string());
    Err(StateError::Mismatch { what, found, expected })
}
