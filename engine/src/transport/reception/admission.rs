//! What a source must have said for an acceptor to serve it.

use crate::control::protocol::{DecodeError, check_arriving};

pub use crate::control::protocol::MAX_HELLO_BYTES as MAX_GREETING_BYTES;

/// Whom an acceptor serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Admission {
    /// Who has greeted: the first control frame is a whole *hello*, of whatever version, or a whole *rejoin*.
    /// Whoever has not keeps nobody out.
    #[default]
    Greeted,
    /// Whoever connects, as soon as it has said what the connection is for. For hosts that use a
    /// transport by itself, and have a protocol of their own.
    Anyone,
}

/// Looks at the first bytes of a source's first control frame, which will have `frame_bytes` in all: they
/// may become a greeting, or are one if they are all there. Else it is no use to wait for more.
pub fn check_greeting(bytes: &[u8], frame_bytes: usize) -> Result<(), DecodeError> {
    check_arriving(bytes, frame_bytes)
}
