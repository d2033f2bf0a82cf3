//! What all virtual CPUs share.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use pageferry_device_state::{Component, DeviceState, HookError};

use super::registers::Kvm;
use super::{failed, same};
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

/// KVM's clock, without its flags: the guest's clock goes on from where it stood. The flags would
/// have KVM add the time the guest stood still, which its time stamp counters do not see either.
#[derive(DeviceState)]
#[device_state(name = "clock", after = "vcpu")]
pub(crate) struct ClockState {
    #[device_state(tag = 1)]
    nanoseconds: u64,
}

/// It, to be saved and loaded.
#[derive(Debug)]
pub(crate) struct Clock<'a>(pub(crate) &'a VmFd);

impl Component for Clock<'_> {
    type State = ClockState;

    fn save(&mut self) -> Result<ClockState, HookError> {
        let nanoseconds = self.0.get_clock().map_err(failed("read the clock"))?.clock;
        Ok(ClockState { nanoseconds })
    }

    fn load(&mut self, state: ClockState) -> Result<(), HookError> {
        let clock = kvm_clock_data { clock: state.nanoseconds, ..kvm_clock_data::default() };
        Ok(self.0.set_clock(&clock).map_err(failed("restore the clock"))?)
    }
}
