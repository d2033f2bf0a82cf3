//! What comes over the control channel, whichever half of it reads that.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::TransportError;

use crate::connection::{SPIN, Sleeper};
use crate::frames::{END, Frame, REFUSED, shown};
use crate::pipe::{Inlet, Message, RECEIVES};
use crate::seal::Seal;

/// Most frames that are read before anybody asks for them.
const MOST_AHEAD: usize = 8;

/// Keeps what it has of a frame over calls, so a timeout in the middle of one loses nothing.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// At the source: who may say that it is turned away.
    destination: Option<SocketAddr>,
    /// Where there is TLS.
    seal: Option<Seal>,
    sleeper: Sleeper,
    arriving: Mutex<Arriving>,
}

#[derive(Debug)]
struct Arriving {
    inlet: Inlet,
    /// Came before anybody asked for them, and why there are no more.
    ahead: VecDeque<Vec<u8>>,
    failed: Option<TransportError>,
    frame: Frame,
    /// Messages are there that were not looked at yet.
    more: bool,
    /// The other side dropped its half in order.
    over: bool,
}

impl Inbox {
    /// At the source, of the control channel to `destination`.
    pub(crate) fn at_source(
        inlet: Inlet,
        seal: Option<Seal>,
        destination: SocketAddr,
    ) -> Result<Arc<Self>, TransportError> {
        Self::new(inlet, seal, Some(destination), None)
    }

    /// At the destination; with the first frame, if that has come.
    pub(crate) fn at_destination(
        inlet: Inlet,
        seal: Option<Seal>,
        first: Option<Vec<u8>>,
    ) -> Result<Arc<Self>, TransportError> {
        Self::new(inlet, seal, None, first)
    }

    fn new(
        inlet: Inlet,
        seal: Option<Seal>,
        destination: Option<SocketAddr>,
        first: Option<Vec<u8>>,
    ) -> Result<Arc<Self>, TransportError> {
        let sleeper = inlet.connection.sleeper().map_err(|cause| TransportError::Io {
            operation: "share a channel of completions",
            cause,
        })?;
        let arriving = Arriving {
            inlet,
            ahead: first.into_iter().collect(),
            failed: None,
            frame: Frame::default(),
            more: false,
            over: false,
        };
        Ok(Arc::new(Self { destination, seal, sleeper, arriving: Mutex::new(arriving) }))
    }

    /// What frames of the other half go through too.
    pub(crate) fn seal(&self) -> Option<&Seal> {
        self.seal.as_ref()
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        // A thread that panicked in there has left the queue pair as it is; what it counted stays true.
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next frame; `None` if it is not there yet, which ends the next [`Self::sleep`].
    pub(crate) fn next(&self) -> Result<Option<Vec<u8>>, TransportError> {
        // With the lock held nobody is about to find out why the link ends.
        let mut arriving = self.arriving();
        self.sleeper.state().check()?;
        if let Some(frame) = arriving.ahead.pop_front() {
            return Ok(Some(frame));
        }
        if let Some(error) = arriving.failed.take() {
            return Err(error);
        }
        if let Some(frame) = self.read(&mut arriving, Instant::now() + SPIN)? {
            return Ok(Some(frame));
        }
        arriving.inlet.ask_if_silent()?;
        arriving.inlet.connection.wake()?;
        self.read(&mut arriving, Instant::now())
    }

    /// Sleeps until anything happens, at most for so long; keeps nobody from reading.
    pub(crate) fn sleep(&self, time: Duration) -> Result<(), TransportError> {
        let more = self.arriving().more;
        if more { Ok(()) } else { self.sleeper.sleep(time) }
    }

    /// Looks why the link has ended, for who cannot go on with it: what the other side said about that may
    /// be here, and not read yet. It is what every call tells then; else the error itself.
    pub(crate) fn explain(&self, error: TransportError) -> TransportError {
        let mut arriving = self.arriving();
        let state = self.sleeper.state();
        while arriving.ahead.len() < MOST_AHEAD
            && arriving.failed.is_none()
            && state.check().is_ok()
        {
            match self.read(&mut arriving, Instant::now()) {
                Ok(Some(frame)) => arriving.ahead.push_back(frame),
                Ok(None) => break,
                Err(error) => arriving.failed = Some(error),
            }
        }
        let told = match &arriving.failed {
            Some(TransportError::Security { address, reason }) => {
                let (address, reason) = (address.clone(), reason.clone());
                TransportError::Security { address, reason }
            }
            _ => error,
        };
        state.check().err().unwrap_or(told)
    }

    /// What a message says.
    fn open(&self, message: Vec<u8>) -> Result<Vec<u8>, TransportError> {
        let Some(seal) = &self.seal else { return Ok(message) };
        seal.open(&message).map_err(|unopened| seal.explain(&unopened))
    }

    /// Reads the next frame, as far as it is there until then: in turns, of as many messages as there are
    /// credits for, since they may never end.
    fn read(
        &self,
        arriving: &mut Arriving,
        until: Instant,
    ) -> Result<Option<Vec<u8>>, TransportError> {
        for _ in 0..RECEIVES {
            if arriving.over {
                return Err(TransportError::Closed);
            }
            let Some(message) = arriving.inlet.next(Some(until))? else {
                arriving.more = false;
                return Ok(None);
            };
            // It says that somebody is there.
            let Message::Bytes(message) = message else { continue };
            let message = self.open(message)?;
            match (&message[..], self.destination) {
                ([], _) => {}
                ([END], _) if arriving.frame.bytes().is_empty() => arriving.over = true,
                ([REFUSED, reason @ ..], Some(destination)) => {
                    return Err(self.sleeper.state().link.refuse(destination, shown(reason)));
                }
                (message, _) => {
                    if arriving.frame.take_in(message)? {
                        arriving.inlet.settle()?;
                        self.sleeper.state().link.fate.note_heard();
                        return Ok(Some(arriving.frame.take()));
                    }
                }
            }
        }
        arriving.more = true;
        Ok(None)
    }
}
