//! TLS, as the connections of a link have it.

mod config;
pub(crate) mod kernel;
mod session;
mod shared_key;
mod words;

pub(crate) use config::{ClientTls, ServerTls};
pub(crate) use session::{Broken, Session, Stage};
pub(crate) use words::words;

/// What the first byte of a connection is that begins with a TLS handshake (RFC 8446, section 5.1).
pub(crate) const HANDSHAKE_BYTE: u8 = 22;
