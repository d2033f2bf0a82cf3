//! A machine without CPUs and devices: there is nothing but memory to move.

use pageferry::{Machine, MachineError};

use super::writer::Writer;
use crate::usage::CpuWindow;

/// Notes when the transfer is over, and stops who writes to memory.
#[derive(Debug, Default)]
pub(super) struct MemoryOnly {
    pub(super) window: CpuWindow,
    pub(super) writer: Option<Writer>,
    /// CPU time of the writer.
    pub(super) writer_cpu_nanoseconds: u64,
}

impl Machine for MemoryOnly {
    fn pause(&mut self) -> Result<(), MachineError> {
        if let Some(writer) = &mut self.writer {
            self.writer_cpu_nanoseconds = writer.stop()?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(())
    }

    /// At the destination: all pages are here.
    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        self.window.end();
        Ok(())
    }

    /// At the source: all pages are there.
    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.window.end();
        Ok(())
    }
}
