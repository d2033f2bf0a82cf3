//! What goes wrong on a link.

use std::io;
use std::time::Duration;

use thiserror::Error;

use super::stream::StreamError;
use crate::pages::memory::OutOfRange;

/// What went wrong on a link, by what the caller can do about it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The other side could not be reached or found.
    #[error("failed to connect to {address}")]
    Connect {
        /// Where to.
        address: String,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The address to listen on could not be had.
    #[error("failed to listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The other side answered, and said no.
    #[error("refused by {address}: {reason}")]
    Refused {
        /// Who refused.
        address: String,
        /// Its words.
        reason: String,
    },
    /// There is no secure connection: one of the two does not prove who it is, or takes no plain text, or what it
    /// needs for that is not there.
    #[error("no secure connection with {address}: {reason}")]
    Security {
        /// With whom.
        address: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The link was lost: reset, closed in the middle, or dead for too long.
    #[error("link lost while trying to {operation}")]
    Lost {
        /// What was being done.
        operation: &'static str,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The other side closed the link in an orderly way.
    #[error("closed by the other side")]
    Closed,
    /// The other side sent something that no peer of this protocol sends.
    #[error("malformed data from the other side")]
    Malformed(#[source] StreamError),
    /// The other side broke the rules of a transport that has a wire format of its own.
    #[error("the other side sent {0}")]
    Violation(&'static str),
    /// Nothing came within the time given.
    #[error("timed out after {} while trying to {operation}", rounded(*after))]
    TimedOut {
        /// What was being done.
        operation: &'static str,
        /// How long it was tried.
        after: Duration,
    },
    /// At the destination: the source has lost its place to another one, or has come back on another link.
    #[error(
        "displaced: its source came back, or did not answer its welcome while another one waited"
    )]
    Displaced,
    /// [`Interrupt::interrupt`](super::Interrupt::interrupt) was called.
    #[error("interrupted")]
    Interrupted,
    /// A batch or frame breaks this side's own limits ([`Capabilities`](super::Capabilities), [`MAX_FRAME_BYTES`](super::MAX_FRAME_BYTES)).
    #[error("{what} of {size} exceeds the limit of {limit}")]
    TooLarge {
        /// What was too large.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A run is not inside guest memory.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// A stage was skipped: data channels before registration, say.
    #[error("used out of order: {0}")]
    OutOfOrder(&'static str),
    /// This transport has no such thing ([`Capabilities`](super::Capabilities) say so beforehand).
    #[error("this transport has no {0}")]
    Unsupported(&'static str),
    /// Guest memory could not be registered.
    #[error("failed to register guest memory: {advice}")]
    Register {
        /// Which limit, and what to set.
        advice: String,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The machine refused something else.
    #[error("failed to {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The cause.
        #[source]
        cause: io::Error,
    },
}

/// A time as people name it: what is left of a limit has nanoseconds.
pub(crate) fn rounded(time: Duration) -> String {
    let millis = Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    if millis.is_zero() { format!("{time:?}") } else { format!("{millis:?}") }
}

impl From<StreamError> for TransportError {
    /// What was changed on the way is the way's fault, and not the peer's.
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Damaged(_) => {
                let cause = io::Error::new(io::ErrorKind::InvalidData, error);
                Self::Lost { operation: "take what the other side sent", cause }
            }
            error => Self::Malformed(error),
        }
    }
}
