//! What is in the x87, SSE and AVX registers, and whether it is still there: a pattern, or what the
//! `fpu` workload has computed.
//!
//! The registers are handled as KVM has them: the uncompacted XSAVE layout, in 32-bit words.

use crate::workload::arithmetic::Registers;
use crate::workload::contents::vector_word;

/// XSAVE state components.
pub(crate) const X87: u64 = 1 << 0;
pub(crate) const SSE: u64 = 1 << 1;
pub(crate) const AVX: u64 = 1 << 2;

/// No component of its own, and always there.
const CONTROL: u64 = 1 << 63;

/// Words every KVM has.
pub(crate) const MIN_XSAVE_WORDS: usize = 1024;

const CONTROL_WORD_BYTES: usize = 0;
const STATUS_WORD_BYTES: usize = 2;
/// Abridged: one bit a register.
const TAG_WORD_BYTES: usize = 4;
const MXCSR_BYTES: usize = 24;
const X87_STACK_BYTES: usize = 32;
const XMM_BYTES: usize = 160;
const XSTATE_BV_BYTES: usize = 512;
/// Fixed by all processors that have AVX, and by KVM where they don't agree.
const YMM_HIGH_BYTES: usize = 576;

/// All exceptions masked, 64 bits of mantissa, to nearest.
const CONTROL_WORD: u16 = 0x037f;
/// All exceptions masked, to nearest.
const MXCSR: u32 = 0x1f80;
const MXCSR_ROUND_DOWN: u32 = 1 << 13;
/// Number of the register that is ST0.
const STATUS_WORD_TOP_SHIFT: u32 = 11;

/// A piece of the pattern.
struct Piece {
    name: String,
    component: u64,
    offset_bytes: usize,
    bytes: Vec<u8>,
}

/// XSAVE contents with the pattern in the components named.
pub(crate) fn pattern(seed: u64, vcpu: u8, components: u64) -> Vec<u32> {
    let control = controls(0, MXCSR);
    area(components, control.into_iter().chain(pieces(seed, vcpu)))
}

/// XSAVE contents of these registers.
pub(crate) fn computed(registers: &Registers) -> Vec<u32> {
    area(X87 | SSE | AVX, computed_pieces(registers))
}

/// Fails with what differs first, if the contents are not of these registers.
pub(crate) fn check(registers: &Registers, xsave: &[u32]) -> Result<(), String> {
    let mut area: Vec<u8> = xsave.iter().flat_map(|word| word.to_le_bytes()).collect();
    // The rest of the status word says what the last instruction met with.
    if let Some(high_byte) = area.get_mut(STATUS_WORD_BYTES + 1) {
        *high_byte &= 0b11_1000;
    }
    if let Some(low_byte) = area.get_mut(STATUS_WORD_BYTES) {
        *low_byte = 0;
    }
    for Piece { name, offset_bytes, bytes, .. } in computed_pieces(registers) {
        let found = area.get(offset_bytes..offset_bytes + bytes.len()).unwrap_or_default();
        if found != bytes {
            return Err(format!("{name} holds {found:02x?}, expected {bytes:02x?}"));
        }
    }
    Ok(())
}

fn area(components: u64, pieces: impl Iterator<Item = Piece>) -> Vec<u32> {
    let mut area = vec![0u8; MIN_XSAVE_WORDS * 4];
    let mut put = |offset: usize, bytes: &[u8]| {
        area[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(XSTATE_BV_BYTES, &components.to_le_bytes());
    for piece in pieces.filter(|piece| piece.component & (components | CONTROL) != 0) {
        put(piece.offset_bytes, &piece.bytes);
    }
    area.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect()
}

fn controls(top: u8, mxcsr: u32) -> [Piece; 4] {
    let piece = |name: &str, offset_bytes, bytes: &[u8]| Piece {
        name: name.to_owned(),
        component: CONTROL,
        offset_bytes,
        bytes: bytes.to_vec(),
    };
    let status = u16::from(top) << STATUS_WORD_TOP_SHIFT;
    [
        piece("the x87 control word", CONTROL_WORD_BYTES, &CONTROL_WORD.to_le_bytes()),
        piece("the x87 status word", STATUS_WORD_BYTES, &status.to_le_bytes()),
        piece("the x87 tag word", TAG_WORD_BYTES, &[0xff]),
        piece("MXCSR", MXCSR_BYTES, &mxcsr.to_le_bytes()),
    ]
}

fn computed_pieces(registers: &Registers) -> impl Iterator<Item = Piece> {
    let controls = controls(registers.top, MXCSR | MXCSR_ROUND_DOWN);
    let vectors = registers.ymm.iter().enumerate().flat_map(|(n, lanes)| {
        let bytes = lanes.map(|lane| lane.to_bits().to_le_bytes()).concat();
        let (low, high) = bytes.split_at(16);
        [(SSE, XMM_BYTES, low, "lower"), (AVX, YMM_HIGH_BYTES, high, "upper")].map(
            |(component, base, bytes, half)| Piece {
                name: format!("the {half} half of ymm{n}"),
                component,
                offset_bytes: base + 16 * n,
                bytes: bytes.to_vec(),
            },
        )
    });
    let stack = registers.stack.iter().enumerate().map(|(n, value)| Piece {
        name: format!("st{n}"),
        component: X87,
        offset_bytes: X87_STACK_BYTES + 16 * n,
        bytes: extended(*value).to_vec(),
    });
    controls.into_iter().chain(vectors).chain(stack)
}

/// An integer as an 80-bit floating point number.
fn extended(value: u64) -> [u8; 10] {
    const EXPONENT_OF_BIT_63: u16 = 16_383 + 63;
    let mut bytes = [0; 10];
    if value != 0 {
        let shift = value.leading_zeros();
        let exponent = EXPONENT_OF_BIT_63 - u16::try_from(shift).unwrap_or_default();
        bytes[..8].copy_from_slice(&(value << shift).to_le_bytes());
        bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    }
    bytes
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
        name: String::new(),
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
    fn every_bit_of_computed_registers_counts() {
        let registers = Registers::at(5, 1, 1_000, 0);
        let whole = computed(&registers);
        check(&registers, &whole).unwrap();
        assert!(check(&Registers::at(5, 1, 1_001, 0), &whole).is_err());
        assert!(check(&Registers::at(5, 1, 1_000, 1), &whole).is_err());
        assert!(check(&Registers::at(5, 0, 1_000, 0), &whole).is_err());
        let stack = (0..8).flat_map(|n| (0..10).map(move |byte| X87_STACK_BYTES + 16 * n + byte));
        let vectors = (XMM_BYTES..XMM_BYTES + 256).chain(YMM_HIGH_BYTES..YMM_HIGH_BYTES + 256);
        let controls = [CONTROL_WORD_BYTES, STATUS_WORD_BYTES + 1, TAG_WORD_BYTES, MXCSR_BYTES + 1];
        for byte in stack.chain(vectors).chain(controls) {
            let mut damaged = whole.clone();
            damaged[byte / 4] ^= 0x20 << (8 * (byte % 4));
            assert!(check(&registers, &damaged).is_err(), "byte {byte}");
        }
    }

    #[test]
    fn integers_have_the_bits_of_extended_doubles() {
        assert_eq!(extended(0), [0; 10]);
        assert_eq!(extended(1), [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        assert_eq!(extended(u64::MAX), [255, 255, 255, 255, 255, 255, 255, 255, 0x3e, 0x40]);
    }

    #[test]
    fn a_short_area_is_not_intact() {
        assert!(!intact(5, 1, AVX, &[0; 10]));
    }
}
