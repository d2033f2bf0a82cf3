//! Bit runs in words: a bitmap whose bit 0 is not bit 0 of the other.
//!
//! A memory slot may begin at any page of a region, while both KVM and the engine count in
//! words from their own start.

use pageferry::dirty::WORD_PAGES;

/// Adds `pages` bits of `from`, beginning with its bit 0, to `into`, beginning with bit `first`.
/// What does not fit into `into` is left out.
pub(crate) fn merge_at(into: &mut [u64], first: u64, from: &[u64], pages: u64) {
    let mut left = pages;
    for (index, word) in (0..).zip(from) {
        if left == 0 {
            break;
        }
        let bits = word & low_bits(left);
        left = left.saturating_sub(WORD_PAGES);
        if bits == 0 {
            continue;
        }
        let at = first + index * WORD_PAGES;
        let shift = at % WORD_PAGES;
        or_word(into, at / WORD_PAGES, bits << shift);
        if shift != 0 {
            or_word(into, at / WORD_PAGES + 1, bits >> (WORD_PAGES - shift));
        }
    }
}

/// The 64 bits of `words` from bit `first` on; bits before 0 and past the end are clear.
pub(crate) fn word_at(words: &[u64], first: i64) -> u64 {
    // Both are non-negative by construction of div_euclid and rem_euclid with 64.
    let shift = u32::try_from(first.rem_euclid(64)).unwrap_or(0);
    let index = first.div_euclid(64);
    let low = word(words, index) >> shift;
    let high = if shift == 0 { 0 } else { word(words, index + 1) << (u64::BITS - shift) };
    low | high
}

/// Sets the bits `first..end`; those past the end of `into` are left out.
pub(crate) fn set_range(into: &mut [u64], first: u64, end: u64) {
    let mut at = first;
    while at < end {
        let next = (at / WORD_PAGES + 1) * WORD_PAGES;
        let bits = low_bits(end.min(next) - at) << (at % WORD_PAGES);
        or_word(into, at / WORD_PAGES, bits);
        at = next;
    }
}

/// Words that hold `pages` bits.
pub(crate) fn words_for(pages: u64) -> usize {
    // Memory that is mapped in this process has fewer pages than usize can count.
    usize::try_from(pages.div_ceil(WORD_PAGES)).unwrap_or(usize::MAX)
}

fn low_bits(count: u64) -> u64 {
    if count >= WORD_PAGES { u64::MAX } else { (1 << count) - 1 }
}

fn or_word(into: &mut [u64], index: u64, bits: u64) {
    if bits != 0
        && let Some(word) = usize::try_from(index).ok().and_then(|index| into.get_mut(index))
    {
        *word |= bits;
    }
}

fn word(words: &[u64], index: i64) -> u64 {
    usize::try_from(index).ok().and_then(|index| words.get(index)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bit(words: &[u64], at: u64) -> bool {
        words[usize::try_from(at / 64).unwrap()] >> (at % 64) & 1 == 1
    }

    proptest! {
        #[test]
        fn merge_moves_each_bit_by_the_offset(
            from in prop::collection::vec(any::<u64>(), 0..6),
            first in 0..300_u64,
            pages in 0..400_u64,
        ) {
            let mut into = vec![0; 12];
            merge_at(&mut into, first, &from, pages);
            let end = pages.min(from.len() as u64 * 64);
            for at in 0..12 * 64_u64 {
                let source = at.checked_sub(first).filter(|at| *at < end);
                prop_assert_eq!(bit(&into, at), source.is_some_and(|source| bit(&from, source)));
            }
        }

        #[test]
        fn word_at_reads_any_offset(
            words in prop::collection::vec(any::<u64>(), 0..4),
            first in -130..300_i64,
        ) {
            let word = word_at(&words, first);
            for offset in 0..64 {
                let source = u64::try_from(first + offset).ok();
                let source = source.filter(|at| *at < words.len() as u64 * 64);
                let expected = source.is_some_and(|source| bit(&words, source));
                prop_assert_eq!(word >> offset & 1 == 1, expected);
            }
        }

        #[test]
        fn set_range_sets_just_the_range(first in 0..300_u64, len in 0..300_u64) {
            let mut words = vec![0; 10];
            set_range(&mut words, first, first + len);
            for at in 0..640 {
                prop_assert_eq!(bit(&words, at), (first..first + len).contains(&at));
            }
        }
    }

    #[test]
    fn bits_past_the_end_are_left_out() {
        let mut words = [0; 1];
        merge_at(&mut words, 60, &[u64::MAX, u64::MAX], 128);
        assert_eq!(words, [0xf << 60]);
        set_range(&mut words, 0, 1000);
        assert_eq!(words, [u64::MAX]);
    }
}
