//! A machine that is nothing but its memory.

use crate::machine::{Machine, MachineError};

/// A machine that has nothing but memory, writes none of it, and takes any state.
#[derive(Debug, Clone, Copy, Default)]
pub struct IdleMachine;

impl Machine for IdleMachine {
    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
}
