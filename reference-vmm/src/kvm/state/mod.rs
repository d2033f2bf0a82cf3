//! What KVM keeps of a virtual machine, as device state.
//!
//! | section | | loaded |
//! |---|---|---|
//! | `interrupt-controllers` | both PICs and the I/O APIC | first: local APICs look at them |
//! | `pit` | the timer | |
//! | `vcpu` | one for each virtual CPU | |
//! | `clock` | KVM's clock | after the virtual CPUs, to lose as little time as possible |

mod interrupts;
mod registers;
mod vcpu;
mod vm;
mod xsave;

use kvm_ioctls::{Cap, VcpuFd, VmFd};

use super::fpu::MIN_XSAVE_WORDS;
use crate::error::{GuestError, StateError};

pub(crate) use vcpu::{Vcpu, VcpuState};
pub(crate) use vm::{
    Clock, ClockState, InterruptControllers, InterruptControllersState, Pit, PitState,
};
pub(crate) use xsave::{read_xsave, write_xsave};

use xsave::read_msrs;

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
    pub(crate) msrs: Vec<u32>,
}

impl Capabilities {
    /// Length of XSAVE areas, as KVM tells it.
    pub(crate) fn xsave_words(vm: &VmFd) -> usize {
        // Zero or less where KVM_GET_XSAVE2 is not offered.
        let len_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        len_bytes.div_ceil(4).max(MIN_XSAVE_WORDS)
    }

    /// Leaves out model specific registers that are listed and cannot be read: each would cost
    /// another call while the guest stands still.
    pub(crate) fn keep_readable_msrs(&mut self, vcpu: &VcpuFd) -> Result<(), GuestError> {
        let readable = read_msrs(vcpu, &self.msrs)?;
        self.msrs = readable.into_iter().map(|msr| msr.index).collect();
        Ok(())
    }
}

/// Names a failed call.
pub(crate) fn failed(operation: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> GuestError {
    let operation = operation.into();
    move |source| GuestError::Kvm { operation, source }
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
