//! Is a page zero? The engine asks it of every dirty page, so it has to run at the speed of
//! memory.
//!
//! The bytes may change while we look: a guest runs. So they are read by volatile loads, or by
//! assembly, which the compiler takes to read whatever is there; a vector intrinsic would be a
//! plain load, and a data race. Either answer is right for a page that changes: it was re-armed
//! before, and comes back with the next harvest.
#![expect(
    unsafe_code,
    reason = "reads guest memory through raw pointers, with vector instructions"
)]

use std::sync::OnceLock;

use super::layout::PAGE_BYTES;

/// What spans are made of: divides every page, and is what the vector loop takes at a time.
const BLOCK_BYTES: usize = 128;

/// [`PAGE_BYTES`] as an offset in memory.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_BYTES as usize;

/// A way to look: address and length, with [`is_zero`]'s contract.
type Look = unsafe fn(*const u8, usize) -> bool;

/// Whether all bytes of a span are zero, by the fastest way this CPU has.
///
/// # Safety
///
/// The span is readable, made of whole pages, and begins at a page boundary.
pub(crate) unsafe fn is_zero(addr: *const u8, len_bytes: usize) -> bool {
    static LOOK: OnceLock<Look> = OnceLock::new();
    debug_assert!(addr.addr().is_multiple_of(BLOCK_BYTES));
    debug_assert!(len_bytes.is_multiple_of(BLOCK_BYTES));
    let look = *LOOK.get_or_init(fastest);
    // SAFETY: the caller's promise is what every way asks for.
    unsafe { look(addr, len_bytes) }
}

/// How many of the pages of a span, from the first on, are like it: all zero, or all not.
/// Returns also which.
///
/// Looking at a page that holds something costs one cache miss and nothing else, and pages are
/// too far apart for the CPU to foresee it; so the first lines of the pages that follow are asked
/// for early.
///
/// # Safety
///
/// As for [`is_zero`]; the span is not empty.
pub(crate) unsafe fn alike(addr: *const u8, len_bytes: usize) -> (usize, bool) {
    const AHEAD: usize = 8;
    let pages = len_bytes / PAGE;
    let page = |index: usize| addr.wrapping_add(index * PAGE);
    (1..pages.min(AHEAD)).for_each(|index| prefetch(page(index)));
    // SAFETY: a page of the span.
    let zero = unsafe { is_zero(addr, PAGE) };
    let like_the_first = (1..pages).take_while(|&index| {
        if index + AHEAD <= pages {
            prefetch(page(index + AHEAD - 1));
        }
        // SAFETY: a page of the span.
        let this = unsafe { is_zero(page(index), PAGE) };
        this == zero
    });
    (1 + like_the_first.count(), zero)
}

/// Asks for the first block of a page. Harmless for any address.
fn prefetch(addr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in [0, 64] {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint: whatever the address, nothing is read that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(addr.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = addr;
}

fn fastest() -> Look {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // The closure is what makes an unsafe function of a target feature one without.
        // SAFETY: the CPU has AVX2, as was just seen; the rest is the caller's promise.
        return |addr, len_bytes| unsafe { avx2(addr, len_bytes) };
    }
    portable
}

/// Word by word, eight at a time.
unsafe fn portable(addr: *const u8, len_bytes: usize) -> bool {
    const AT_ONCE: usize = 8;
    let words = len_bytes / size_of::<u64>();
    #[expect(clippy::cast_ptr_alignment, reason = "spans start at page boundaries")]
    let first = addr.cast::<u64>();
    (0..words).step_by(AT_ONCE).all(|index| {
        (index..index + AT_ONCE).fold(0, |bits, index| {
            // SAFETY: inside the span: whole pages hold a multiple of eight words.
            let word = unsafe { first.add(index) };
            // SAFETY: readable and aligned, says the caller.
            bits | unsafe { word.read_volatile() }
        }) == 0
    })
}

/// 128 bytes at a time, until some are not zero.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(addr: *const u8, len_bytes: usize) -> bool {
    let zero: u8;
    let end = addr.wrapping_add(len_bytes);
    if len_bytes == 0 {
        return true;
    }
    // SAFETY: reads from `addr` to `end` in steps of 128 bytes, which divide a page, and loads
    // aligned to 32; writes no memory. At the label 3 the zero flag is clear if bytes were found,
    // and set by the comparison that ended the loop if not.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqa {bits}, [{at}]",
            "vpor {bits}, {bits}, [{at} + 32]",
            "vpor {bits}, {bits}, [{at} + 64]",
            "vpor {bits}, {bits}, [{at} + 96]",
            "vptest {bits}, {bits}",
            "jnz 3f",
            "add {at}, 128",
            "cmp {at}, {end}",
            "jne 2b",
            "3:",
            "setz {zero}",
            at = inout(reg) addr => _,
            end = in(reg) end,
            bits = out(ymm_reg) _,
            zero = lateout(reg_byte) zero,
            options(nostack, readonly),
        );
    }
    zero != 0
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pages::memory::PageRange;
    use crate::testing::TestMemory;

    fn ways() -> Vec<(&'static str, Look)> {
        let mut ways: Vec<(&'static str, Look)> = vec![("portable", portable), ("chosen", is_zero)];
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            ways.push(("avx2", |addr, len_bytes| unsafe { avx2(addr, len_bytes) }));
        } else {
            eprintln!("avx2 skipped, because this CPU does not have it");
        }
        ways
    }

    /// Whether a page looks zero.
    fn looks_zero(look: Look, memory: &TestMemory, first_page: u64, pages: u32) -> bool {
        let range = PageRange { region: 0, first_page, pages };
        let span = memory.memory().span(range).unwrap();
        // SAFETY: whole pages of a mapping.
        unsafe { look(span.addr, span.len_bytes) }
    }

    #[test]
    fn every_single_byte_is_seen() {
        let memory = TestMemory::new(&[3]);
        for (name, look) in ways() {
            assert!(looks_zero(look, &memory, 1, 1), "{name}: zero");
            for byte in 0..4096 {
                let mut page = vec![0; 4096];
                page[byte] = 0x80;
                memory.write(0, 1, &page);
                assert!(!looks_zero(look, &memory, 1, 1), "{name}: byte {byte} was not seen");
            }
            // Neighbours do not count.
            memory.write(0, 1, &[0; 4096]);
            memory.write(0, 0, &[1; 4096]);
            memory.write(0, 2, &[1; 4096]);
            assert!(looks_zero(look, &memory, 1, 1), "{name}: neighbours");
        }
    }

    #[test]
    fn pages_alike_are_counted_up_to_the_first_that_differs() {
        let memory = TestMemory::new(&[40]);
        for data in [1, 2, 9, 10, 30] {
            memory.fill_page(0, data, 7);
        }
        let count = |first_page: u32| {
            let pages = 40 - first_page;
            let range = PageRange { region: 0, first_page: first_page.into(), pages };
            let span = memory.memory().span(range).unwrap();
            // SAFETY: whole pages of a mapping.
            unsafe { alike(span.addr, span.len_bytes) }
        };
        let found: Vec<_> = [0, 1, 3, 9, 11, 30, 31, 39].into_iter().map(count).collect();
        let expected = [
            (1, true),
            (2, false),
            (6, true),
            (2, false),
            (19, true),
            (1, false),
            (9, true),
            (1, true),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn spans_of_several_pages_are_looked_at_to_the_end() {
        let memory = TestMemory::new(&[8]);
        for (name, look) in ways() {
            assert!(looks_zero(look, &memory, 0, 8), "{name}");
            memory.fill_page(0, 7, 1);
            assert!(!looks_zero(look, &memory, 0, 8), "{name}");
            memory.write(0, 7, &[0; 4096]);
        }
    }
}
