//! How frames of the control connection are told apart: by their length, which comes first.
//!
//! | offset | bytes | field                                        |
//! |-------:|------:|----------------------------------------------|
//! |      0 |     4 | length, 1 to `MAX_FRAME_BYTES`, little-endian |
//! |      4 |     … | the frame                                    |
//!
//! A length of 0 of the destination says that it does not serve this source, or no longer. An answer as to a
//! preamble follows, which says why, and nothing more.

use crate::preamble::{ANSWER_BYTES, Answer};

pub(crate) const LENGTH_BYTES: usize = 4;

/// What a source that was let in hears when it is turned away.
pub(crate) fn refusal(answer: &Answer) -> [u8; LENGTH_BYTES + ANSWER_BYTES] {
    let mut bytes = [0; LENGTH_BYTES + ANSWER_BYTES];
    bytes[LENGTH_BYTES..].copy_from_slice(&answer.encode());
    bytes
}
