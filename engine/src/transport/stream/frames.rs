//! Control frames, each behind a header that tells them apart and whether they are as they were sent:
//!
//! | offset | bytes | field                                                     |
//! |-------:|------:|-----------------------------------------------------------|
//! |      0 |     4 | length of the frame, 1 to [`MAX_FRAME_BYTES`]             |
//! |      4 |     4 | CRC-32 (IEEE 802.3) of the frame                         |
//! |      8 |     4 | CRC-32 of these eight bytes                               |
//! |     12 |     … | the frame                                                 |
//!
//! The header has a checksum of its own, so that nobody waits for a frame of a length that was never sent.

use super::{StreamError, sum};
use crate::transport::MAX_FRAME_BYTES;

/// Length of what is before a control frame in bytes.
pub const FRAME_HEADER_BYTES: usize = 12;

const SUM_AT: usize = 4;
const HEADER_SUM_AT: usize = 8;

/// What is before a control frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Length of the frame in bytes: anything, until it is [checked](Self::frame_bytes).
    pub length: u32,
    sum: u32,
}

impl FrameHeader {
    /// Of a frame, of no more than [`MAX_FRAME_BYTES`].
    pub fn of(frame: &[u8]) -> Self {
        Self::with_length(u32::try_from(frame.len()).unwrap_or(u32::MAX), frame)
    }

    /// Of bytes that are no frame, which the length says then.
    pub fn with_length(length: u32, bytes: &[u8]) -> Self {
        Self { length, sum: sum(bytes) }
    }

    /// As bytes.
    pub fn encode(self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[..SUM_AT].copy_from_slice(&self.length.to_le_bytes());
        bytes[SUM_AT..HEADER_SUM_AT].copy_from_slice(&self.sum.to_le_bytes());
        let header_sum = sum(&bytes[..HEADER_SUM_AT]);
        bytes[HEADER_SUM_AT..].copy_from_slice(&header_sum.to_le_bytes());
        bytes
    }

    /// From bytes, of which it is only known that they are as they were sent.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, StreamError> {
        let field = |at: usize| {
            let field = bytes[at..].first_chunk().copied();
            u32::from_le_bytes(field.unwrap_or_default())
        };
        if field(HEADER_SUM_AT) != sum(&bytes[..HEADER_SUM_AT]) {
            return Err(StreamError::Damaged("the header of a control frame"));
        }
        Ok(Self { length: field(0), sum: field(SUM_AT) })
    }

    /// The length of the frame, if there may be such a frame.
    pub fn frame_bytes(&self) -> Result<usize, StreamError> {
        match usize::try_from(self.length) {
            Ok(length @ 1..=MAX_FRAME_BYTES) => Ok(length),
            _ => Err(StreamError::FrameLength(self.length)),
        }
    }

    /// Whether these are the bytes that were sent behind it.
    pub fn check(&self, bytes: &[u8]) -> Result<(), StreamError> {
        if self.sum == sum(bytes) { Ok(()) } else { Err(StreamError::Damaged("a control frame")) }
    }
}
