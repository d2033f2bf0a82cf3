//! What memory and registers hold at boot, all of it told by the seed.

use std::num::NonZero;
use std::thread;

use vm_memory::GuestMemoryError;

use super::{WorkloadConfig, WorkloadKind};
use crate::layout::{BANNER, BANNER_MAX_BYTES, Layout, PAGE_BYTES, PAGE_TAG, PARAMETERS};
use crate::layout::{Page, Slice, WORKING_SET};
use crate::linear::LinearMemory;

const MAGIC: u64 = u64::from_le_bytes(*b"pgferry\x01");
/// Filling is bound by memory; more threads than this gain nothing.
const MAX_FILL_THREADS: usize = 4;
const WORDS_PER_PAGE: u64 = PAGE_BYTES / 8;

/// Things derived from the seed, kept apart so that no two share their values.
#[derive(Debug, Clone, Copy)]
enum Domain {
    PageTag = 1,
    IdlePattern = 2,
    PageChoice = 3,
    Canary = 4,
    VectorRegister = 5,
}

fn derive(seed: u64, domain: Domain, index: u64) -> u64 {
    mix(mix(seed ^ ((domain as u64) << 56)).wrapping_add(index))
}

/// The finalizer of splitmix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Identity of a page of the working set; every eighth has none.
pub(crate) fn page_tag(seed: u64, page: u64) -> u64 {
    if page % 8 == 7 { 0 } else { derive(seed, Domain::PageTag, page) }
}

/// First state of a virtual CPU's page choice.
pub(crate) fn generator_start(seed: u64, vcpu: u8) -> u64 {
    derive(seed, Domain::PageChoice, vcpu.into()) | 1
}

/// The register that never changes.
pub(crate) fn canary(seed: u64, vcpu: u8) -> u64 {
    derive(seed, Domain::Canary, vcpu.into())
}

/// Half a vector register: 0 to 31 are XMM0 to XMM15, 32 to 63 the upper halves of YMM0 to YMM15,
/// 64 to 79 the x87 stack. The `fpu` workload has its own numbering.
pub(crate) fn vector_word(seed: u64, vcpu: u8, word: u64) -> u64 {
    derive(seed, Domain::VectorRegister, u64::from(vcpu) << 8 | word)
}

/// Writes a page of the idle pattern.
pub(crate) fn idle_page(seed: u64, page: u64, bytes: &mut Page) {
    let first_word = page * WORDS_PER_PAGE;
    for (word, bytes) in (first_word..).zip(bytes.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&derive(seed, Domain::IdlePattern, word).to_le_bytes());
    }
}

/// The parameter block of a guest.
pub(crate) fn parameters(workload: &WorkloadConfig, vcpus: u8) -> [u64; 5] {
    let kind = workload.kind.code();
    [MAGIC, kind, vcpus.into(), workload.working_set_bytes, workload.seed]
}

/// Fills the working set and the parameter block. Slots start zeroed, as all memory does.
pub(crate) fn fill(
    memory: &LinearMemory,
    layout: &Layout,
    workload: &WorkloadConfig,
) -> Result<(), GuestMemoryError> {
    for (address, word) in (PARAMETERS..).step_by(8).zip(parameters(workload, layout.vcpus())) {
        memory.store_u64(address, word)?;
    }
    let pages = layout.working_set_pages();
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_FILL_THREADS);
    let pages_per_thread = pages.div_ceil(threads as u64);
    thread::scope(|scope| {
        let fillers: Vec<_> = (0..threads as u64)
            .map(|thread| {
                let first = thread * pages_per_thread;
                let end = (first + pages_per_thread).min(pages);
                scope.spawn(move || (first..end).try_for_each(|p| fill_page(memory, workload, p)))
            })
            .collect();
        fillers.into_iter().try_for_each(|filler| match filler.join() {
            Ok(filled) => filled,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn fill_page(
    memory: &LinearMemory,
    workload: &WorkloadConfig,
    page: u64,
) -> Result<(), GuestMemoryError> {
    let linear = WORKING_SET + page * PAGE_BYTES;
    if workload.kind == WorkloadKind::Idle {
        let mut bytes = [0; size_of::<Page>()];
        idle_page(workload.seed, page, &mut bytes);
        return memory.write(linear, &bytes);
    }
    match page_tag(workload.seed, page) {
        0 => Ok(()),
        tag => memory.store_u64(linear + PAGE_TAG, tag),
    }
}

/// The line the guest prints at boot.
pub(crate) fn banner(workload: &WorkloadConfig, vcpus: u8) -> String {
    let WorkloadConfig { kind, working_set_bytes, .. } = workload;
    let line =
        format!("pageferry guest: {kind} workload over {working_set_bytes} bytes, {vcpus} vcpus\n");
    debug_assert!((line.len() as u64) < BANNER_MAX_BYTES);
    line
}

/// Puts the line where the guest code looks for it.
pub(crate) fn write_banner(memory: &LinearMemory, line: &str) -> Result<(), GuestMemoryError> {
    memory.write(BANNER, line.as_bytes())?;
    memory.store_u8(BANNER + line.len() as u64, 0)
}

/// The pages of a slice: (number in the working set, linear address).
pub(crate) fn pages(slice: Slice) -> impl Iterator<Item = (u64, u64)> {
    (0..slice.pages).map(move |page| (slice.first_page + page, slice.linear + page * PAGE_BYTES))
}
