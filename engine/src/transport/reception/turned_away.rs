//! What who is turned away hears.

use thiserror::Error;

/// Why a source is not served, or not any more. Every transport tells it in these words
/// ([`TransportError::Refused`](crate::transport::TransportError)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TurnedAway {
    /// Another one keeps its place.
    #[error("another migration is being served")]
    Busy,
    /// Another one has the place, and there is no room for more that wait.
    #[error("another migration is being served, and too many wait")]
    Crowded,
    /// It had the place, and has lost it.
    #[error("no answer to the welcome, and another source waits")]
    Displaced,
    /// A connection for a migration that is not served here.
    #[error("no migration with this id is being served")]
    Unknown,
}
