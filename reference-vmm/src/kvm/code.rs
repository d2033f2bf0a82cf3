//! The guest's code: position-independent, copied into guest memory at boot.
//!
//! Registers, all set at boot and carried by the guest ever after:
//!
//! ```text
//! rdi  first page of the slice          rbp  the workload's loop
//! rsi  pages of the slice               rbx  page choice generator (odd)
//! r8   generator multiplier             r10  sequential: current page
//! r11  slot                             r12  hot-cold: hot writes left in a row; fpu: steps
//! r13  hot pages; fpu: next checkpoint  r14  beats
//! r15  end of the slice                 rsp  canary: there is no stack
//! xmm0-15  a pattern; fpu: see `arithmetic`
//! rax, rcx, rdx, r9  scratch
//! ```
//!
//! Only plain integer instructions and `movups` are used, but for the `fpu` workload: some KVMs
//! interpret guest code and know little more.
#![expect(unsafe_code, reason = "guest code is assembled into the VMM's read-only data")]

use std::arch::global_asm;

use crate::devices::{HEARTBEAT_PORT, SERIAL_PORT};
use crate::layout::{
    BANNER, CLOCK, CLOCK_BEGAN, CODE_MAX_BYTES, PAGE_BYTES, PAGE_COUNTER, checkpoint, slot,
};
use crate::workload::{HOT_WRITES_IN_A_ROW, WorkloadKind, arithmetic};

global_asm!(
    ".pushsection .rodata.pageferry_guest, \"a\", @progbits",
    ".globl pageferry_guest_start",
    ".globl pageferry_guest_beat",
    ".globl pageferry_guest_sequential",
    ".globl pageferry_guest_random",
    ".globl pageferry_guest_random_counted",
    ".globl pageferry_guest_hot_cold",
    ".globl pageferry_guest_hot_cold_counted",
    ".globl pageferry_guest_fpu",
    ".globl pageferry_guest_fpu_counted",
    ".globl pageferry_guest_fpu_operations",
    ".globl pageferry_guest_fpu_operations_end",
    ".globl pageferry_guest_end",
    // Constants are aligned from the start, which is that of a page in the guest.
    ".balign 32",
    // The boot processor starts here: print the banner once the port takes a byte.
    "pageferry_guest_start:",
    "    mov ecx, {banner}",
    "20: mov edx, {serial_line_status}",
    "30: in al, dx",
    "    test al, 0x20",
    "    jz 30b",
    "    movzx eax, byte ptr [rcx]",
    "    test al, al",
    "    jz pageferry_guest_beat",
    "    mov edx, {serial_data}",
    "    out dx, al",
    "    inc rcx",
    "    jmp 20b",
    // All others here: store the registers, beat, and take the steps granted.
    "pageferry_guest_beat:",
    "    inc qword ptr [r11 + {beats_memory}]",
    "    inc r14",
    "    mov [r11 + {beats_register}], r14",
    "    mov [r11 + {canary}], rsp",
    "    movups [r11 + {xmm} + 0x00], xmm0",
    "    movups [r11 + {xmm} + 0x10], xmm1",
    "    movups [r11 + {xmm} + 0x20], xmm2",
    "    movups [r11 + {xmm} + 0x30], xmm3",
    "    movups [r11 + {xmm} + 0x40], xmm4",
    "    movups [r11 + {xmm} + 0x50], xmm5",
    "    movups [r11 + {xmm} + 0x60], xmm6",
    "    movups [r11 + {xmm} + 0x70], xmm7",
    "    movups [r11 + {xmm} + 0x80], xmm8",
    "    movups [r11 + {xmm} + 0x90], xmm9",
    "    movups [r11 + {xmm} + 0xa0], xmm10",
    "    movups [r11 + {xmm} + 0xb0], xmm11",
    "    movups [r11 + {xmm} + 0xc0], xmm12",
    "    movups [r11 + {xmm} + 0xd0], xmm13",
    "    movups [r11 + {xmm} + 0xe0], xmm14",
    "    movups [r11 + {xmm} + 0xf0], xmm15",
    // What the clock was on any virtual CPU before, read before an exit that orders the two.
    "    mov r9, [{clock}]",
    "    mov edx, {heartbeat}",
    "    in eax, dx",
    "    mov ecx, eax",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    cmp rax, r9",
    "    jae 20f",
    "    inc qword ptr [r11 + {clock_went_back}]",
    "20: mov [{clock}], rax",
    "    cmp qword ptr [{clock_began}], 0",
    "    jne 30f",
    "    mov [{clock_began}], rax",
    "30: mov eax, ecx",
    "    test eax, eax",
    "    jz pageferry_guest_beat",
    "    jmp rbp",
    // r9 steps to go; rcx of them before the slice ends, so that the loop need not look.
    "pageferry_guest_sequential:",
    "    mov r9d, eax",
    "    add [r11 + {writes}], r9",
    "20: mov rcx, r15",
    "    sub rcx, r10",
    "    shr rcx, {page_shift}",
    "    cmp rcx, r9",
    "    cmova rcx, r9",
    "    sub r9, rcx",
    // Eight pages a turn: where each instruction is interpreted, the loop itself is what costs.
    "30: sub rcx, 8",
    "    jb 40f",
    "    inc byte ptr [r10 + {counter} + 0 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 1 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 2 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 3 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 4 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 5 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 6 * {page_bytes}]",
    "    inc byte ptr [r10 + {counter} + 7 * {page_bytes}]",
    "    add r10, 8 * {page_bytes}",
    "    jmp 30b",
    "40: add rcx, 8",
    "    jz 60f",
    "50: inc byte ptr [r10 + {counter}]",
    "    add r10, {page_bytes}",
    "    dec rcx",
    "    jnz 50b",
    "60: cmp r10, r15",
    "    jb 70f",
    "    mov r10, rdi",
    "70: test r9, r9",
    "    jnz 20b",
    "    jmp pageferry_guest_beat",
    // A page number is the high half of generator times pages.
    "pageferry_guest_random:",
    "    mov ecx, eax",
    "20: imul rbx, r8",
    "    mov rax, rbx",
    "    mul rsi",
    "    shl rdx, {page_shift}",
    "    inc qword ptr [rdi + rdx + {counter}]",
    "pageferry_guest_random_counted:",
    "    inc qword ptr [r11 + {writes}]",
    "    dec ecx",
    "    jnz 20b",
    "    jmp pageferry_guest_beat",
    "pageferry_guest_hot_cold:",
    "    mov ecx, eax",
    "20: imul rbx, r8",
    "    mov rax, r13",
    "    sub r12, 1",
    "    jnc 30f",
    "    mov r12d, {hot_writes}",
    "    mov rax, rsi",
    "30: mul rbx",
    "    shl rdx, {page_shift}",
    "    inc qword ptr [rdi + rdx + {counter}]",
    "pageferry_guest_hot_cold_counted:",
    "    inc qword ptr [r11 + {writes}]",
    "    dec ecx",
    "    jnz 20b",
    "    jmp pageferry_guest_beat",
    // Notes where an instruction that changes x87 or vector registers starts.
    ".macro pageferry_operation text:vararg",
    "960: \\text",
    ".pushsection .rodata.pageferry_guest_operations, \"a\", @progbits",
    ".long 960b - pageferry_guest_start",
    ".popsection",
    ".endm",
    // ST0 becomes the next number of its chain. One remainder is enough: the exponents are less
    // than 64 apart.
    ".macro pageferry_x87_chain",
    "pageferry_operation fmul qword ptr [rip + 910f]",
    "pageferry_operation fadd qword ptr [rip + 911f]",
    "pageferry_operation fprem",
    ".endm",
    ".pushsection .rodata.pageferry_guest_operations, \"a\", @progbits",
    ".balign 4",
    "pageferry_guest_fpu_operations:",
    ".popsection",
    "pageferry_guest_fpu:",
    "    mov ecx, eax",
    "20:",
    "pageferry_x87_chain",
    ".irp place, 2, 3, 4, 5, 6, 7",
    "pageferry_operation fxch st(\\place)",
    "pageferry_x87_chain",
    ".endr",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
    "pageferry_operation vmulpd ymm\\n, ymm\\n, ymmword ptr [rip + 912f]",
    "pageferry_operation vaddpd ymm\\n, ymm\\n, ymmword ptr [rip + 913f]",
    "pageferry_operation vmovapd ymm15, ymm\\n",
    "pageferry_operation vdivpd ymm15, ymm15, ymmword ptr [rip + 914f]",
    "pageferry_operation vroundpd ymm15, ymm15, {round_as_mxcsr}",
    "pageferry_operation vmulpd ymm15, ymm15, ymmword ptr [rip + 914f]",
    "pageferry_operation vsubpd ymm\\n, ymm\\n, ymm15",
    ".endr",
    ".irp n, 8, 9, 10, 11, 12, 13, 14",
    "pageferry_operation mulpd xmm\\n, xmmword ptr [rip + 912f]",
    "pageferry_operation addpd xmm\\n, xmmword ptr [rip + 913f]",
    "pageferry_operation movapd xmm15, xmm\\n",
    "pageferry_operation divpd xmm15, xmmword ptr [rip + 914f]",
    "pageferry_operation roundpd xmm15, xmm15, {round_as_mxcsr}",
    "pageferry_operation mulpd xmm15, xmmword ptr [rip + 914f]",
    "pageferry_operation subpd xmm\\n, xmm15",
    ".endr",
    "pageferry_operation inc r12",
    "    imul rbx, r8",
    "    mov rax, rbx",
    "    mul rsi",
    "    shl rdx, {page_shift}",
    "    inc qword ptr [rdi + rdx + {counter}]",
    "pageferry_guest_fpu_counted:",
    "    inc qword ptr [r11 + {writes}]",
    "    dec ecx",
    "    jnz 20b",
    "    mov [r13 + {checkpoint_steps}], r12",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "    vmovupd [r13 + {checkpoint_registers} + 32 * \\n], ymm\\n",
    ".endr",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
    "    fst qword ptr [r13 + {checkpoint_registers} + 512 + 8 * \\n]",
    "pageferry_operation fincstp",
    ".endr",
    "    mov [r13 + {checkpoint_steps_again}], r12",
    "    xor r13, {checkpoint_toggle}",
    "    jmp pageferry_guest_beat",
    ".pushsection .rodata.pageferry_guest_operations, \"a\", @progbits",
    "pageferry_guest_fpu_operations_end:",
    ".popsection",
    ".balign 32",
    "912: .quad {multiplier}, {multiplier}, {multiplier}, {multiplier}",
    "913: .quad {increment}, {increment}, {increment}, {increment}",
    "914: .quad {modulus}, {modulus}, {modulus}, {modulus}",
    "910: .quad {x87_multiplier}",
    "911: .quad {x87_increment}",
    "pageferry_guest_end:",
    ".popsection",
    banner = const BANNER,
    serial_data = const SERIAL_PORT,
    serial_line_status = const SERIAL_PORT + 5,
    heartbeat = const HEARTBEAT_PORT,
    writes = const slot::WRITES,
    beats_register = const slot::BEATS_REGISTER,
    beats_memory = const slot::BEATS_MEMORY,
    canary = const slot::CANARY,
    clock = const CLOCK,
    clock_began = const CLOCK_BEGAN,
    clock_went_back = const slot::CLOCK_WENT_BACK,
    xmm = const slot::XMM,
    counter = const PAGE_COUNTER,
    page_bytes = const PAGE_BYTES,
    page_shift = const PAGE_BYTES.trailing_zeros(),
    hot_writes = const HOT_WRITES_IN_A_ROW,
    // And without a note in MXCSR that a result is not exact.
    round_as_mxcsr = const 0b1100,
    checkpoint_steps = const checkpoint::STEPS,
    checkpoint_steps_again = const checkpoint::STEPS_AGAIN,
    checkpoint_registers = const checkpoint::REGISTERS,
    checkpoint_toggle = const checkpoint::TOGGLE,
    multiplier = const (arithmetic::MULTIPLIER as f64).to_bits(),
    increment = const (arithmetic::INCREMENT as f64).to_bits(),
    modulus = const arithmetic::MODULUS.to_bits(),
    x87_multiplier = const (arithmetic::X87_MULTIPLIER as f64).to_bits(),
    x87_increment = const (arithmetic::X87_INCREMENT as f64).to_bits(),
);

// SAFETY: the labels are defined by the assembly above; only their addresses are taken.
unsafe extern "C" {
    static pageferry_guest_start: u8;
    static pageferry_guest_beat: u8;
    static pageferry_guest_sequential: u8;
    static pageferry_guest_random: u8;
    static pageferry_guest_random_counted: u8;
    static pageferry_guest_hot_cold: u8;
    static pageferry_guest_hot_cold_counted: u8;
    static pageferry_guest_fpu: u8;
    static pageferry_guest_fpu_counted: u8;
    static pageferry_guest_fpu_operations: u32;
    static pageferry_guest_fpu_operations_end: u32;
    static pageferry_guest_end: u8;
}

/// The code's bytes.
pub(crate) fn bytes() -> &'static [u8] {
    let start = &raw const pageferry_guest_start;
    let len = offset_of(&raw const pageferry_guest_end);
    debug_assert!(len as u64 <= CODE_MAX_BYTES);
    // SAFETY: between the first and the last label lies what was assembled, read-only data of this
    // program that nobody writes.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// Where the boot processor starts, from the code's start.
pub(crate) fn boot_entry() -> u64 {
    offset_of(&raw const pageferry_guest_start) as u64
}

/// Where the others start.
pub(crate) fn beat_entry() -> u64 {
    offset_of(&raw const pageferry_guest_beat) as u64
}

/// A workload's loop. An idle guest is never granted a step, so it goes nowhere.
pub(crate) fn workload_entry(kind: WorkloadKind) -> u64 {
    let label = match kind {
        WorkloadKind::Sequential => &raw const pageferry_guest_sequential,
        WorkloadKind::Random => &raw const pageferry_guest_random,
        WorkloadKind::HotCold => &raw const pageferry_guest_hot_cold,
        WorkloadKind::Idle => &raw const pageferry_guest_beat,
        WorkloadKind::Fpu => &raw const pageferry_guest_fpu,
    };
    offset_of(label) as u64
}

/// Whether a virtual CPU there, from the code's start, has counted a write in the page but not yet
/// in its slot.
pub(crate) fn write_in_flight(offset: u64) -> bool {
    let between = [
        &raw const pageferry_guest_random_counted,
        &raw const pageferry_guest_hot_cold_counted,
        &raw const pageferry_guest_fpu_counted,
    ];
    between.into_iter().any(|label| offset_of(label) as u64 == offset)
}

/// How many of the `fpu` workload's operations lie before that place, from the code's start: those
/// that a virtual CPU there has done. The rest of the guest code lies before all of them.
pub(crate) fn operations_done(offset: u64) -> usize {
    operation_offsets().iter().take_while(|at| u64::from(**at) < offset).count()
}

/// Where the instructions start that do the operations, in the code's order.
fn operation_offsets() -> &'static [u32] {
    let start = &raw const pageferry_guest_fpu_operations;
    let len = (&raw const pageferry_guest_fpu_operations_end).addr() - start.addr();
    // SAFETY: between the labels lies what was assembled, aligned read-only data of this program
    // that nobody writes.
    unsafe { std::slice::from_raw_parts(start, len / size_of::<u32>()) }
}

fn offset_of(label: *const u8) -> usize {
    label.addr() - (&raw const pageferry_guest_start).addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page() {
        assert!(bytes().len() as u64 <= CODE_MAX_BYTES, "{}", bytes().len());
    }

    #[test]
    fn the_code_has_the_operations_that_the_host_computes() {
        let offsets = operation_offsets();
        assert_eq!(offsets.len(), arithmetic::operations().len());
        assert!(offsets.is_sorted());
        let start = workload_entry(WorkloadKind::Fpu);
        assert_eq!(operations_done(start), 0);
        assert_eq!(operations_done(beat_entry()), 0);
        assert_eq!(operations_done(bytes().len() as u64), offsets.len());
    }
}
