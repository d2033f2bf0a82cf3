//! What the guest does with an exception, of which it has none: tells the VMM, and stops.
//!
//! Without this any exception is a triple fault, and some KVMs (AMD's) reset a virtual CPU that has
//! had one, so that not even its place is known. Here each vector has a gate and a few instructions,
//! on a stack of the virtual CPU's own (the guest's stack pointer points nowhere), which put all that
//! the processor says into registers and write to a port. The VMM makes a sentence of them.
//!
//! The frame and the error codes: Intel SDM volume 3, 6.13 and 6.14; AMD APM volume 2, 8.9.
#![expect(unsafe_code, reason = "guest code is assembled into the VMM's read-only data")]

use std::arch::global_asm;

use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryError;

use crate::devices::EXCEPTION_PORT;
use crate::layout::{EXCEPTION_CODE, IDT, Layout, PAGE_BYTES, slot};
use crate::linear::LinearMemory;

const VECTORS: u16 = 256;
/// Bytes from one vector's code to the next one's.
const STUB_BYTES: u64 = 16;
/// The IDT's limit: of all vectors, 16 bytes each.
pub(super) const IDT_LIMIT: u16 = VECTORS * 16 - 1;

/// Present, for ring 0, an interrupt gate; by the first stack of the interrupt stack table.
const GATE: u64 = 0x8e01;
/// Where the task state has the first stack of the interrupt stack table.
const FIRST_STACK: u64 = 0x24;

global_asm!(
    ".pushsection .rodata.pageferry_guest_exceptions, \"a\", @progbits",
    ".globl pageferry_exceptions_start",
    ".globl pageferry_exceptions_end",
    ".balign {stub_bytes}",
    "pageferry_exceptions_start:",
    ".set pageferry_vector, 0",
    ".rept {vectors}",
    ".balign {stub_bytes}",
    // These push an error code by themselves.
    ".if pageferry_vector == 8 || (pageferry_vector >= 10 && pageferry_vector <= 14) || \
         pageferry_vector == 17 || pageferry_vector == 21 || pageferry_vector == 29 || \
         pageferry_vector == 30",
    ".else",
    "    push 0",
    ".endif",
    "    push pageferry_vector",
    "    jmp 20f",
    ".set pageferry_vector, pageferry_vector + 1",
    ".endr",
    // The frame: vector, error code, rip, cs, rflags, rsp, ss.
    "20: pop rax",
    "    pop rbx",
    "    pop rcx",
    "    pop rsi",
    "    pop rdi",
    "    pop r8",
    "    mov r9, cr2",
    "    mov edx, {port}",
    "30: out dx, al",
    // Nobody goes on from here.
    "    jmp 30b",
    "pageferry_exceptions_end:",
    ".popsection",
    stub_bytes = const STUB_BYTES,
    vectors = const VECTORS,
    port = const EXCEPTION_PORT,
);

// SAFETY: the labels are defined by the assembly above; only their addresses are taken.
unsafe extern "C" {
    static pageferry_exceptions_start: u8;
    static pageferry_exceptions_end: u8;
}

/// Writes the code, the IDT, and what each virtual CPU finds its stack by.
pub(super) fn write(
    memory: &LinearMemory,
    layout: &Layout,
    code_selector: u16,
) -> Result<(), GuestMemoryError> {
    memory.write(EXCEPTION_CODE, code())?;
    for vector in 0..u64::from(VECTORS) {
        let handler = EXCEPTION_CODE + vector * STUB_BYTES;
        let low = (handler & 0xffff)
            | u64::from(code_selector) << 16
            | GATE << 32
            | (handler & 0xffff_0000) << 32;
        memory.store_u64(IDT + 16 * vector, low)?;
        memory.store_u64(IDT + 16 * vector + 8, handler >> 32)?;
    }
    for vcpu in 0..layout.vcpus() {
        let end_of_stack = Layout::slot(vcpu) + PAGE_BYTES;
        // Not aligned, so in halves: what the other halves hold is zero.
        memory.write(
            Layout::slot(vcpu) + slot::TASK_STATE + FIRST_STACK,
            &end_of_stack.to_le_bytes(),
        )?;
    }
    Ok(())
}

/// Where a virtual CPU has its task state.
pub(super) fn task_state(vcpu: u8, task: kvm_segment) -> kvm_segment {
    kvm_segment { base: Layout::slot(vcpu) + slot::TASK_STATE, ..task }
}

fn code() -> &'static [u8] {
    let start = &raw const pageferry_exceptions_start;
    let len = (&raw const pageferry_exceptions_end).addr() - start.addr();
    // SAFETY: between the labels lies what was assembled, read-only data of this program that nobody
    // writes.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// What a virtual CPU says that has written to the port.
pub(super) fn report(vcpu: &VcpuFd) -> String {
    let regs = match vcpu.get_regs() {
        Ok(regs) => regs,
        Err(error) => return format!("an exception, and its registers cannot be read: {error}"),
    };
    format!(
        "exception {} ({}), error code {:#x}, at rip {:#x}, rsp {:#x}, rflags {:#x}, cr2 {:#x}",
        regs.rax,
        name(regs.rax),
        regs.rbx,
        regs.rcx,
        regs.r8,
        regs.rdi,
        regs.r9,
    )
}

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range exceeded",
        6 => "invalid opcode",
        7 => "device not available",
        8 => "double fault",
        10 => "invalid task state",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection fault",
        14 => "page fault",
        16 => "x87 floating-point error",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD floating-point error",
        20 => "virtualization exception",
        21 => "control protection fault",
        29 => "VMM communication",
        30 => "security exception",
        32.. => "an interrupt",
        _ => "reserved",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::EXCEPTION_CODE_MAX_BYTES;

    #[test]
    fn the_code_fits_and_its_stubs_are_where_the_gates_point() {
        let code = code();
        assert!(code.len() as u64 <= EXCEPTION_CODE_MAX_BYTES, "{}", code.len());
        let stub = |vector: usize| &code[vector * 16..][..16];
        // push 0; push 6 — push 14 alone, since a page fault has an error code.
        assert_eq!(stub(6)[..4], [0x6a, 0, 0x6a, 6]);
        assert_eq!(stub(14)[..2], [0x6a, 14]);
        assert_eq!(stub(255)[..7], [0x6a, 0, 0x68, 255, 0, 0, 0]);
    }
}
