//! Connections that have not said yet what they are for, and those that are being turned away.

use std::fmt;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use pageferry::transport::MigrationId;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::board::{Admitted, Board, Incoming, Speech, Unwanted};
use crate::preamble::{PREAMBLE_BYTES, Preamble, PreambleError, Status, check_start};

/// How long a refused connection may take to read why.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a source waits for one that is being served, before it is told to come later. Strangers
/// that get in are gone sooner than that; in the order in which they came, nobody is overtaken.
const TURN: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct HalfOpen {
    pub(crate) incoming: Incoming,
    pub(crate) deadline: Instant,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Preamble {
        bytes: [u8; PREAMBLE_BYTES],
        filled: usize,
    },
    /// A source that came while another one is served; told so when time is up.
    Waiting {
        preamble: Preamble,
        until: Instant,
    },
    /// Let in, and said nothing yet.
    Speechless(MigrationId),
    /// Answered and shut. Closing a socket with unread bytes in it sends a reset, which can
    /// destroy the answer before it is read: so read on until the other side has hung up.
    Refused,
}

impl HalfOpen {
    pub(crate) fn new(incoming: Incoming, deadline: Instant) -> Self {
        Self {
            incoming,
            deadline,
            phase: Phase::Preamble { bytes: [0; PREAMBLE_BYTES], filled: 0 },
        }
    }

    /// Goes on with what has come. `None` when the connection went to the board or is closed.
    pub(crate) fn advance(mut self, board: &Board) -> Option<Self> {
        let (bytes, filled) = match &mut self.phase {
            Phase::Preamble { bytes, filled } => (bytes, filled),
            Phase::Waiting { preamble, until } => {
                let (preamble, until) = (*preamble, *until);
                if let Err(errno) = self.incoming.speech() {
                    let peer = self.incoming.peer;
                    tracing::warn!(%peer, "closed a connection that waited for its turn: {errno}");
                    return None;
                }
                return self.submit(board, &preamble, until);
            }
            Phase::Speechless(id) => {
                let id = *id;
                return self.listen(board, id);
            }
            Phase::Refused => return self.discard(),
        };
        let room = &mut bytes[*filled..];
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.incoming.socket, &mut *room, RecvFlags::DONTWAIT)
        });
        let peer = self.incoming.peer;
        match received {
            Ok((_, 0)) => {
                tracing::warn!(%peer, "closed a connection: it ended within its preamble");
                return None;
            }
            Ok((_, received)) => *filled += received,
            Err(Errno::AGAIN) => return Some(self),
            Err(errno) => {
                tracing::warn!(%peer, "closed a connection: {errno}");
                return None;
            }
        }
        let judged = match check_start(&bytes[..*filled]) {
            Ok(()) if *filled < PREAMBLE_BYTES => return Some(self),
            Ok(()) => Preamble::decode(bytes),
            Err(error) => Err(error),
        };
        match judged {
            Ok(preamble) => self.submit(board, &preamble, Instant::now() + TURN),
            Err(error) => {
                let status = match error {
                    PreambleError::Version(_) => Status::Version,
                    _ => Status::Malformed,
                };
                let (incoming, reason) = (self.incoming, error.to_string());
                Some(Self::refuse(Unwanted { incoming, status, reason }))
            }
        }
    }

    /// Puts it on the board. If that has no room for another source it waits, at most until then.
    fn submit(self, board: &Board, preamble: &Preamble, until: Instant) -> Option<Self> {
        let with = |incoming, phase| Some(Self { incoming, deadline: self.deadline, phase });
        match board.admit(self.incoming, preamble) {
            Ok(Admitted::Done) => None,
            Ok(Admitted::Speechless(id, incoming)) => with(incoming, Phase::Speechless(id)),
            Err(Unwanted { status: Status::Busy, incoming, .. }) if Instant::now() < until => {
                with(incoming, Phase::Waiting { preamble: *preamble, until })
            }
            Err(unwanted) => Some(Self::refuse(unwanted)),
        }
    }

    /// Looks whether it speaks.
    fn listen(self, board: &Board, id: MigrationId) -> Option<Self> {
        match self.incoming.speech() {
            Ok(Speech::Something) => board.speaks(id, self.incoming),
            Ok(Speech::Nothing) => return Some(self),
            Err(errno) => {
                tracing::warn!(peer = %self.incoming.peer, "closed a connection: {errno}");
            }
        }
        None
    }

    /// Says why it is over, and gives the other side time to read it.
    fn refuse(Unwanted { incoming, status, reason }: Unwanted) -> Self {
        tracing::warn!(peer = %incoming.peer, ?status, "refused a connection: {reason}");
        // If the other side is gone, nobody misses the answer.
        let _ = incoming.answer(status, &reason);
        let _ = incoming.socket.shutdown(Shutdown::Write);
        Self { incoming, deadline: Instant::now() + FAREWELL, phase: Phase::Refused }
    }

    /// Reads what nobody wants.
    fn discard(self) -> Option<Self> {
        let mut unwanted = [0; 4096];
        match rustix::net::recv(&self.incoming.socket, &mut unwanted, RecvFlags::DONTWAIT) {
            Ok((_, 1..)) | Err(Errno::AGAIN | Errno::INTR) => Some(self),
            Ok((_, 0)) | Err(_) => None,
        }
    }

    /// Whether it waits for something else than its other side.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. })
    }

    /// Whether it still matters to its other side that it lives.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self.phase, Phase::Refused)
    }

    /// Closes it for a reason of this side.
    pub(crate) fn expire(self, why: Expiry) {
        let peer = self.incoming.peer;
        if let Phase::Speechless(_) | Phase::Waiting { .. } = self.phase {
            tracing::warn!(%peer, "closed a connection: {why}, and it was no source yet");
        }
        if let Phase::Preamble { filled, .. } = self.phase {
            tracing::warn!(
                %peer,
                "closed a connection: {why} after {filled} of {PREAMBLE_BYTES} bytes of its preamble"
            );
            // A source whose connection is held up on the way reads this, and has said all it had to.
            let reason = match why {
                Expiry::Late(limit) => {
                    format!(
                        "of {PREAMBLE_BYTES} bytes of the preamble {filled} came within {limit:?}"
                    )
                }
                Expiry::Crowded => why.to_string(),
            };
            let _ = self.incoming.answer(Status::Malformed, &reason);
        }
    }
}

/// Why this side closes a connection that is still half open.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expiry {
    /// It had so long.
    Late(Duration),
    /// There is no room for more of them.
    Crowded,
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Late(_) => "out of time",
            Self::Crowded => "too many others came",
        })
    }
}
