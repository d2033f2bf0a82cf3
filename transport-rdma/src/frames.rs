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
//! |4 |  records of TLS: of the handshake, then each of these, sealed
//! +--+
//! ```
//!
//! left: bytes of the frame from this message on, little-endian; so the first message of a frame
//! has its length. Marks say that somebody is there, and nothing else.

use pageferry::transport::{MAX_FRAME_BYTES, TransportError};

use crate::pipe::SLOT_BYTES;

pub(crate) const PIECE: u8 = 1;
pub(crate) const END: u8 = 2;
pub(crate) const REFUSED: u8 = 3;
pub(crate) const SEALED: u8 = 4;
pub(crate) const HEAD_BYTES: usize = 5;
/// Most bytes of a frame in one message: its record fits into one too (RFC 8446, section 5.2).
pub(crate) const PIECE_BYTES: usize = SLOT_BYTES - HEAD_BYTES - SEAL_BYTES;
/// What stands for a record, its header, the kind of what is in it, and the code that it ends with.
const SEAL_BYTES: usize = 1 + 5 + 1 + 16;

/// Why a source is turned away, as it will be shown on a terminal.
pub(crate) fn shown(reason: &[u8]) -> String {
    let reason = String::from_utf8_lossy(reason);
    reason.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

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
