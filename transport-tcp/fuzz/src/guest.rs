//! A guest of 64 pages that does nothing.

use pageferry::{Machine, MachineError};

/// Its memory in pages.
pub const PAGES: u64 = 64;
/// Its device state.
pub const STATE: &[u8] = b"state";

/// Whether it runs.
#[derive(Debug, Default)]
pub struct Guest {
    pub runs: bool,
}

impl Machine for Guest {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.runs = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.runs = true;
        Ok(())
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        state.extend_from_slice(STATE);
        Ok(())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        if state.first() == Some(&0xff) { Err("no such state".into()) } else { Ok(()) }
    }
}
