//! A guest that comes, for a QEMU that waits for it.

use std::process::Child;
use std::sync::Arc;

use pageferry::machine::{Machine, MachineError};

use crate::device_state;
use crate::incoming::{Incoming, IncomingError, QemuCommand};
use crate::qmp::Qmp;
use crate::ram::Made;

const NO_QEMU: &str = "there is no QEMU for the guest any more";

/// A guest at the destination. Its QEMU waits, and stands still until the engine says *resume*.
///
/// QEMU takes device state once in its life. When a switchover is called off after that, it is ended, and another
/// one started for the next.
///
/// # Resource cleanup
///
/// Dropping it ends QEMU and removes the RAM, as long as the guest has not been let run here. One that runs stays,
/// with its QEMU and its RAM; [`keep`](Self::keep) is for who wants to watch it.
#[derive(Debug)]
pub struct QemuDestination {
    command: QemuCommand,
    /// None while one is started anew, or after that failed.
    incoming: Option<Incoming>,
    /// Its RAM, which goes after its QEMU.
    made: Made,
}

impl QemuDestination {
    /// Starts a QEMU for RAM that was made for it.
    pub fn start(command: QemuCommand, made: Made) -> Result<Self, IncomingError> {
        let incoming = Some(Incoming::start(&command)?);
        Ok(Self { command, incoming, made })
    }

    /// Its monitor.
    pub fn qmp(&self) -> Option<&Arc<Qmp>> {
        self.incoming.as_ref().map(Incoming::qmp)
    }

    /// QEMU's process and monitor, which live on when both are dropped.
    pub fn keep(mut self) -> Option<(Child, Arc<Qmp>)> {
        let (child, qmp) = self.incoming.take()?.keep();
        self.made.keep();
        Some((child?, qmp))
    }

    fn running(&self) -> Result<&Qmp, MachineError> {
        let incoming = self.incoming.as_ref().ok_or(NO_QEMU)?;
        Ok(incoming.qmp())
    }
}

impl Machine for QemuDestination {
    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(self.running()?.stop()?)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.incoming.as_mut().ok_or(NO_QEMU)?.run()?;
        self.made.keep();
        Ok(())
    }

    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), MachineError> {
        Err("this guest comes here, and is not moved away".into())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(device_state::load(self.running()?, state)?)
    }

    fn unload(&mut self) -> Result<(), MachineError> {
        // What it has open must be free for the next one.
        drop(self.incoming.take());
        self.incoming = Some(Incoming::start(&self.command)?);
        Ok(())
    }
}
