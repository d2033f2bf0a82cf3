//! What is said on a control channel. A frame goes as one message or several:
//!
//! ```text
//! 0  1     5
//! +--+-----+----------------
//! |1 |left | bytes of the frame
//! +--+-----+----------------
//! |2 |  the sender dropped its half in order
//! +--+
//! |3 |  text: the destination does not serve this source, or no longer
//! +--+
//! ```
//!
//! left: bytes of the frame from this message on, little-endian; so the first message of a frame
//! has its length. Marks say that somebody is there, and nothing else.

use pageferry::transport::{MAX_FRAME_BYTES, TransportError};

pub(crate) const PIECE: u8 = 1;
pub(crate) const END: u8 = 2;
pub(crate) const REFUSED: u8 = 3;
pub(crate) const HEAD_BYTES: usize = 5;

/// A frame as its pieces come.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
    left: usize,
}

impl Frame {
    /// What has come of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes that it will have.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.left
    }

    /// Takes a piece of it; true if that completes it.
    pub(crate) fn take_in(&mut self, message: &[u8]) -> Result<bool, TransportError> {
        let [PIECE, rest @ ..] = message else { return Err(OUT_OF_STEP) };
        let (left, bytes) = rest.split_first_chunk::<4>().ok_or(OUT_OF_STEP)?;
        let left = usize::try_from(u32::from_le_bytes(*left)).unwrap_or(usize::MAX);
        let due = if self.bytes.is_empty() { left } else { self.left };
        if left != due || left > MAX_FRAME_BYTES || bytes.is_empty() || bytes.len() > left {
            return Err(OUT_OF_STEP);
        }
        self.bytes.extend(bytes);
        self.left = left - bytes.len();
        Ok(self.left == 0)
    }

    /// The frame that is whole. The next one may come.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

const OUT_OF_STEP: TransportError =
    TransportError::Violation("pieces of control frames that do not fit together");
