//! What a virtual machine needs in memory and registers to run the guest code in 64-bit mode.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryError;

use super::{code, exceptions};
use crate::layout::{
    CODE, GDT, IDT, Layout, MAPPING_BYTES, PAGE_BYTES, PAGE_TABLES, PARAMETERS, checkpoint,
};
use crate::linear::LinearMemory;
use crate::workload::contents::{canary, generator_start};
use crate::workload::{
    GENERATOR_MULTIPLIER, HOT_WRITES_IN_A_ROW, WorkloadConfig, WorkloadKind, hot_pages,
};

/// Word of the parameter block with the XSAVE components that hold a pattern. The destination
/// reads it there: it has no say in what the source's processor had.
const XSAVE_COMPONENTS: u64 = PARAMETERS + 0x40;

const ENTRIES_PER_TABLE: u64 = 512;
// Accessed and dirty are set ahead, so that the processor has no reason to write to the tables.
const TABLE: u64 = 0x23;
const MAPPING: u64 = 0xe3;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;
const GDT_ENTRIES: [u64; 5] = [
    0,
    0x00af_9b00_0000_ffff, // 64-bit code
    0x00cf_9300_0000_ffff, // data
    0x0000_8b00_0000_0067, // task state, lower half
    0,                     // and upper
];

const GDT_LIMIT: u16 = 5 * 8 - 1;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;

/// Writes code, descriptor table and page tables.
pub(crate) fn write_tables(memory: &LinearMemory, layout: &Layout) -> Result<(), GuestMemoryError> {
    memory.write(CODE, code::bytes())?;
    for (address, entry) in (GDT..).step_by(8).zip(GDT_ENTRIES) {
        memory.store_u64(address, entry)?;
    }
    exceptions::write(memory, layout, CODE_SELECTOR)?;
    let directory_pointers = PAGE_TABLES + PAGE_BYTES;
    let directories = directory_pointers + PAGE_BYTES;
    memory.store_u64(PAGE_TABLES, directory_pointers | TABLE)?;
    for span in layout.spans() {
        for piece in 0..span.len_bytes.div_ceil(MAPPING_BYTES) {
            let offset = piece * MAPPING_BYTES;
            let mapping = (span.linear + offset) / MAPPING_BYTES;
            if mapping.is_multiple_of(ENTRIES_PER_TABLE) {
                let directory = mapping / ENTRIES_PER_TABLE;
                let entry = directories + directory * PAGE_BYTES;
                memory.store_u64(directory_pointers + directory * 8, entry | TABLE)?;
            }
            memory.store_u64(directories + mapping * 8, (span.guest_address + offset) | MAPPING)?;
        }
    }
    Ok(())
}

pub(crate) fn store_xsave_components(
    memory: &LinearMemory,
    components: u64,
) -> Result<(), GuestMemoryError> {
    memory.store_u64(XSAVE_COMPONENTS, components)
}

pub(crate) fn load_xsave_components(memory: &LinearMemory) -> Result<u64, GuestMemoryError> {
    memory.load_u64(XSAVE_COMPONENTS)
}

/// The registers the guest code expects.
pub(crate) fn registers(layout: &Layout, workload: &WorkloadConfig, vcpu: u8) -> kvm_regs {
    let slice = layout.slice(vcpu);
    let entry = if vcpu == 0 { code::boot_entry() } else { code::beat_entry() };
    let (r12, r13) = match workload.kind {
        WorkloadKind::Fpu => (0, Layout::slot(vcpu) + checkpoint::BASES[0]),
        _ => (HOT_WRITES_IN_A_ROW, hot_pages(slice.pages)),
    };
    kvm_regs {
        rip: CODE + entry,
        rflags: RFLAGS_FIXED,
        rdi: slice.linear,
        rsi: slice.pages,
        rbp: CODE + code::workload_entry(workload.kind),
        rbx: generator_start(workload.seed, vcpu),
        r8: GENERATOR_MULTIPLIER,
        r10: slice.linear,
        r11: Layout::slot(vcpu),
        r12,
        r13,
        r15: slice.linear + slice.pages * PAGE_BYTES,
        rsp: canary(workload.seed, vcpu),
        ..kvm_regs::default()
    }
}

/// Turns the special registers of a virtual CPU after reset into those of 64-bit mode. Only guests
/// that compute get AVX: a KVM that lacks it runs the others.
pub(crate) fn enter_long_mode(sregs: &mut kvm_sregs, vcpu: u8, kind: WorkloadKind) {
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
    let data = kvm_segment { selector: DATA_SELECTOR, type_: 3, db: 1, ..flat };
    sregs.cs = kvm_segment { selector: CODE_SELECTOR, type_: 11, l: 1, ..flat };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    let task = kvm_segment {
        selector: TASK_SELECTOR,
        type_: 11,
        limit: 0x67,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.tr = exceptions::task_state(vcpu, task);
    sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = IDT;
    sregs.idt.limit = exceptions::IDT_LIMIT;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    if kind == WorkloadKind::Fpu {
        sregs.cr4 |= CR4_OSXSAVE;
    }
    sregs.efer = EFER_LME | EFER_LMA;
}
