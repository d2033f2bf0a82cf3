//! What all virtual CPUs share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use pageferry_device_state::{Component, DeviceState, HookError};
use pageferry_rust_vmm::time::{GuestTime, Meanwhile};

use super::registers::Kvm;
use super::{failed, is_same_frequency, same};
use crate::error::GuestError;

/// The interrupt controllers outside of virtual CPUs.
#[derive(DeviceState)]
#[device_state(name = "interrupt-controllers", priority = 100)]
pub(crate) struct InterruptControllersState {
    #[device_state(tag = 1, with = Kvm)]
    pic_master: kvm_irqchip,
    #[device_state(tag = 2, with = Kvm)]
    pic_slave: kvm_irqchip,
    #[device_state(tag = 3, with = Kvm)]
    ioapic: kvm_irqchip,
}

/// They, to be saved and loaded.
#[derive(Debug)]
pub(crate) struct InterruptControllers<'a>(pub(crate) &'a VmFd);

fn read_irqchip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, GuestError> {
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    vm.get_irqchip(&mut chip).map_err(failed("read an interrupt controller"))?;
    Ok(chip)
}

impl Component for InterruptControllers<'_> {
    type State = InterruptControllersState;

    fn save(&mut self) -> Result<InterruptControllersState, HookError> {
        Ok(InterruptControllersState {
            pic_master: read_irqchip(self.0, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: read_irqchip(self.0, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: read_irqchip(self.0, KVM_IRQCHIP_IOAPIC)?,
        })
    }

    fn check(&self, state: &InterruptControllersState) -> Result<(), HookError> {
        let InterruptControllersState { pic_master, pic_slave, ioapic } = state;
        let what = "the number of an interrupt controller";
        same(what, pic_master.chip_id, KVM_IRQCHIP_PIC_MASTER)?;
        same(what, pic_slave.chip_id, KVM_IRQCHIP_PIC_SLAVE)?;
        Ok(same(what, ioapic.chip_id, KVM_IRQCHIP_IOAPIC)?)
    }

    fn load(&mut self, state: InterruptControllersState) -> Result<(), HookError> {
        for chip in [&state.pic_master, &state.pic_slave, &state.ioapic] {
            self.0.set_irqchip(chip).map_err(failed("restore an interrupt controller"))?;
        }
        Ok(())
    }
}

/// The timer (PIT).
#[derive(DeviceState)]
#[device_state(name = "pit", priority = 90)]
pub(crate) struct PitState {
    #[device_state(tag = 1, with = Kvm)]
    channels: [kvm_pit_channel_state; 3],
    #[device_state(tag = 2)]
    flags: u32,
}

/// It, to be saved and loaded.
#[derive(Debug)]
pub(crate) struct Pit<'a>(pub(crate) &'a VmFd);

impl Component for Pit<'_> {
    type State = PitState;

    fn save(&mut self) -> Result<PitState, HookError> {
        let kvm_pit_state2 { channels, flags, .. } =
            self.0.get_pit2().map_err(failed("read the timer (PIT)"))?;
        Ok(PitState { channels, flags })
    }

    fn load(&mut self, PitState { channels, flags }: PitState) -> Result<(), HookError> {
        let state = kvm_pit_state2 { channels, flags, ..kvm_pit_state2::default() };
        Ok(self.0.set_pit2(&state).map_err(failed("restore the timer (PIT)"))?)
    }
}

/// The guest's time. What a program saved that had only KVM's clock stands still meanwhile.
#[derive(Debug, DeviceState)]
#[device_state(name = "clock", version = 2, priority = 60)]
pub(crate) struct ClockState {
    #[device_state(tag = 1)]
    pub(crate) nanoseconds: u64,
    #[device_state(tag = 2, since = 2, default = None)]
    pub(crate) realtime_ns: Option<u64>,
    /// Of each virtual CPU; none where KVM did not say.
    #[device_state(tag = 3, since = 2, default = Vec::new(), max_len = MAX_VCPUS)]
    pub(crate) tsc: Vec<u64>,
    #[device_state(tag = 4, since = 2, default = None)]
    pub(crate) tsc_khz: Option<u32>,
}

/// More than any guest has.
const MAX_VCPUS: u32 = 256;

/// How time stamp counters are set.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// By their offsets, with the clock: not again with the registers.
    pub(crate) set: AtomicBool,
    /// They run at another frequency than the host's.
    pub(crate) scaled: AtomicBool,
    /// It was said that KVM keeps its own.
    pub(crate) told: AtomicBool,
}

/// It, to be saved and loaded.
#[derive(Debug)]
pub(crate) struct Clock<'a> {
    pub(crate) vm: &'a VmFd,
    pub(crate) vcpus: &'a [Arc<Mutex<VcpuFd>>],
    pub(crate) counters: &'a Counters,
    pub(crate) meanwhile: Meanwhile,
}

impl Clock<'_> {
    /// With all virtual CPUs, which stand still.
    fn with<R>(&self, f: impl FnOnce(Vec<&VcpuFd>) -> R) -> R {
        let vcpus =
            self.vcpus.iter().map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner));
        let vcpus: Vec<_> = vcpus.collect();
        f(vcpus.iter().map(|vcpu| &**vcpu).collect())
    }
}

impl Component for Clock<'_> {
    type State = ClockState;

    fn save(&mut self) -> Result<ClockState, HookError> {
        let scaled = self.counters.scaled.load(Ordering::Relaxed);
        let (time, tsc_khz) = self.with(|vcpus| {
            let tsc_khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok());
            GuestTime::read(self.vm, vcpus).map(|time| (time, tsc_khz))
        })?;
        let GuestTime { clock_ns: nanoseconds, realtime_ns, tsc } = time;
        let tsc = tsc.filter(|_| !scaled).unwrap_or_default();
        Ok(ClockState { nanoseconds, realtime_ns, tsc, tsc_khz })
    }

    fn load(&mut self, state: ClockState) -> Result<(), HookError> {
        let ClockState { nanoseconds: clock_ns, realtime_ns, tsc, tsc_khz } = state;
        // Once loaded, they may be scaled already. Of other virtual CPUs than these it is not the clock that tells.
        let scaled = self.counters.scaled.load(Ordering::Relaxed);
        let usable = !scaled && tsc.len() == self.vcpus.len();
        let tsc = tsc_khz.filter(|_| usable).map(|khz| (tsc, khz));
        let set = self.with(|vcpus| {
            let here_khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok());
            // One that has to be scaled is set as a register, at its own frequency.
            let tsc =
                tsc.filter(|(_, khz)| here_khz.is_some_and(|here| is_same_frequency(*khz, here)));
            let (tsc, khz) = tsc.map_or((None, 0), |(tsc, khz)| (Some(tsc), khz));
            let time = GuestTime { clock_ns, realtime_ns, tsc };
            time.set(self.vm, vcpus, khz, self.meanwhile)
        })?;
        self.counters.set.store(set, Ordering::Relaxed);
        Ok(())
    }
}
