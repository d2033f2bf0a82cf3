//! Whether one end of a link goes on, and why not: what everything that belongs to it asks.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::TransportError;
use super::reception::{Place, Standing};

/// Why a link is over before its time.
#[derive(Debug)]
pub enum Ending {
    /// The destination has turned this source away.
    Refused {
        /// Who has.
        by: SocketAddr,
        /// Its words.
        reason: String,
    },
    /// At the destination: this source has lost its place to another one.
    Displaced,
    /// What all of its connections need is lost.
    Lost {
        /// What it is needed for.
        operation: &'static str,
        /// How it was lost.
        kind: io::ErrorKind,
        /// In words.
        what: &'static str,
    },
}

impl From<&Ending> for TransportError {
    fn from(ending: &Ending) -> Self {
        match *ending {
            Ending::Displaced => Self::Displaced,
            Ending::Refused { by, ref reason } => {
                Self::Refused { address: by.to_string(), reason: reason.clone() }
            }
            Ending::Lost { operation, kind, what } => {
                Self::Lost { operation, cause: io::Error::new(kind, what) }
            }
        }
    }
}

/// Of one end of a link. Whoever changes it wakes those who are to ask again.
///
/// A link ends for one cause, the first, and tells that one whatever fails for it; apart from an interrupt,
/// which is what this side wanted.
#[derive(Debug)]
pub struct Fate {
    interrupted: AtomicBool,
    ending: OnceLock<Ending>,
    /// Of a source at the destination.
    standing: Mutex<Standing>,
}

impl Default for Fate {
    fn default() -> Self {
        Self {
            interrupted: AtomicBool::new(false),
            ending: OnceLock::new(),
            standing: Mutex::new(Standing::firm()),
        }
    }
}

impl Fate {
    /// Fails once the link was interrupted, or it is known why it is over.
    // Asked several times a batch, from other crates.
    #[inline]
    pub fn check(&self) -> Result<(), TransportError> {
        let interrupted = self.interrupted.load(Ordering::Acquire);
        match self.ending.get() {
            None if !interrupted => Ok(()),
            ending => Err(Self::cause(interrupted, ending)),
        }
    }

    #[cold]
    fn cause(interrupted: bool, ending: Option<&Ending>) -> TransportError {
        match ending {
            Some(ending) if !interrupted => ending.into(),
            _ => TransportError::Interrupted,
        }
    }

    /// The link was interrupted.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
    }

    /// The link is over; the first cause of that.
    pub fn end(&self, why: Ending) -> TransportError {
        self.ending.get_or_init(|| why).into()
    }

    /// Whether it is over for the sake of another source.
    pub fn was_displaced(&self) -> bool {
        matches!(self.ending.get(), Some(Ending::Displaced))
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        // No critical section leaves it half changed.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the source stands that this link is of.
    pub fn stands(&self, standing: Standing) {
        *self.standing() = standing;
    }

    /// Whether the source keeps its place.
    pub fn place(&self) -> Place {
        self.standing().place(Instant::now())
    }

    /// A control frame has come.
    pub fn note_heard(&self) {
        self.standing().hear();
    }

    /// A control frame goes out. Before the answer can come.
    pub fn note_told(&self) {
        self.standing().tell(Instant::now());
    }

    /// Guest memory is registered, however long that takes.
    pub fn settle(&self) {
        self.standing().settle();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_link_ends_for_its_first_cause_and_an_interrupt_comes_before_all() {
        let fate = Fate::default();
        fate.check().unwrap();
        let by = ([10, 0, 0, 1], 7400).into();
        let lost = || Ending::Lost {
            operation: "use the device",
            kind: io::ErrorKind::NetworkDown,
            what: "gone",
        };
        for ending in [Ending::Refused { by, reason: "busy".to_owned() }, lost(), Ending::Displaced]
        {
            let errors = [fate.end(ending), fate.check().unwrap_err()];
            for error in errors {
                assert_eq!(error.to_string(), "refused by 10.0.0.1:7400: busy");
            }
        }
        assert!(!fate.was_displaced());
        fate.interrupt();
        assert!(matches!(fate.check(), Err(TransportError::Interrupted)));

        let fate = Fate::default();
        assert!(matches!(fate.end(Ending::Displaced), TransportError::Displaced));
        assert!(fate.was_displaced());
        let fate = Fate::default();
        let TransportError::Lost { operation, cause } = fate.end(lost()) else { panic!() };
        assert_eq!((operation, cause.to_string()), ("use the device", "gone".to_owned()));
    }

    #[test]
    fn a_source_that_has_greeted_stands_as_it_answers() {
        let fate = Fate::default();
        assert_eq!(fate.place(), Place::Kept, "it needs no greeting");
        fate.stands(Standing::greeted(std::time::Duration::ZERO));
        assert_eq!(fate.place(), Place::Open);
        fate.note_told();
        fate.note_heard();
        assert_eq!(fate.place(), Place::Kept);
        fate.stands(Standing::greeted(std::time::Duration::ZERO));
        fate.settle();
        assert_eq!(fate.place(), Place::Kept);
    }
}
