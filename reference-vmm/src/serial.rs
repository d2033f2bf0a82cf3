//! The serial port: a 16550 whose output is kept for the host to read.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_device_state::{Component, DeviceState, HookError};
use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::error::GuestError;

/// Output kept; what a guest prints beyond it is dropped.
const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// Input that the port keeps for the guest.
const FIFO_BYTES: u32 = 64;

/// The serial port of a guest.
#[derive(Debug)]
pub(crate) struct SerialPort {
    device: Mutex<Serial<Interrupt, NoEvents, Output>>,
    output: Output,
    interrupt: Interrupt,
}

impl SerialPort {
    /// A port that raises its interrupt through the event, if there is one to raise.
    pub(crate) fn new(interrupt: Option<EventFd>) -> Self {
        let output = Output::default();
        let interrupt = Interrupt(interrupt.map(Arc::new));
        let device = Mutex::new(Serial::new(interrupt.clone(), output.clone()));
        Self { device, output, interrupt }
    }

    pub(crate) fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    pub(crate) fn write(&self, offset: u8, value: u8) {
        // The output takes everything and an interrupt that can't be raised is one already raised.
        if let Err(error) = self.lock().write(offset, value) {
            tracing::debug!(%error, offset, "serial port write");
        }
    }

    pub(crate) fn output(&self) -> Vec<u8> {
        self.output.lock().clone()
    }

    pub(crate) fn save(&self) -> SerialRegisters {
        SerialRegisters::from(self.lock().state())
    }

    pub(crate) fn restore(&self, registers: SerialRegisters) -> Result<(), GuestError> {
        let state = SerialState::from(registers);
        let device =
            Serial::from_state(&state, self.interrupt.clone(), NoEvents, self.output.clone());
        *self.lock() = device.map_err(|error| GuestError::Device {
            operation: "restore the serial port",
            source: match error {
                Error::Trigger(error) | Error::IOError(error) => error,
                Error::FullFifo => io::Error::new(io::ErrorKind::InvalidData, "input too long"),
            },
        })?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Interrupt, NoEvents, Output>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Clone)]
struct Interrupt(Option<Arc<EventFd>>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |event| event.write(1))
    }
}

#[derive(Debug, Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.lock();
        let room = MAX_OUTPUT_BYTES.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's registers, and input that the guest has not read if there is some.
#[derive(Debug, Clone, PartialEq, Eq, DeviceState)]
#[device_state(name = "serial")]
pub(crate) struct SerialRegisters {
    #[device_state(tag = 1)]
    baud_divisor: [u8; 2],
    #[device_state(tag = 2)]
    interrupt_enable: u8,
    #[device_state(tag = 3)]
    interrupt_identification: u8,
    #[device_state(tag = 4)]
    line_control: u8,
    #[device_state(tag = 5)]
    line_status: u8,
    #[device_state(tag = 6)]
    modem_control: u8,
    #[device_state(tag = 7)]
    modem_status: u8,
    #[device_state(tag = 8)]
    scratch: u8,
    #[device_state(subsection = "serial/input", needed = SerialRegisters::has_input)]
    input: SerialInput,
}

impl SerialRegisters {
    fn has_input(&self) -> bool {
        !self.input.bytes.is_empty()
    }
}

/// Input that the guest has not read.
#[derive(Debug, Clone, Default, PartialEq, Eq, DeviceState)]
struct SerialInput {
    #[device_state(tag = 1, max_len = FIFO_BYTES)]
    bytes: Vec<u8>,
}

impl Component for &SerialPort {
    type State = SerialRegisters;

    fn save(&mut self) -> Result<SerialRegisters, HookError> {
        Ok(SerialPort::save(self))
    }

    fn load(&mut self, registers: SerialRegisters) -> Result<(), HookError> {
        Ok(self.restore(registers)?)
    }
}

impl From<SerialState> for SerialRegisters {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: SerialInput { bytes: state.in_buffer },
        }
    }
}

impl From<SerialRegisters> for SerialState {
    fn from(registers: SerialRegisters) -> Self {
        Self {
            baud_divisor_low: registers.baud_divisor[0],
            baud_divisor_high: registers.baud_divisor[1],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: registers.input.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use pageferry_device_state::{from_bytes, to_bytes};

    use super::*;

    #[test]
    fn registers_move_and_output_stays() {
        let port = SerialPort::new(None);
        for byte in b"ferry" {
            port.write(0, *byte);
        }
        port.write(7, 0x5a);
        let other = SerialPort::new(None);
        other.restore(port.save()).unwrap();
        assert_eq!(other.read(7), 0x5a);
        assert_eq!(other.save(), port.save());
        assert_eq!(port.output(), b"ferry");
        assert!(other.output().is_empty());
    }

    #[test]
    fn too_much_input_is_an_error() {
        let port = SerialPort::new(None);
        let mut registers = port.save();
        registers.input.bytes = vec![0; 1000];
        assert!(port.restore(registers).is_err());
    }

    #[test]
    fn input_is_sent_when_there_is_some() {
        let port = SerialPort::new(None);
        let mut registers = port.save();
        let without = to_bytes(&mut registers).unwrap();
        registers.input.bytes = vec![7; FIFO_BYTES as usize];
        let with = to_bytes(&mut registers).unwrap();
        assert!(with.len() > without.len() + registers.input.bytes.len());
        port.restore(from_bytes(&with).unwrap()).unwrap();
        assert_eq!(port.save(), registers);
        port.restore(from_bytes(&without).unwrap()).unwrap();
        assert!(!port.save().has_input());
        registers.input.bytes.push(7);
        assert!(to_bytes(&mut registers).is_err());
    }

    #[test]
    fn output_is_bounded() {
        let mut output = Output::default();
        for _ in 0..3 {
            io::Write::write_all(&mut output, &vec![b'x'; MAX_OUTPUT_BYTES / 2 + 1]).unwrap();
        }
        assert_eq!(output.lock().len(), MAX_OUTPUT_BYTES);
    }
}
