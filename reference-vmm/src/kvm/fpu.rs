//! A pattern in the x87, SSE and AVX registers, and whether it is still there.
//!
//! The registers are handled as KVM has them: the uncompacted XSAVE layout, in 32-bit words.

use crate::workload::contents::vector_word;

/// XSAVE state components.
pub(crate) const X87: u64 = 1 << 0;
pub(crate) const SSE: u64 = 1 << 1;
pub(crate) const AVX: u64 = 1 << 2;

/// Words every KVM has.
pub(crate) const MIN_XSAVE_WORDS: usize = 1024;

const CONTROL_WORD_BYTES: usize = 0;
/// Abridged: one bit a register.
const TAG_WORD_BYTES: usize = 4;
const MXCSR_BYTES: usize = 24;
const X87_STACK_BYTES: usize = 32;
const XMM_BYTES: usize = 160;
const XSTATE_BV_BYTES: usize = 512;
/// Fixed by all processors that have AVX, and by KVM where they don't agree.
const YMM_HIGH_BYTES: usize = 576;

/// A piece of the pattern.
struct Piece {
    component: u64,
    offset_bytes: usize,
    bytes: Vec<u8>,
}

/// XSAVE contents with the pattern in the components named.
pub(crate) fn pattern(seed: u64, vcpu: u8, components: u64) -> Vec<u32> {
    let mut area = vec![0u8; MIN_XSAVE_WORDS * 4];
    let mut put = |offset: usize, bytes: &[u8]| {
        area[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(CONTROL_WORD_BYTES, &0x037f_u16.to_le_bytes());
    put(TAG_WORD_BYTES, &[0xff]);
    put(MXCSR_BYTES, &0x1f80_u32.to_le_bytes());
    put(XSTATE_BV_BYTES, &components.to_le_bytes());
    for piece in pieces(seed, vcpu).filter(|piece| piece.component & components != 0) {
        put(piece.offset_bytes, &piece.bytes);
    }
    area.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect()
}

/// Whether the contents hold the pattern in all the components named.
pub(crate) fn intact(seed: u64, vcpu: u8, components: u64, xsave: &[u32]) -> bool {
    missing(seed, vcpu, components, xsave) == 0
}

/// The components named that don't hold their pattern.
pub(crate) fn missing(seed: u64, vcpu: u8, components: u64, xsave: &[u32]) -> u64 {
    let area: Vec<u8> = xsave.iter().flat_map(|word| word.to_le_bytes()).collect();
    pieces(seed, vcpu)
        .filter(|piece| piece.component & components != 0)
        .filter(|piece| {
            let end = piece.offset_bytes + piece.bytes.len();
            area.get(piece.offset_bytes..end) != Some(&piece.bytes)
        })
        .fold(0, |missing, piece| missing | piece.component)
}

fn pieces(seed: u64, vcpu: u8) -> impl Iterator<Item = Piece> {
    let register = move |first_word: u64, len: usize| {
        let words = [first_word, first_word + 1].map(|word| vector_word(seed, vcpu, word));
        let mut bytes = words.map(u64::to_le_bytes).concat();
        bytes.truncate(len);
        bytes
    };
    let xmm = (0..16).map(move |n| (SSE, XMM_BYTES, n, 0, 16));
    let ymm_high = (0..16).map(move |n| (AVX, YMM_HIGH_BYTES, n, 32, 16));
    let x87 = (0..8).map(move |n| (X87, X87_STACK_BYTES, n, 64, 10));
    xmm.chain(ymm_high).chain(x87).map(move |(component, base, n, first_word, len)| Piece {
        component,
        offset_bytes: base + 16 * n,
        bytes: register(first_word + 2 * n as u64, len),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_counts() {
        let whole = pattern(5, 1, X87 | SSE | AVX);
        assert!(intact(5, 1, X87 | SSE | AVX, &whole));
        assert!(!intact(5, 0, X87 | SSE | AVX, &whole));
        assert!(!intact(6, 1, SSE, &whole));
        for (component, word) in [(X87, 32 / 4), (SSE, 160 / 4), (SSE, 415 / 4), (AVX, 576 / 4)] {
            let mut damaged = whole.clone();
            damaged[word] ^= 1;
            assert_eq!(missing(5, 1, X87 | SSE | AVX, &damaged), component);
        }
    }

    #[test]
    fn a_short_area_is_not_intact() {
        assert!(!intact(5, 1, AVX, &[0; 10]));
    }
}
