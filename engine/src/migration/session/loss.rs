//! What is lost with a link, and what with the other side.

use super::patience::OF_THE_LINK;
use crate::error::Error;
use crate::transport::TransportError;

/// Whether it may be the link's fault alone, so that the migration could go on over another one. A link that somebody
/// interrupted is one that is lost: who wants the migration to end says so.
pub(crate) fn is_of_the_link(error: &Error) -> bool {
    match error {
        Error::Transport(error) => matches!(
            error,
            TransportError::Lost { .. }
                | TransportError::Closed
                | TransportError::Displaced
                | TransportError::Interrupted
                | TransportError::TimedOut { .. }
                | TransportError::Connect { .. }
                | TransportError::Refused { .. }
                // Somebody on the way, or a certificate that is just being replaced.
                | TransportError::Security { .. }
        ),
        Error::TimedOut { what, .. } => OF_THE_LINK.contains(what),
        _ => false,
    }
}
