//! What the two sides say to each other on the control channel.
//!
//! Sans-I/O: messages are encoded to and decoded from byte strings ([`Message`]), and the
//! handshake is a function of two values ([`negotiate`]). Decoding is total: any bytes give a
//! message or a [`DecodeError`]. Who may say what and when is a table, which each side holds the
//! other to ([`Conversation`]). Byte diagrams and the table: `docs/protocol.md`.

mod codec;
mod confirmation;
mod conversation;
mod greeting;
mod handshake;
mod key;
mod kind;
mod message;
mod table;

use thiserror::Error;

pub use confirmation::check_arriving;
pub use conversation::{Conversation, Refusal, Why};
pub use greeting::{
    Hello, MAX_DESCRIPTION_BYTES, MAX_HELLO_BYTES, MAX_STATE_SCHEMA_BYTES, Rejoin, Rejoined,
    Welcome,
};
pub use handshake::{Agreement, Incompatibility, negotiate};
pub use key::{MigrationId, MigrationKey};
pub use kind::{Kind, Side};
pub use message::{
    FailureReason, MAX_DATA_RANGES, MAX_DEVICE_STATE_BYTES, MAX_SAMPLES, MAX_STATE_CHUNK_BYTES,
    MAX_TEXT_BYTES, Message, PageSample, Prepare, Prepared,
};
pub use table::{Stage, table};

use crate::pages::memory::LayoutError;

/// The protocol version this engine speaks. Both sides offer a range and take the highest
/// common one.
pub const PROTOCOL_VERSION: u16 = 1;

/// The oldest protocol version this engine speaks.
pub const OLDEST_PROTOCOL_VERSION: u16 = 1;

/// Whether a version range meets ours.
fn speaks_ours(oldest: u16, newest: u16) -> bool {
    oldest.max(OLDEST_PROTOCOL_VERSION) <= newest.min(PROTOCOL_VERSION)
}

/// Why bytes are no message.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end inside a field.
    #[error("message ends inside its field {field}")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// Bytes are left after the last field.
    #[error("{extra} bytes after the end of the message")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// Unknown message type.
    #[error("unknown message type {0}")]
    UnknownType(u16),
    /// A length or count is over its bound.
    #[error("field {field} has length {len}, at most {max} is allowed")]
    TooLong {
        /// The field.
        field: &'static str,
        /// What it says.
        len: u32,
        /// The bound.
        max: usize,
    },
    /// A field has a value that its type does not know.
    #[error("field {field} has the unknown value {value}")]
    UnknownValue {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
    /// Text that is not UTF-8.
    #[error("field {field} is not UTF-8")]
    NotText {
        /// The field.
        field: &'static str,
    },
    /// A memory map that makes no sense.
    #[error("memory map makes no sense")]
    Layout(#[from] LayoutError),
    /// Another message where a greeting is due.
    #[error("message of type {0} where a greeting is due")]
    NoGreeting(u16),
    /// A greeting of a version this engine does not speak.
    #[error("protocol versions {oldest} to {newest} are not spoken here")]
    Version {
        /// Oldest version of the peer.
        oldest: u16,
        /// Newest version of the peer.
        newest: u16,
    },
    /// The greeting does not begin with the protocol's magic.
    #[error("not a pageferry peer: greeting begins with {0:02x?}")]
    BadMagic([u8; 8]),
}
