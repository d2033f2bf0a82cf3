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

use crate::memory::{HostSpan, PAGE_BYTES};

/// A way to look. Called with spans of whole pages at page boundaries that are mapped.
type Look = unsafe fn(HostSpan) -> bool;

/// Whether all bytes of a span are zero, by the fastest way this CPU has.
///
/// # Safety
///
/// The span is readable, made of whole pages, and begins at a page boundary.
pub(crate) unsafe fn is_zero(span: HostSpan) -> bool {
    static LOOK: OnceLock<Look> = OnceLock::new();
    debug_assert!((span.addr.addr() as u64).is_multiple_of(PAGE_BYTES));
    debug_assert!((span.len_bytes as u64).is_multiple_of(PAGE_BYTES));
    let look = *LOOK.get_or_init(fastest);
    // SAFETY: the caller's promise is what every way asks for.
    unsafe { look(span) }
}

fn fastest() -> Look {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // The closure is what makes an unsafe function of a target feature one without.
        // SAFETY: the CPU has AVX2, as was just seen; the rest is the caller's promise.
        return |span| unsafe { avx2(span) };
    }
    portable
}

/// Word by word, eight at a time.
unsafe fn portable(span: HostSpan) -> bool {
    const AT_ONCE: usize = 8;
    let words = span.len_bytes / size_of::<u64>();
    #[expect(clippy::cast_ptr_alignment, reason = "spans start at page boundaries")]
    let first = span.addr.cast::<u64>();
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
unsafe fn avx2(span: HostSpan) -> bool {
    let zero: u8;
    let end = span.addr.wrapping_add(span.len_bytes);
    if span.len_bytes == 0 {
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
            at = inout(reg) span.addr => _,
            end = in(reg) end,
            bits = out(ymm_reg) _,
            zero = lateout(reg_byte) zero,
            options(nostack, readonly),
        );
    }
    zero != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageRange;
    use crate::testing::TestMemory;

    fn ways() -> Vec<(&'static str, Look)> {
        let mut ways: Vec<(&'static str, Look)> = vec![("portable", portable), ("chosen", is_zero)];
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            ways.push(("avx2", |span| unsafe { avx2(span) }));
        } else {
            eprintln!("avx2 skipped, because this CPU does not have it");
        }
        ways
    }

    #[test]
    fn every_single_byte_is_seen() {
        let memory = TestMemory::new(&[3]);
        let span = memory.memory().span(PageRange { region: 0, first_page: 1, pages: 1 }).unwrap();
        for (name, look) in ways() {
            // SAFETY: a page of a mapping.
            assert!(unsafe { look(span) }, "{name}: zero");
            for byte in 0..4096 {
                let mut page = vec![0; 4096];
                page[byte] = 0x80;
                memory.write(0, 1, &page);
                // SAFETY: a page of a mapping.
                assert!(!unsafe { look(span) }, "{name}: byte {byte} was not seen");
            }
            // Neighbours do not count.
            memory.write(0, 1, &[0; 4096]);
            memory.write(0, 0, &[1; 4096]);
            memory.write(0, 2, &[1; 4096]);
            // SAFETY: a page of a mapping.
            assert!(unsafe { look(span) }, "{name}: neighbours");
        }
    }

    #[test]
    fn spans_of_several_pages_are_looked_at_to_the_end() {
        let memory = TestMemory::new(&[8]);
        let span = memory.memory().span(PageRange { region: 0, first_page: 0, pages: 8 }).unwrap();
        for (name, look) in ways() {
            // SAFETY: pages of a mapping.
            assert!(unsafe { look(span) }, "{name}");
            memory.fill_page(0, 7, 1);
            // SAFETY: pages of a mapping.
            assert!(!unsafe { look(span) }, "{name}");
            memory.write(0, 7, &[0; 4096]);
        }
    }
}
