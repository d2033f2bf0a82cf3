//! The devices every guest has.

use pageferry_device_state::{RegisterError, Registry};
use vmm_sys_util::eventfd::EventFd;

use crate::heartbeat::Heartbeat;
use crate::serial::SerialPort;

/// First of the serial port's eight I/O ports.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// How many it has.
pub(crate) const SERIAL_PORTS: u16 = 8;
/// The serial port's interrupt line.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// Reading four bytes here is a beat, and says how many steps to take before the next.
pub(crate) const HEARTBEAT_PORT: u16 = 0x500;
/// Where the guest writes when it had an exception; its registers say which.
pub(crate) const EXCEPTION_PORT: u16 = 0x508;

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

    /// Adds the devices to those that are saved and loaded.
    pub(crate) fn register<'a>(&'a self, registry: &mut Registry<'a>) -> Result<(), RegisterError> {
        registry.add_component(0, &self.heartbeat)?;
        registry.add_component(0, &self.serial)
    }
}
