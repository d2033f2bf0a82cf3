//! The guest's code: position-independent, copied into guest memory at boot.
//!
//! Registers, all set at boot and carried by the guest ever after:
//!
//! ```text
//! rdi  first page of the slice          rbp  the workload's loop
//! rsi  pages of the slice               rbx  page choice generator (odd)
//! r8   generator multiplier             r10  sequential: current page
//! r11  slot                             r12  hot-cold: hot writes left in a row
//! r13  hot pages                        r14  beats
//! r15  end of the slice                 rsp  canary: there is no stack
//! xmm0-15  a pattern                    rax, rcx, rdx, r9  scratch
//! ```
//!
//! Only plain integer instructions and `movups` are used: some KVMs interpret guest code and know
//! little more.
#![expect(unsafe_code, reason = "guest code is assembled into the VMM's read-only data")]

use std::arch::global_asm;

use crate::devices::{HEARTBEAT_PORT, SERIAL_PORT};
use crate::layout::{BANNER, CODE_MAX_BYTES, PAGE_BYTES, PAGE_COUNTER, slot};
use crate::workload::{HOT_WRITES_IN_A_ROW, WorkloadKind};

global_asm!(
    ".pushsection .rodata.pageferry_guest, \"a\", @progbits",
    ".globl pageferry_guest_start",
    ".globl pageferry_guest_beat",
    ".globl pageferry_guest_sequential",
    ".globl pageferry_guest_random",
    ".globl pageferry_guest_random_counted",
    ".globl pageferry_guest_hot_cold",
    ".globl pageferry_guest_hot_cold_counted",
    ".globl pageferry_guest_end",
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
    "    mov edx, {heartbeat}",
    "    in eax, dx",
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
    xmm = const slot::XMM,
    counter = const PAGE_COUNTER,
    page_bytes = const PAGE_BYTES,
    page_shift = const PAGE_BYTES.trailing_zeros(),
    hot_writes = const HOT_WRITES_IN_A_ROW,
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
    };
    offset_of(label) as u64
}

/// Whether a virtual CPU there, from the code's start, has counted a write in the page but not yet
/// in its slot.
pub(crate) fn write_in_flight(offset: u64) -> bool {
    let between =
        [&raw const pageferry_guest_random_counted, &raw const pageferry_guest_hot_cold_counted];
    between.into_iter().any(|label| offset_of(label) as u64 == offset)
}

fn offset_of(label: *const u8) -> usize {
    label.addr() - (&raw const pageferry_guest_start).addr()
}
