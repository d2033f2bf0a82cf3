//! Saving and restoring what KVM keeps of a virtual machine.
#![expect(unsafe_code, reason = "KVM writes and reads XSAVE areas of a length it tells us")]

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::fpu::MIN_XSAVE_WORDS;
use crate::error::GuestError;
use crate::state::StateError;

/// A time stamp counter this close to the wanted frequency is left alone, as KVM does.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Everything KVM keeps.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KvmState {
    pub(crate) vm: VmState,
    pub(crate) vcpus: Vec<VcpuState>,
}

/// What all virtual CPUs share. Parts are missing where KVM does not offer them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VmState {
    clock: Option<kvm_clock_data>,
    /// Both PICs and the I/O APIC.
    irqchips: Option<[kvm_irqchip; 3]>,
    pit: Option<kvm_pit_state2>,
}

/// A virtual CPU.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    pub(crate) xsave: Vec<u32>,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: Option<kvm_lapic_state>,
    tsc_khz: Option<u32>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

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
}

/// Names a failed call.
pub(crate) fn failed(operation: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> GuestError {
    let operation = operation.into();
    move |source| GuestError::Kvm { operation, source }
}

pub(crate) fn save_vm(vm: &VmFd, capabilities: &Capabilities) -> Result<VmState, GuestError> {
    let clock = capabilities.clock.then(|| vm.get_clock().map_err(failed("read the clock")));
    let pit = capabilities.pit.then(|| vm.get_pit2().map_err(failed("read the timer (PIT)")));
    let irqchips = capabilities.irqchip.then(|| {
        let mut chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .map(|chip_id| kvm_irqchip { chip_id, ..kvm_irqchip::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(failed("read an interrupt controller"))?;
        }
        Ok::<_, GuestError>(chips)
    });
    Ok(VmState {
        clock: clock.transpose()?,
        irqchips: irqchips.transpose()?,
        pit: pit.transpose()?,
    })
}

/// Before the virtual CPUs: their APICs look at the other interrupt controllers.
pub(crate) fn restore_interrupts(vm: &VmFd, state: &VmState) -> Result<(), GuestError> {
    for chip in state.irqchips.iter().flatten() {
        vm.set_irqchip(chip).map_err(failed("restore an interrupt controller"))?;
    }
    if let Some(pit) = &state.pit {
        vm.set_pit2(pit).map_err(failed("restore the timer (PIT)"))?;
    }
    Ok(())
}

/// After the virtual CPUs, to lose as little time as possible.
pub(crate) fn restore_clock(vm: &VmFd, state: &VmState) -> Result<(), GuestError> {
    let Some(clock) = state.clock else { return Ok(()) };
    // Without its flags: the guest's clock goes on from where it stood. The flags would have KVM
    // add the time the guest stood still, which its time stamp counters do not see either.
    let clock = kvm_clock_data { clock: clock.clock, ..kvm_clock_data::default() };
    vm.set_clock(&clock).map_err(failed("restore the clock"))
}

impl VmState {
    /// Whether the state has what this KVM offers, no more and no less.
    pub(crate) fn check(&self, capabilities: &Capabilities) -> Result<(), StateError> {
        let parts = [
            ("a clock", self.clock.is_some(), capabilities.clock),
            ("interrupt controllers", self.irqchips.is_some(), capabilities.irqchip),
            ("a timer (PIT)", self.pit.is_some(), capabilities.pit),
        ];
        parts.into_iter().try_for_each(|(what, found, expected)| same(what, found, expected))
    }
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

impl VcpuState {
    /// Reads a virtual CPU that stands still. The order is the one KVM asks for: reading the
    /// multiprocessing state first settles pending events.
    pub(crate) fn save(vcpu: &VcpuFd, capabilities: &Capabilities) -> Result<Self, GuestError> {
        let mp_state = vcpu.get_mp_state().map_err(failed("read the run state"))?;
        let regs = vcpu.get_regs().map_err(failed("read the registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("read the special registers"))?;
        let xsave = read_xsave(vcpu, capabilities.xsave_words)?;
        let xcrs = capabilities.xcrs.then(|| vcpu.get_xcrs().map_err(failed("read XCR0")));
        let debug_regs = vcpu.get_debug_regs().map_err(failed("read the debug registers"))?;
        let lapic =
            capabilities.irqchip.then(|| vcpu.get_lapic().map_err(failed("read the local APIC")));
        let tsc_khz = capabilities
            .tsc_khz
            .then(|| vcpu.get_tsc_khz().map_err(failed("read the time stamp counter's frequency")));
        let msrs = read_msrs(vcpu, &capabilities.msrs)?;
        let events = vcpu.get_vcpu_events().map_err(failed("read pending events"))?;
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs: xcrs.transpose()?,
            debug_regs,
            lapic: lapic.transpose()?,
            tsc_khz: tsc_khz.transpose()?,
            msrs,
            events,
        })
    }

    /// Whether the state fits what this KVM offers.
    pub(crate) fn check(&self, capabilities: &Capabilities) -> Result<(), StateError> {
        same("a local APIC", self.lapic.is_some(), capabilities.irqchip)?;
        same("an XCR0", self.xcrs.is_some(), capabilities.xcrs)?;
        if !(MIN_XSAVE_WORDS..=capabilities.xsave_words).contains(&self.xsave.len()) {
            return same("the XSAVE area in words", self.xsave.len(), capabilities.xsave_words);
        }
        Ok(())
    }

    /// Writes a virtual CPU that stands still. The local APIC goes after the special registers,
    /// which hold its base, and before the registers with the timer's deadline.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        capabilities: &Capabilities,
    ) -> Result<(), GuestError> {
        vcpu.set_mp_state(self.mp_state).map_err(failed("restore the run state"))?;
        vcpu.set_regs(&self.regs).map_err(failed("restore the registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("restore the special registers"))?;
        write_xsave(vcpu, capabilities.xsave_words, &self.xsave)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("restore XCR0"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(failed("restore the debug registers"))?;
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(failed("restore the local APIC"))?;
        }
        self.restore_tsc_frequency(vcpu, capabilities)?;
        write_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("restore pending events"))
    }

    fn restore_tsc_frequency(
        &self,
        vcpu: &VcpuFd,
        capabilities: &Capabilities,
    ) -> Result<(), GuestError> {
        let (Some(khz), true) = (self.tsc_khz, capabilities.tsc_khz) else { return Ok(()) };
        let here_khz =
            vcpu.get_tsc_khz().map_err(failed("read the time stamp counter's frequency"))?;
        let difference = u64::from(khz.abs_diff(here_khz));
        if difference * 1_000_000 <= u64::from(here_khz) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if !capabilities.tsc_control {
            let what = "the time stamp counter's frequency in kHz";
            return Ok(same(what, khz, here_khz)?);
        }
        vcpu.set_tsc_khz(khz).map_err(failed("restore the time stamp counter's frequency"))
    }
}

fn new_xsave(words: usize) -> Result<Xsave, GuestError> {
    Xsave::new(words.saturating_sub(MIN_XSAVE_WORDS))
        .map_err(|_| failed("allocate an XSAVE area")(kvm_ioctls::Error::new(libc::ENOMEM)))
}

/// Reads the vector registers; `words` is KVM's word on how long the area is.
pub(crate) fn read_xsave(vcpu: &VcpuFd, words: usize) -> Result<Vec<u32>, GuestError> {
    let failed = failed("read the vector registers");
    if words == MIN_XSAVE_WORDS {
        return Ok(vcpu.get_xsave().map_err(failed)?.region.to_vec());
    }
    let mut area = new_xsave(words)?;
    // SAFETY: the area is as long as KVM said its XSAVE areas are.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(failed)?;
    let head = area.as_fam_struct_ref().xsave.region;
    Ok(head.iter().chain(area.as_slice()).copied().collect())
}

/// Writes the vector registers from at most `words`; what is missing is zero.
pub(crate) fn write_xsave(vcpu: &VcpuFd, words: usize, xsave: &[u32]) -> Result<(), GuestError> {
    let mut area = new_xsave(words)?;
    let (head, tail) = xsave.split_at(xsave.len().min(MIN_XSAVE_WORDS));
    for (to, from) in area.as_mut_slice().iter_mut().zip(tail) {
        *to = *from;
    }
    // SAFETY: only the fixed part's contents are changed, not the length of the part behind it.
    let fixed = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (to, from) in fixed.iter_mut().zip(head) {
        *to = *from;
    }
    // SAFETY: the area is as long as KVM said its XSAVE areas are.
    unsafe { vcpu.set_xsave2(&area) }.map_err(failed("restore the vector registers"))
}

/// Reads the registers named, leaving out those that can't be read.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, GuestError> {
    let entry = |index: &u32| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() };
    let mut wanted: Vec<_> = indices.iter().map(entry).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = msr_list(&wanted)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("read model specific registers"))?;
        read.extend_from_slice(&msrs.as_slice()[..count.min(wanted.len())]);
        // KVM stops at the first one it can't read.
        if let Some(unreadable) = wanted.get(count) {
            tracing::debug!(index = unreadable.index, "model specific register is unreadable");
        }
        wanted.drain(..wanted.len().min(count + 1));
    }
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), GuestError> {
    let mut left = entries;
    while !left.is_empty() {
        let msrs = msr_list(left)?;
        let count = vcpu.set_msrs(&msrs).map_err(failed("restore model specific registers"))?;
        if let Some(refused) = left.get(count) {
            // Some can be read but not written. That is fine as long as they are as they should.
            let here = read_msrs(vcpu, &[refused.index])?;
            if here.first().map(|msr| msr.data) != Some(refused.data) {
                let (index, value) = (refused.index, refused.data);
                return Err(GuestError::Msr { operation: "restore", index, value });
            }
        }
        left = left.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, GuestError> {
    Msrs::from_entries(entries)
        .map_err(|_| failed("list model specific registers")(kvm_ioctls::Error::new(libc::E2BIG)))
}

#[cfg(test)]
impl VcpuState {
    pub(crate) fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data)
    }

    /// Compares everything that time does not change.
    pub(crate) fn assert_same(&self, other: &Self) {
        /// The time stamp counter, and two clocks as Hyper-V has them.
        const CLOCKS: [u32; 3] = [0x10, 0x4000_0010, 0x4000_0020];
        assert_eq!(self.mp_state, other.mp_state);
        assert_eq!(self.regs, other.regs);
        assert_eq!(self.sregs, other.sregs);
        assert_eq!(self.xsave, other.xsave);
        assert_eq!(format!("{:?}", self.xcrs), format!("{:?}", other.xcrs));
        assert_eq!(self.debug_regs, other.debug_regs);
        assert_eq!(self.lapic.map(|apic| apic.regs), other.lapic.map(|apic| apic.regs));
        assert_eq!(self.tsc_khz, other.tsc_khz);
        assert_eq!(self.events, other.events);
        let msrs = |state: &Self| {
            let timeless = state.msrs.iter().filter(|msr| !CLOCKS.contains(&msr.index));
            timeless.map(|msr| (msr.index, msr.data)).collect::<Vec<_>>()
        };
        assert_eq!(msrs(self), msrs(other));
    }
}
