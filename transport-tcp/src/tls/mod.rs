//! TLS, as the connections of a link have it.

pub(crate) mod kernel;
mod session;

pub(crate) use session::{Broken, Session, Stage};

/// What the first byte of a connection is that begins with a TLS handshake (RFC 8446, section 5.1).
pub(crate) const HANDSHAKE_BYTE: u8 = 22;
