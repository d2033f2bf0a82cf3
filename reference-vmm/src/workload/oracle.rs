//! Tells from a paused guest's memory whether every write it made is there.

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryError;

use super::arithmetic::Registers;
use super::contents::{self, canary, page_tag, parameters, vector_word};
use super::pacer::FULL_SPEED_STEPS;
use super::{WorkloadConfig, WorkloadKind};
use crate::layout::{
    Layout, PAGE_BYTES, PAGE_COUNTER, PAGE_TAG, PARAMETERS, Page, Slice, checkpoint, slot,
};
use crate::linear::LinearMemory;

/// What the oracle found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OracleReport {
    /// Whether memory and registers are as the workload left them.
    pub ok: bool,
    /// What is wrong, or what was checked.
    pub detail: String,
    /// Pages written since boot, as the guest counted them; up to a chunk off for `sequential`.
    pub writes: u64,
    /// Beats since boot, as the guest counted them.
    pub beats: u64,
    /// Pages of the working set checked.
    pub pages: u64,
    /// Whether the vector registers hold their pattern.
    pub fpu_intact: bool,
}

/// Why memory does not pass.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Violation {
    #[error("{0}")]
    Wrong(String),
    #[error("failed to read guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Totals of a guest that passed.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) writes: u64,
    pub(crate) beats: u64,
    pub(crate) pages: u64,
}

/// Fails with a [`Violation`] built as by `format!`, unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(Violation::Wrong(format!($($message)+)));
        }
    };
}

/// Checks the whole guest. A virtual CPU with a write in flight has counted it in the page and not
/// in its slot; without knowing, the loss of the very last write would pass for it.
pub(crate) fn check(
    memory: &LinearMemory,
    layout: &Layout,
    workload: &WorkloadConfig,
    writes_in_flight: &[bool],
) -> Result<Totals, Violation> {
    let expected = parameters(workload, layout.vcpus());
    for (address, expected) in (PARAMETERS..).step_by(8).zip(expected) {
        let found = memory.load_u64(address)?;
        ensure!(
            found == expected,
            "the guest in memory is not the one configured: parameter at {address:#x} is \
             {found:#x}, expected {expected:#x}"
        );
    }
    let mut totals = Totals { pages: layout.working_set_pages(), ..Totals::default() };
    for (vcpu, in_flight) in (0..layout.vcpus()).zip(writes_in_flight) {
        let slice = layout.slice(vcpu);
        totals.beats += check_slot(memory, workload, vcpu)?;
        let writes = memory.load_u64(Layout::slot(vcpu) + slot::WRITES)?;
        totals.writes = totals.writes.wrapping_add(writes);
        match workload.kind {
            WorkloadKind::Sequential => check_sequential(memory, workload.seed, vcpu, slice)?,
            WorkloadKind::Random | WorkloadKind::HotCold => {
                let counted = writes.wrapping_add(u64::from(*in_flight));
                check_counters(memory, workload.seed, vcpu, slice, counted)?;
            }
            WorkloadKind::Fpu => {
                let counted = writes.wrapping_add(u64::from(*in_flight));
                check_counters(memory, workload.seed, vcpu, slice, counted)?;
                check_checkpoints(memory, workload.seed, vcpu, counted)?;
            }
            WorkloadKind::Idle => check_pattern(memory, workload.seed, slice)?,
        }
    }
    Ok(totals)
}

fn check_slot(
    memory: &LinearMemory,
    workload: &WorkloadConfig,
    vcpu: u8,
) -> Result<u64, Violation> {
    let seed = workload.seed;
    let address = Layout::slot(vcpu);
    let in_memory = memory.load_u64(address + slot::BEATS_MEMORY)?;
    let in_register = memory.load_u64(address + slot::BEATS_REGISTER)?;
    ensure!(
        in_memory == in_register || in_memory == in_register.wrapping_add(1),
        "vcpu {vcpu} counted {in_register} beats in its register and {in_memory} in memory"
    );
    let went_back = memory.load_u64(address + slot::CLOCK_WENT_BACK)?;
    ensure!(
        went_back == 0,
        "vcpu {vcpu} saw the time stamp counter go back {went_back} times: {in_memory} beats"
    );
    // The first beat's stores may be incomplete.
    if in_register >= 2 {
        let stored = memory.load_u64(address + slot::CANARY)?;
        ensure!(
            stored == canary(seed, vcpu),
            "vcpu {vcpu} stored {stored:#x} for the register that never changes"
        );
        // Registers that are computed with are stored in checkpoints, with the step's number.
        let words = if workload.kind == WorkloadKind::Fpu { 0 } else { 32 };
        for word in 0..words {
            let stored = memory.load_u64(address + slot::XMM + 8 * word)?;
            ensure!(
                stored == vector_word(seed, vcpu, word),
                "vcpu {vcpu} stored {stored:#x} for half {} of xmm{}",
                word % 2,
                word / 2
            );
        }
    }
    Ok(in_memory)
}

fn check_tag(memory: &LinearMemory, seed: u64, page: u64, linear: u64) -> Result<(), Violation> {
    let found = memory.load_u64(linear + PAGE_TAG)?;
    let expected = page_tag(seed, page);
    ensure!(
        found == expected,
        "page {page} of the working set has the tag {found:#x}, expected {expected:#x}"
    );
    Ok(())
}

/// A page just behind the current position that lost its last write looks like the position itself;
/// it shows as soon as the guest has gone on.
fn check_sequential(
    memory: &LinearMemory,
    seed: u64,
    vcpu: u8,
    slice: Slice,
) -> Result<(), Violation> {
    let last_page = slice.linear + (slice.pages - 1) * PAGE_BYTES;
    let behind = memory.load_u8(last_page + PAGE_COUNTER)?;
    let ahead = behind.wrapping_add(1);
    let mut step_seen = false;
    for (page, linear) in contents::pages(slice) {
        check_tag(memory, seed, page, linear)?;
        // The whole word: its upper bytes are never written.
        let found = memory.load_u64(linear + PAGE_COUNTER)?;
        step_seen |= found == u64::from(behind);
        let expected = if step_seen { behind } else { ahead };
        ensure!(
            found == u64::from(expected),
            "page {page} of the working set, vcpu {vcpu}, has the count {found:#x}, expected \
             {expected:#x}: the last page of its slice has {behind:#x}"
        );
    }
    Ok(())
}

fn check_counters(
    memory: &LinearMemory,
    seed: u64,
    vcpu: u8,
    slice: Slice,
    writes: u64,
) -> Result<(), Violation> {
    let mut sum = 0u64;
    for (page, linear) in contents::pages(slice) {
        check_tag(memory, seed, page, linear)?;
        sum = sum.wrapping_add(memory.load_u64(linear + PAGE_COUNTER)?);
    }
    ensure!(
        sum == writes,
        "vcpu {vcpu} wrote {writes} pages and its page counters add up to {sum}"
    );
    Ok(())
}

/// Of the two checkpoints one may be half stored; the other is then of the grant before.
fn check_checkpoints(
    memory: &LinearMemory,
    seed: u64,
    vcpu: u8,
    steps: u64,
) -> Result<(), Violation> {
    let (mut newest, mut half_stored) = (0, 0);
    for base in checkpoint::BASES.map(|base| Layout::slot(vcpu) + base) {
        let stored = memory.load_u64(base + checkpoint::STEPS)?;
        if stored != memory.load_u64(base + checkpoint::STEPS_AGAIN)? {
            half_stored += 1;
            continue;
        }
        // Never stored.
        if stored == 0 {
            continue;
        }
        ensure!(
            stored <= steps,
            "vcpu {vcpu} has a checkpoint of step {stored} and took {steps} steps"
        );
        newest = newest.max(stored);
        let expected = Registers::at(seed, vcpu, stored, 0).checkpoint();
        for (word, expected) in (0..).zip(expected) {
            let found = memory.load_u64(base + checkpoint::REGISTERS + 8 * word)?;
            ensure!(
                found == expected,
                "vcpu {vcpu} stored {found:#x} for word {word} of its registers after step \
                 {stored}, expected {expected:#x}"
            );
        }
    }
    ensure!(half_stored <= 1, "vcpu {vcpu} left both of its checkpoints half stored");
    ensure!(
        steps - newest <= 2 * u64::from(FULL_SPEED_STEPS),
        "vcpu {vcpu} took {steps} steps and its last checkpoint is of step {newest}"
    );
    Ok(())
}

fn check_pattern(memory: &LinearMemory, seed: u64, slice: Slice) -> Result<(), Violation> {
    let mut expected = [0; size_of::<Page>()];
    let mut found = [0; size_of::<Page>()];
    for (page, linear) in contents::pages(slice) {
        contents::idle_page(seed, page, &mut expected);
        memory.read_page(linear, &mut found)?;
        ensure!(found == expected, "page {page} of the working set lost its pattern");
    }
    Ok(())
}
