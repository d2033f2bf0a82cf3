//! The devices every guest has.

use vmm_sys_util::eventfd::EventFd;

use crate::error::GuestError;
use crate::heartbeat::{Heartbeat, HeartbeatSnapshot};
use crate::serial::{SerialPort, SerialRegisters};

/// First of the serial port's eight I/O ports.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// How many it has.
pub(crate) const SERIAL_PORTS: u16 = 8;
/// The serial port's interrupt line.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// Reading four bytes here is a beat, and says how many steps to take before the next.
pub(crate) const HEARTBEAT_PORT: u16 = 0x500;

/// Shared by a guest and its virtual CPUs.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) heartbeat: Heartbeat,
    pub(crate) serial: SerialPort,
}

impl Devices {
    pub(crate) fn new(serial_interrupt: Option<EventFd>) -> Self {
        Self { heartbeat: Heartbeat::default(), serial: SerialPort::new(serial_interrupt) }
    }

    pub(crate) fn save(&self) -> (HeartbeatSnapshot, SerialRegisters) {
        (self.heartbeat.snapshot(), self.serial.save())
    }

    pub(crate) fn restore(
        &self,
        heartbeat: HeartbeatSnapshot,
        serial: SerialRegisters,
    ) -> Result<(), GuestError> {
        self.heartbeat.restore(heartbeat);
        self.serial.restore(serial)
    }
}
