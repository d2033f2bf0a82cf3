//! A guest that comes, for a QEMU that waits for it.

use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;

use pageferry::Chain;
use pageferry::machine::{Machine, MachineError};
use pageferry::memory::{GuestMemory, Layout, PageRange};
use pageferry_rust_vmm::ForeignProcess;

use crate::device_state;
use crate::incoming::{Incoming, IncomingError, QemuCommand};
use crate::qmp::Qmp;
use crate::ram::{self, Backend, Made, RamError};

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
    /// The same as the engine has it, once it was mapped.
    memory: Option<Arc<GuestMemory>>,
}

impl QemuDestination {
    /// Starts a QEMU for RAM that was made for it.
    pub fn start(command: QemuCommand, made: Made) -> Result<Self, IncomingError> {
        let incoming = Some(Incoming::start(&command)?);
        Ok(Self { command, incoming, made, memory: None })
    }

    /// Its monitor.
    pub fn qmp(&self) -> Option<&Arc<Qmp>> {
        self.incoming.as_ref().map(Incoming::qmp)
    }

    /// Its RAM, for the engine, which is in these files.
    pub fn map(&mut self, backends: &[(Backend, PathBuf)]) -> Result<Arc<GuestMemory>, RamError> {
        let memory = ram::map(backends)?;
        self.memory = Some(Arc::clone(&memory));
        Ok(memory)
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

fn all_of(layout: &Layout) -> Vec<PageRange> {
    let regions = (0..).zip(layout.regions());
    regions.flat_map(|(region, layout)| PageRange::of_run(region, 0..layout.pages())).collect()
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

    /// QEMU may write RAM as it loads: with KVM it was seen to, in a ROM's place.
    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        let pid = self.running()?.peer_pid()?;
        let memory = self.memory.as_ref().ok_or("its RAM was not mapped")?;
        // Nothing else in it has touched RAM: it has not run.
        let touched = ForeignProcess::open(pid).and_then(|process| process.touched(memory));
        Ok(touched.unwrap_or_else(|error| {
            tracing::debug!(error = %Chain::of(&error), "any page may have been written");
            all_of(memory.layout())
        }))
    }

    fn unload(&mut self) -> Result<(), MachineError> {
        // What it has open must be free for the next one.
        drop(self.incoming.take());
        self.incoming = Some(Incoming::start(&self.command)?);
        Ok(())
    }
}
