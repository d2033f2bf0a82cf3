//! The guest with its load, as the engine sees it.

use pageferry::{GuestAlarm, Machine, MachineError, Rehearsal};
use pageferry_cli::outcome::Failure;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::Guest;

use crate::load::{Load, Used};

/// A guest whose load runs while it does.
#[derive(Debug)]
pub(super) struct LoadedGuest {
    pub(super) machine: GuestMachine,
    pub(super) load: u16,
    running: Option<Load>,
    /// What the load did until the guest was paused.
    pub(super) used: Used,
}

impl LoadedGuest {
    pub(super) fn new(guest: Guest, load: u16) -> Self {
        let machine = GuestMachine { guest };
        Self { machine, load, running: None, used: Used::default() }
    }

    /// Waits until the guest has beaten so often more.
    pub(super) fn await_beats(&self, more: u64) -> Result<(), Failure> {
        let guest = &self.machine.guest;
        let beats = guest.heartbeat().beats + more;
        let lives = guest.await_beats(beats);
        Ok(lives.map_err(|reason| format!("the guest does not run: {reason}"))?)
    }
}

impl Machine for LoadedGuest {
    fn state_schema(&self) -> Result<Vec<u8>, MachineError> {
        self.machine.state_schema()
    }

    fn check_state_schema(&self, source: &[u8]) -> Result<(), MachineError> {
        self.machine.check_state_schema(source)
    }

    fn rehearse(&mut self) -> Result<Option<Rehearsal>, MachineError> {
        self.machine.rehearse()
    }

    fn set_alarm(&mut self, alarm: GuestAlarm) {
        self.machine.set_alarm(alarm);
    }

    fn throttle(&mut self, percent: u8) -> bool {
        self.machine.throttle(percent)
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        // Before the virtual CPUs, as they stop together.
        if let Some(load) = &self.running {
            load.ask_to_stop();
        }
        self.machine.pause()?;
        if let Some(load) = self.running.take() {
            self.used = load.stop();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()?;
        if self.load > 0 {
            let memory = self.machine.guest.ram().memory();
            self.running = Some(Load::of_guest(self.load, memory)?);
        }
        Ok(())
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.machine.save(state)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.machine.load(state)
    }

    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.machine.release_resources()
    }

    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        self.machine.reacquire_resources()
    }
}
