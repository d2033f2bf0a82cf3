//! The guest of a QEMU that runs, for the engine to move away.

use std::sync::Arc;

use pageferry::Chain;
use pageferry::machine::{GuestAlarm, Machine, MachineError};
use thiserror::Error;

use crate::device_state;
use crate::qmp::{Notice, Qmp, QmpError};
use crate::quota::Quotas;

/// Why a guest cannot be moved away.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// QEMU did not do what it was asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest does not run.
    #[error(
        "the guest does not run, its state is {status:?}: what is moved runs again at the other side"
    )]
    NotRunning {
        /// QEMU's word for it.
        status: String,
    },
}

/// The guest has ended by itself.
#[derive(Debug, Error)]
enum GuestEnded {
    #[error("the guest shut down ({reason})")]
    ShutDown { reason: String },
    #[error("the guest's kernel panicked")]
    Panicked,
    #[error("QEMU is gone")]
    Gone(#[source] QmpError),
}

/// A guest at the source. QEMU keeps it, and its RAM, until it is told to quit.
///
/// `pause` is QEMU's `stop`, which finishes what disks have under way, `save` a migration of QEMU's that leaves RAM
/// alone, and `resume` its `cont`, also after `save`. QEMU gives its disks up with the device state and takes
/// them again when the guest goes on, so that there is nothing else to release.
#[derive(Debug)]
pub struct QemuSource {
    qmp: Arc<Qmp>,
    quotas: Option<Quotas>,
}

impl QemuSource {
    /// Takes the guest of a running QEMU.
    pub fn new(qmp: Arc<Qmp>) -> Result<Self, SourceError> {
        let state = qmp.run_state()?;
        if !state.running {
            return Err(SourceError::NotRunning { status: state.status });
        }
        device_state::prepare(&qmp, false)?;
        Ok(Self { qmp, quotas: None })
    }

    /// Slows the guest down by these, where it writes too fast. Without them it cannot be.
    #[must_use]
    pub fn slowed_by(self, quotas: Quotas) -> Self {
        Self { quotas: Some(quotas), ..self }
    }

    /// Its monitor.
    pub fn qmp(&self) -> &Arc<Qmp> {
        &self.qmp
    }
}

impl Machine for QemuSource {
    fn pause(&mut self) -> Result<(), MachineError> {
        // A vCPU that waits for its next period would stop no sooner.
        self.throttle(0);
        Ok(self.qmp.stop()?)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(self.qmp.cont()?)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(device_state::save(&self.qmp, state)?)
    }

    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        Err("this guest is moved away, and not here".into())
    }

    fn throttle(&mut self, percent: u8) -> bool {
        let Some(quotas) = &mut self.quotas else { return false };
        let lowered = quotas.lower(percent);
        if let Err(error) = &lowered {
            tracing::warn!(error = %Chain::of(error), percent, "the guest's CPU quota stays as it is");
        }
        lowered.is_ok()
    }

    fn set_alarm(&mut self, alarm: GuestAlarm) {
        self.qmp.watch(move |notice| {
            let ended = match notice {
                Notice::Ended(why) => GuestEnded::Gone(why.clone()),
                Notice::Event(event) => match &*event.name {
                    "SHUTDOWN" => {
                        let reason = event.data["reason"].as_str().unwrap_or("unknown");
                        GuestEnded::ShutDown { reason: reason.into() }
                    }
                    "GUEST_PANICKED" => GuestEnded::Panicked,
                    _ => return,
                },
            };
            alarm.raise(Box::new(ended));
        });
    }
}
