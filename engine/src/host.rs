//! The host's own code as the engine calls it: what it fails with and what it panics with are both
//! errors, so that nobody loses a machine or waits for a side that is gone.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::Error;
use crate::machine::{GuestAlarm, Machine, MachineError, MachineOperation, Rehearsal};
use crate::pages::memory::PageRange;

/// Runs code that may panic. Whoever calls this sees to it that nothing half done is used afterwards.
pub(crate) fn caught<T>(place: impl Into<String>, call: impl FnOnce() -> T) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|panic| Error::Panicked { place: place.into(), message: message_of(&*panic) })
}

/// What a panic says.
fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}

/// A machine that comes back, whatever its calls do.
pub(crate) struct Guarded<M>(pub(crate) M);

impl<M: Machine> Guarded<M> {
    pub(crate) fn pause(&mut self) -> Result<(), Error> {
        self.call(MachineOperation::Pause, M::pause)
    }

    pub(crate) fn is_paused(&self) -> Result<bool, Error> {
        caught(place(MachineOperation::IsPaused), || self.0.is_paused())
    }

    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        self.call(MachineOperation::Resume, M::resume)
    }

    pub(crate) fn save(&mut self, state: &mut Vec<u8>) -> Result<(), Error> {
        self.call(MachineOperation::Save, |machine| machine.save(state))
    }

    pub(crate) fn state_schema(&mut self) -> Result<Vec<u8>, Error> {
        self.call(MachineOperation::Describe, |machine| machine.state_schema())
    }

    /// What the machine itself says about a source's schema.
    pub(crate) fn check_state_schema(
        &self,
        source: &[u8],
    ) -> Result<Result<(), MachineError>, Error> {
        caught(place(MachineOperation::CheckStateSchema), || self.0.check_state_schema(source))
    }

    pub(crate) fn load(&mut self, state: &[u8]) -> Result<(), Error> {
        self.call(MachineOperation::Load, |machine| machine.load(state))
    }

    pub(crate) fn written_by_load(&mut self) -> Result<Vec<PageRange>, Error> {
        self.call(MachineOperation::Load, M::written_by_load)
    }

    pub(crate) fn unload(&mut self) -> Result<(), Error> {
        self.call(MachineOperation::Unload, M::unload)
    }

    pub(crate) fn release_resources(&mut self) -> Result<(), Error> {
        self.call(MachineOperation::ReleaseResources, M::release_resources)
    }

    pub(crate) fn reacquire_resources(&mut self) -> Result<(), Error> {
        self.call(MachineOperation::ReacquireResources, M::reacquire_resources)
    }

    pub(crate) fn rehearse(&mut self) -> Result<Option<Rehearsal>, Error> {
        self.call(MachineOperation::Rehearse, M::rehearse)
    }

    pub(crate) fn set_alarm(&mut self, alarm: GuestAlarm) -> Result<(), Error> {
        self.call(MachineOperation::SetAlarm, |machine| {
            machine.set_alarm(alarm);
            Ok(())
        })
    }

    pub(crate) fn throttle(&mut self, percent: u8) -> Result<bool, Error> {
        self.call(MachineOperation::Throttle, |machine| Ok(machine.throttle(percent)))
    }

    fn call<T>(
        &mut self,
        operation: MachineOperation,
        call: impl FnOnce(&mut M) -> Result<T, MachineError>,
    ) -> Result<T, Error> {
        caught(place(operation), || call(&mut self.0))?
            .map_err(|cause| Error::Machine { operation, cause })
    }
}

fn place(operation: MachineOperation) -> String {
    format!("the machine, asked to {operation},")
}
