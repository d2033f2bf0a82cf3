//! Greetings as messages: whether one is arriving, and the digests by which each side knows that the other
//! heard it right.

use super::greeting::{MAX_HELLO_BYTES, START_BYTES};
use super::{DecodeError, Hello, Kind, Message, Welcome};
use crate::pages::digest::Digest;

/// Whether the first `bytes` of a message of `message_bytes` may become a source's first word on a link, a hello or a
/// *rejoin*, and are one if they are all of it. One of versions that are not spoken here is one too, as far as can be
/// told: who serves it says so. What comes in small pieces costs no more than what comes at
/// once: only its start is looked at, and then the whole.
pub fn check_arriving(bytes: &[u8], message_bytes: usize) -> Result<(), DecodeError> {
    if message_bytes > MAX_HELLO_BYTES {
        let len = u32::try_from(message_bytes).unwrap_or(u32::MAX);
        return Err(DecodeError::TooLong { field: "hello", len, max: MAX_HELLO_BYTES });
    }
    if let Some(&[low, high]) = bytes.get(..2) {
        let kind = u16::from_le_bytes([low, high]);
        if kind != Kind::Hello as u16 && kind != Kind::Rejoin as u16 {
            return Err(DecodeError::NoGreeting(kind));
        }
    }
    let whole = bytes.len() == message_bytes;
    let seen = if whole { bytes } else { &bytes[..bytes.len().min(START_BYTES)] };
    match Message::decode(seen) {
        Ok(_) | Err(DecodeError::Version { .. }) => Ok(()),
        Err(DecodeError::Truncated { .. }) if !whole => Ok(()),
        Err(error) => Err(error),
    }
}

impl Hello {
    /// Of all its bytes.
    pub(super) fn digest(&self) -> Digest {
        Digest::of_bytes(&[&Message::Hello(self.clone()).encode()])
    }
}

impl Welcome {
    /// With the digest of the greeting that `hello` began.
    #[must_use]
    pub fn to(self, hello: &Hello) -> Self {
        Self { greeting: self.digest(hello.digest()), ..self }
    }

    /// The digest of the greeting up to this answer, to a hello of that digest.
    pub(super) fn digest(&self, hello: Digest) -> Digest {
        Self { greeting: Digest::default(), ..*self }.confirmation(hello)
    }

    /// The digest of the whole greeting, as the source confirms it, after a hello of that digest.
    pub(super) fn confirmation(&self, hello: Digest) -> Digest {
        Digest::of_bytes(&[&hello.0, &Message::Welcome(*self).encode()])
    }

    /// The source's confirmation of this answer to `hello`.
    pub fn agreed(&self, hello: &Hello) -> Message {
        Message::Agreed { greeting: self.confirmation(hello.digest()) }
    }
}
