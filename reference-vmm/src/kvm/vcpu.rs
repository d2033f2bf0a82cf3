//! Running a virtual CPU.
#![expect(unsafe_code, reason = "the reason of an internal error lies in a union of the kernel's")]

use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry::Chain;
use pageferry_rust_vmm::VcpuRing;
use pageferry_rust_vmm::kvm::KVM_EXIT_DIRTY_RING_FULL;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::exceptions;
use crate::devices::{Devices, EXCEPTION_PORT, HEARTBEAT_PORT, SERIAL_PORT, SERIAL_PORTS};
use crate::error::GuestError;
use crate::run_control::RunControl;
use crate::workload::pacer::Pacer;

/// Runs until the control says stop. The virtual CPU is left with its pending I/O completed, so
/// that its registers are all there is to it.
pub(crate) fn run(
    vcpu: &mut VcpuFd,
    ring: Option<&VcpuRing>,
    control: &RunControl,
    devices: &Devices,
    pacer: &mut Pacer,
) -> Result<(), String> {
    while control.running() {
        enter(vcpu, ring, control, devices, pacer)?;
    }
    // An exit for I/O is completed on the next entry; this one completes it and comes back.
    vcpu.set_kvm_immediate_exit(1);
    let completed = loop {
        match enter(vcpu, ring, control, devices, pacer) {
            // String I/O may take more than one exit.
            Ok(Entered::Io | Entered::RingFull) => {}
            Ok(Entered::Interrupted) => break Ok(()),
            Err(reason) => break Err(reason),
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    completed
}

enum Entered {
    Io,
    RingFull,
    Interrupted,
}

fn enter(
    vcpu: &mut VcpuFd,
    ring: Option<&VcpuRing>,
    control: &RunControl,
    devices: &Devices,
    pacer: &mut Pacer,
) -> Result<Entered, String> {
    let ended = match vcpu.run() {
        Ok(VcpuExit::IoIn(HEARTBEAT_PORT, data)) => {
            devices.heartbeat.beat();
            // It is outside the guest anyway, and a KVM that interprets it stops it too late.
            ring.map_or(Ok(()), VcpuRing::relieve)
                .map_err(|error| Chain::of(&error).to_string())?;
            let steps = pacer.grant(control).to_le_bytes();
            for (byte, step_byte) in data.iter_mut().zip(steps) {
                *byte = step_byte;
            }
            return Ok(Entered::Io);
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            for byte in data {
                // Where nothing answers, the bus reads as ones.
                *byte = serial_offset(port).map_or(0xff, |offset| devices.serial.read(offset));
            }
            return Ok(Entered::Io);
        }
        Ok(VcpuExit::IoOut(EXCEPTION_PORT, _)) => {
            return Err(format!("ended unexpectedly: {}", exceptions::report(vcpu)));
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            if let Some(offset) = serial_offset(port) {
                for byte in data {
                    devices.serial.write(offset, *byte);
                }
            }
            return Ok(Entered::Io);
        }
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
            ring.map_or(Ok(()), VcpuRing::on_full)
                .map_err(|error| Chain::of(&error).to_string())?;
            return Ok(Entered::RingFull);
        }
        Ok(VcpuExit::Intr) => return Ok(Entered::Interrupted),
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
            return Ok(Entered::Interrupted);
        }
        Ok(VcpuExit::InternalError) => None,
        Ok(exit) => Some(format!("{exit:?}")),
        Err(error) => Some(error.to_string()),
    };
    let reason = ended.unwrap_or_else(|| internal_error(vcpu));
    let rip = vcpu.get_regs().map_or_else(|e| e.to_string(), |regs| format!("{:#x}", regs.rip));
    Err(format!("ended unexpectedly at rip {rip}: {reason}"))
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT).filter(|offset| *offset < SERIAL_PORTS)?;
    u8::try_from(offset).ok()
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: all members of the union are plain integers, and for this exit the kernel filled in
    // this one.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let name = match internal.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction could not be emulated",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions while delivering one",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        _ => "unexpected exit",
    };
    format!("KVM internal error {}, {name}", internal.suberror)
}

/// Sends the signal that makes KVM_RUN return.
pub(crate) fn kick(thread: &JoinHandle<()>) {
    // It fails only for a thread that has ended, which needs no kick.
    if let Err(error) = thread.kill(SIGRTMIN()) {
        tracing::trace!(%error, "a virtual CPU's thread took no signal");
    }
}

/// Makes the kick's signal harmless but for interrupting system calls. Once per process.
pub(crate) fn install_kick_handler() -> Result<(), GuestError> {
    extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), ignore)).map_err(|source| {
        GuestError::Kvm { operation: "install the virtual CPUs' signal handler".into(), source }
    })
}
