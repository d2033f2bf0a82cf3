//! Connections that have not said yet what they are for, or who they are, and those that are being turned
//! away.

use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Admission, Warnings};
use pageferry_identity::words;
use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::greeting::Greeting;
use crate::incoming::{Incoming, Unwanted};
use crate::newcomer::{Newcomer, TcpBoard};
use crate::preamble::{Kind, PREAMBLE_BYTES, Preamble, PreambleError, Status, check_start};
use crate::tls::{Broken, HANDSHAKE_BYTE, Stage};
use crate::wire::Seal;

/// How long a refused connection may take to read why.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a greeting may take that goes on arriving. Sources wait for an answer for less.
const GREETING_AT_MOST: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct HalfOpen {
    pub(crate) incoming: Incoming,
    pub(crate) deadline: Instant,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// It has to speak TLS, and has said nothing yet.
    Hello,
    /// It has yet to show who it is.
    Handshake(Stage),
    Preamble {
        bytes: [u8; PREAMBLE_BYTES],
        filled: usize,
    },
    /// A source whose preamble was answered, and that has yet to greet.
    Greeting {
        preamble: Preamble,
        answered: Instant,
        greeting: Greeting,
    },
    /// Answered and shut. Closing a socket with unread bytes in it sends a reset, which can
    /// destroy the answer before it is read: so read on until the other side has hung up.
    Refused,
}

impl Phase {
    fn preamble() -> Self {
        Self::Preamble { bytes: [0; PREAMBLE_BYTES], filled: 0 }
    }
}

/// What became of a connection.
pub(crate) enum Step {
    Stays(HalfOpen),
    /// It is a source.
    Comes(Newcomer),
    /// It is on the board, or closed.
    Done,
}

/// What an acceptor goes by.
pub(crate) struct Rules<'a> {
    pub(crate) admission: Admission,
    /// How long a connection may say nothing.
    pub(crate) silence: Duration,
    pub(crate) warnings: &'a Warnings,
}

impl HalfOpen {
    pub(crate) fn new(incoming: Incoming, deadline: Instant) -> Self {
        let phase = match incoming.wire.seal() {
            Seal::Plain => Phase::preamble(),
            Seal::Process | Seal::Kernel => Phase::Hello,
        };
        Self { incoming, deadline, phase }
    }

    /// What it waits for.
    pub(crate) fn awaits(&self) -> PollFlags {
        match self.phase {
            Phase::Handshake(Stage::Says) => PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    /// Goes on with what has come.
    pub(crate) fn advance(self, board: &Arc<TcpBoard>, rules: &Rules<'_>) -> Step {
        match self.phase {
            Phase::Hello => self.begin(board, rules),
            Phase::Handshake(_) => self.shake_hands(board, rules),
            Phase::Preamble { .. } => self.hear(board, rules),
            Phase::Greeting { .. } => self.listen(board, rules),
            Phase::Refused => self.discard(),
        }
    }

    /// Looks whether it speaks TLS.
    fn begin(self, board: &Arc<TcpBoard>, rules: &Rules<'_>) -> Step {
        match self.incoming.speaks_tls() {
            Ok(true) => self.shake_hands(board, rules),
            Ok(false) => self.wants_tls(rules),
            Err(Errno::AGAIN) => Step::Stays(self),
            Err(Errno::PIPE) => self.close(rules, "it ended before its TLS handshake"),
            Err(errno) => self.close(rules, &errno.to_string()),
        }
    }

    /// Goes on with the handshake, and with what came behind it.
    fn shake_hands(mut self, board: &Arc<TcpBoard>, rules: &Rules<'_>) -> Step {
        match self.incoming.shake_hands() {
            Ok(Stage::Done) => {
                self.phase = Phase::preamble();
                self.hear(board, rules)
            }
            Ok(stage) => {
                self.phase = Phase::Handshake(stage);
                Step::Stays(self)
            }
            Err(Broken::Ended) => self.close(rules, "it ended within its TLS handshake"),
            Err(Broken::Socket(errno)) => self.close(rules, &errno.to_string()),
            Err(Broken::Tls { error, .. }) => {
                let (incoming, reason) = (self.incoming, words(&error));
                let unwanted = Unwanted { incoming, status: Status::Insecure, reason };
                Step::Stays(Self::refuse(unwanted, rules.warnings))
            }
        }
    }

    /// It speaks plainly where that is not enough.
    fn wants_tls(self, rules: &Rules<'_>) -> Step {
        let reason = "it wants TLS: both sides need a shared key, or certificates";
        let _ = self.incoming.refuse_plainly(Status::Insecure, reason);
        let (incoming, status) = (self.incoming, Status::Insecure);
        let unwanted = Unwanted { incoming, status, reason: "it does not speak TLS".to_owned() };
        Step::Stays(Self::refuse(unwanted, rules.warnings))
    }

    /// Reads the preamble.
    fn hear(mut self, board: &Arc<TcpBoard>, rules: &Rules<'_>) -> Step {
        let Phase::Preamble { bytes, filled } = &mut self.phase else { return Step::Stays(self) };
        match self.incoming.receive(&mut bytes[*filled..]) {
            Ok(0) => return self.close(rules, "it ended within its preamble"),
            Ok(received) => *filled += received,
            Err(Errno::AGAIN) => return Step::Stays(self),
            Err(errno) => return self.close(rules, &errno.to_string()),
        }
        if bytes[0] == HANDSHAKE_BYTE {
            let unwanted = Unwanted::speaks_tls(self.incoming);
            return Step::Stays(Self::refuse(unwanted, rules.warnings));
        }
        let judged = match check_start(&bytes[..*filled]) {
            // There may be more that the socket does not know of.
            Ok(()) if *filled < PREAMBLE_BYTES => return self.hear(board, rules),
            Ok(()) => Preamble::decode(bytes),
            Err(error) => Err(error),
        };
        match judged {
            Ok(preamble) => self.welcome(preamble, board, rules),
            Err(error) => {
                let status = match error {
                    PreambleError::Version(_) => Status::Version,
                    _ => Status::Malformed,
                };
                let (incoming, reason) = (self.incoming, error.to_string());
                let unwanted = Unwanted { incoming, status, reason };
                Step::Stays(Self::refuse(unwanted, rules.warnings))
            }
        }
    }

    /// Its preamble is good.
    fn welcome(mut self, preamble: Preamble, board: &Arc<TcpBoard>, rules: &Rules<'_>) -> Step {
        let answered = Instant::now();
        match (preamble.kind, rules.admission) {
            (kind @ (Kind::Data { channel: number } | Kind::Lane { lane: number }), _) => {
                let joined = board.connections(preamble.id, |joined| match (joined, kind) {
                    (Some(joined), Kind::Lane { .. }) => {
                        joined.lanes.join(number, self.incoming, rules.warnings)
                    }
                    (Some(joined), _) => {
                        joined.channels.join(number, self.incoming, rules.warnings)
                    }
                    (None, _) => Err(Unwanted::unknown(self.incoming)),
                });
                match joined {
                    Ok(()) => Step::Done,
                    Err(unwanted) => Step::Stays(Self::refuse(unwanted, rules.warnings)),
                }
            }
            (Kind::Control, Admission::Anyone) => {
                Step::Comes(Newcomer::stranger(preamble.id, self.incoming, board))
            }
            (Kind::Control, Admission::Greeted) => match self.incoming.let_in() {
                Ok(()) => {
                    let greeting = Greeting::default();
                    self.phase = Phase::Greeting { preamble, answered, greeting };
                    // From here on it may be silent for as long again.
                    self.deadline = answered + rules.silence;
                    self.listen(board, rules)
                }
                Err(error) => self.close(rules, &format!("failed to answer it: {error}")),
            },
        }
    }

    /// Reads the greeting.
    fn listen(mut self, board: &Arc<TcpBoard>, rules: &Rules<'_>) -> Step {
        let Phase::Greeting { preamble, answered, greeting } = &mut self.phase else {
            return Step::Stays(self);
        };
        match greeting.receive(&self.incoming) {
            Ok(None) => {}
            Ok(Some(frame)) => {
                let round_trip = answered.elapsed();
                return Step::Comes(Newcomer::greeted(
                    preamble.id,
                    self.incoming,
                    frame,
                    round_trip,
                    board,
                ));
            }
            Err(why) => {
                let unwanted = Unwanted::malformed(self.incoming, why);
                return Step::Stays(Self::refuse(unwanted, rules.warnings));
            }
        }
        // More of it has come.
        self.deadline = (Instant::now() + rules.silence).min(*answered + GREETING_AT_MOST);
        Step::Stays(self)
    }

    fn close(self, rules: &Rules<'_>, why: &str) -> Step {
        rules.warnings.warn(self.incoming.peer, format_args!("closed a connection: {why}"));
        Step::Done
    }

    /// Says why it is over, and gives the other side time to read it.
    pub(crate) fn refuse(unwanted: Unwanted, warnings: &Warnings) -> Self {
        let Unwanted { incoming, status, reason } = unwanted;
        warnings.warn(incoming.peer, format_args!("refused a connection ({status:?}): {reason}"));
        // If the other side is gone, nobody misses the answer.
        let _ = incoming.refuse(status, &reason);
        let _ = incoming.wire.socket().shutdown(Shutdown::Write);
        Self { incoming, deadline: Instant::now() + FAREWELL, phase: Phase::Refused }
    }

    /// Reads what nobody wants.
    pub(crate) fn discard(self) -> Step {
        match self.incoming.discard() {
            Ok(1..) | Err(Errno::AGAIN) => Step::Stays(self),
            Ok(0) | Err(_) => Step::Done,
        }
    }

    /// Whether it still matters to its other side that it lives.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self.phase, Phase::Refused)
    }

    /// Bytes that are kept of its greeting.
    pub(crate) fn greeting_bytes(&self) -> usize {
        match &self.phase {
            Phase::Greeting { greeting, .. } => greeting.len(),
            _ => 0,
        }
    }

    /// Turns it away for a reason of this side; `None` if that has happened before.
    pub(crate) fn expire(self, why: Expiry, warnings: &Warnings) -> Option<Self> {
        // A source whose connection is held up on the way reads this, and has said all it had to.
        let came = match &self.phase {
            Phase::Hello => "nothing came".to_owned(),
            Phase::Handshake(_) => "its TLS handshake was not done".to_owned(),
            Phase::Preamble { filled, .. } => {
                format!("of {PREAMBLE_BYTES} bytes of the preamble {filled} came")
            }
            Phase::Greeting { greeting, .. } => {
                format!("of the greeting {} bytes came", greeting.len())
            }
            Phase::Refused => return None,
        };
        let (status, reason) = match why {
            Expiry::Late(limit) => (Status::Malformed, format!("{came} within {limit:?}")),
            Expiry::Crowded => (Status::Busy, format!("too many connect, and {came}")),
            Expiry::Closed => {
                (Status::Busy, format!("nobody is accepted here any more, and {came}"))
            }
        };
        let unwanted = Unwanted { incoming: self.incoming, status, reason };
        Some(Self::refuse(unwanted, warnings))
    }
}

/// Why this side closes a connection that is still half open.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expiry {
    /// It had so long, or said nothing more for so long.
    Late(Duration),
    /// There is no room for more of them.
    Crowded,
    /// There is no acceptor any more.
    Closed,
}
