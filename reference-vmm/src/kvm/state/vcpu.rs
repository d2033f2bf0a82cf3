//! A virtual CPU.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use pageferry_device_state::{Component, DeviceState, HookError};

use super::registers::Kvm;
use super::xsave::{read_msrs, read_xsave, write_msrs, write_xsave};
use super::{Capabilities, Counters, failed, is_same_frequency, same};
use crate::error::{GuestError, StateError};
use crate::kvm::fpu::MIN_XSAVE_WORDS;

/// The time stamp counter, as a register.
const IA32_TSC: u32 = 0x10;

/// Words of the largest XSAVE area that is believed: four times what AMX needs.
const MAX_XSAVE_WORDS: u32 = 16 << 10;

/// Registers that KVM reads or writes at once, and lists.
const MAX_MSRS: u32 = 256;

/// Where the header of an XSAVE area says what is in it, in words: Intel's manual, volume 1, 13.4.2.
const XSTATE_BV: usize = 512 / 4;

/// Any virtual CPU may have these, also one without XSAVE.
const X87_AND_SSE: u64 = 0b11;

/// Of CR4 on Intel's CPUs: the guest may run guests of its own. Set as long as it is in VMX root operation.
const CR4_VMXE: u64 = 1 << 13;

/// Of EFER on AMD's, likewise.
const EFER_SVME: u64 = 1 << 12;

/// A virtual CPU's state. Parts are missing where KVM does not offer them.
#[derive(Debug, DeviceState)]
#[device_state(name = "vcpu", priority = 50)]
pub(crate) struct VcpuState {
    #[device_state(tag = 1, with = Kvm)]
    pub(crate) mp_state: kvm_mp_state,
    #[device_state(tag = 2, with = Kvm)]
    pub(crate) regs: kvm_regs,
    #[device_state(tag = 3, with = Kvm)]
    pub(crate) sregs: kvm_sregs,
    #[device_state(tag = 4, max_len = MAX_XSAVE_WORDS)]
    pub(crate) xsave: Vec<u32>,
    #[device_state(tag = 5, with = Kvm)]
    xcrs: Option<kvm_xcrs>,
    #[device_state(tag = 6, with = Kvm)]
    pub(crate) debug_regs: kvm_debugregs,
    #[device_state(tag = 7, with = Kvm)]
    lapic: Option<kvm_lapic_state>,
    #[device_state(tag = 8)]
    tsc_khz: Option<u32>,
    #[device_state(tag = 9, with = Kvm, max_len = MAX_MSRS)]
    msrs: Vec<kvm_msr_entry>,
    #[device_state(tag = 10, with = Kvm)]
    pub(crate) events: kvm_vcpu_events,
}

/// A virtual CPU that stands still, to be saved and loaded.
#[derive(Debug)]
pub(crate) struct Vcpu<'a> {
    pub(crate) fd: &'a Mutex<VcpuFd>,
    pub(crate) capabilities: &'a Capabilities,
    pub(crate) counters: &'a Counters,
}

impl Vcpu<'_> {
    fn with<R>(&self, f: impl FnOnce(&VcpuFd) -> R) -> R {
        f(&self.fd.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Component for Vcpu<'_> {
    type State = VcpuState;

    fn save(&mut self) -> Result<VcpuState, HookError> {
        Ok(self.with(|fd| VcpuState::save(fd, self.capabilities))?)
    }

    fn check(&self, state: &VcpuState) -> Result<(), HookError> {
        Ok(state.check(self.capabilities)?)
    }

    fn load(&mut self, state: VcpuState) -> Result<(), HookError> {
        Ok(self.with(|fd| state.restore(fd, self.capabilities, self.counters))?)
    }
}

impl VcpuState {
    /// Reads a virtual CPU that stands still. The order is the one KVM asks for: reading the
    /// multiprocessing state first settles pending events.
    pub(crate) fn save(vcpu: &VcpuFd, capabilities: &Capabilities) -> Result<Self, GuestError> {
        let mp_state = vcpu.get_mp_state().map_err(failed("read the run state"))?;
        let regs = vcpu.get_regs().map_err(failed("read the registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("read the special registers"))?;
        if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
            return Err(GuestError::Nested);
        }
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
        let [low, high] = [XSTATE_BV, XSTATE_BV + 1].map(|word| u64::from(self.xsave[word]));
        match (high << 32 | low) & !(X87_AND_SSE | capabilities.xsave_components) {
            0 => Ok(()),
            components => Err(StateError::XsaveComponents { components }),
        }
    }

    /// Writes a virtual CPU that stands still. The local APIC goes after the special registers,
    /// which hold its base, and before the registers with the timer's deadline.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        capabilities: &Capabilities,
        counters: &Counters,
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
        self.restore_tsc_frequency(vcpu, capabilities, counters)?;
        let set = counters.set.load(Ordering::Relaxed);
        let msrs = self.msrs.iter().filter(|msr| !(set && msr.index == IA32_TSC));
        write_msrs(vcpu, &msrs.copied().collect::<Vec<_>>())?;
        if !set {
            self.check_counter(vcpu, counters)?;
        }
        vcpu.set_vcpu_events(&self.events).map_err(failed("restore pending events"))
    }

    /// Says so where KVM took what was written to the time stamp counter and keeps its own all the same.
    fn check_counter(&self, vcpu: &VcpuFd, counters: &Counters) -> Result<(), GuestError> {
        let wanted = self.msrs.iter().find(|msr| msr.index == IA32_TSC);
        let (Some(wanted), Some(khz)) = (wanted, self.tsc_khz) else { return Ok(()) };
        let now = read_msrs(vcpu, &[IA32_TSC])?.first().map_or(wanted.data, |msr| msr.data);
        let seconds = now.abs_diff(wanted.data) / (u64::from(khz).max(1) * 1000);
        if seconds > 0 && !counters.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                seconds,
                "this KVM does not set time stamp counters: the guest's is not where it was"
            );
        }
        Ok(())
    }

    fn restore_tsc_frequency(
        &self,
        vcpu: &VcpuFd,
        capabilities: &Capabilities,
        counters: &Counters,
    ) -> Result<(), GuestError> {
        let (Some(khz), true) = (self.tsc_khz, capabilities.tsc_khz) else { return Ok(()) };
        let here_khz =
            vcpu.get_tsc_khz().map_err(failed("read the time stamp counter's frequency"))?;
        if is_same_frequency(khz, here_khz) {
            return Ok(());
        }
        if !capabilities.tsc_control {
            let what = "the time stamp counter's frequency in kHz";
            return Ok(same(what, khz, here_khz)?);
        }
        counters.scaled.store(true, Ordering::Relaxed);
        vcpu.set_tsc_khz(khz).map_err(failed("restore the time stamp counter's frequency"))
    }
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
