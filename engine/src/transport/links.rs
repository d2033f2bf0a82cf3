//! Where links come from. A migration begins on one, and goes on with another where that is lost.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{DestinationLink, Interrupt, MigrationId, SourceLink, TransportError};
use crate::control::protocol::{Message, MigrationKey};

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkPurpose {
    /// The first one of a migration.
    Begin,
    /// In place of one before it. That was lost, or lacks data channels: then it is still there while this one is made, and
    /// ends afterwards.
    Rejoin {
        /// Which migration.
        migration: MigrationId,
        /// Number of the link; the first one of the migration is 0. It only grows.
        epoch: u32,
    },
}

/// Dials: what a source gets its links from.
pub trait Connector: Send {
    /// Makes a link to the destination. Blocks; the source tries again by itself, so that one attempt takes a
    /// bounded time.
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError>;

    /// Whether there may be more than one link: if not, the migration ends with its first one.
    fn redials(&self) -> bool;

    /// A handle that ends [`connect`](Self::connect), now and later, with [`TransportError::Interrupted`].
    /// Links that were made are not concerned.
    fn interrupter(&self) -> Arc<dyn Interrupt>;
}

/// Waits: what a destination gets its links from.
pub trait Rendezvous: Send {
    /// Waits for a source, at most `timeout` (`None`: until there is one). It may be anybody: the destination finds
    /// out, and waits again where it was not the one. [`TransportError::Io`] says that there is nowhere left to wait:
    /// the migration ends with it.
    fn accept(
        &mut self,
        purpose: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError>;

    /// Whether there may be more than one link: if not, the migration ends with its first one.
    fn waits_again(&self) -> bool;

    /// A handle that ends [`accept`](Self::accept), now and later, with [`TransportError::Interrupted`]. Links
    /// that were made are not concerned.
    fn interrupter(&self) -> Arc<dyn Interrupt>;
}

/// Whether somebody's first control frame is that of a source that comes back.
///
/// A destination gives it to its link ([`DestinationLink::expect_return`]), which may seem to live after the source has
/// lost it.
#[derive(Clone)]
pub struct Returning(Arc<IsBack>);

type IsBack = dyn Fn(&[u8]) -> bool + Send + Sync;

impl Returning {
    /// Who has the key of a migration, on a later link than that of this epoch: who repeats what was said before is
    /// not back.
    pub(crate) fn by(key: MigrationKey, epoch: u32) -> Self {
        Self::new(move |frame| {
            matches!(
                Message::decode(frame),
                Ok(Message::Rejoin(rejoin)) if rejoin.key == key && rejoin.epoch > epoch
            )
        })
    }

    /// As `is_back` says.
    pub fn new(is_back: impl Fn(&[u8]) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(is_back))
    }

    /// Whether it is.
    pub fn is_back(&self, frame: &[u8]) -> bool {
        (self.0)(frame)
    }
}

impl fmt::Debug for Returning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Returning").finish_non_exhaustive()
    }
}

/// A link that is there already, and the only one: the migration ends with it.
#[derive(Debug)]
pub struct OneLink<L: ?Sized>(Option<Box<L>>);

impl OneLink<dyn SourceLink> {
    /// For a source.
    pub fn source(link: Box<dyn SourceLink>) -> Box<dyn Connector> {
        Box::new(Self(Some(link)))
    }
}

impl OneLink<dyn DestinationLink> {
    /// For a destination.
    pub fn destination(link: Box<dyn DestinationLink>) -> Box<dyn Rendezvous> {
        Box::new(Self(Some(link)))
    }
}

impl<L: ?Sized> OneLink<L> {
    fn take(&mut self) -> Result<Box<L>, TransportError> {
        self.0.take().ok_or(TransportError::Unsupported("other link than its first"))
    }
}

impl Connector for OneLink<dyn SourceLink> {
    fn connect(&mut self, _: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        self.take()
    }

    fn redials(&self) -> bool {
        false
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(Attempts::default())
    }
}

impl Rendezvous for OneLink<dyn DestinationLink> {
    fn accept(
        &mut self,
        _: LinkPurpose,
        _: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        self.take()
    }

    fn waits_again(&self) -> bool {
        false
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(Attempts::default())
    }
}

/// Attempts of which each has an interrupter of its own: ends the one that is being made, and all to come.
#[derive(Default)]
pub struct Attempts(Mutex<Attempted>);

#[derive(Default)]
struct Attempted {
    interrupted: bool,
    current: Option<Arc<dyn Interrupt>>,
}

impl Attempts {
    fn state(&self) -> MutexGuard<'_, Attempted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one, which `interrupter` ends. What came of it is not concerned afterwards.
    pub fn make<T>(
        &self,
        interrupter: Arc<dyn Interrupt>,
        attempt: impl FnOnce() -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        {
            let mut state = self.state();
            if state.interrupted {
                return Err(TransportError::Interrupted);
            }
            state.current = Some(interrupter);
        }
        let result = attempt();
        let mut state = self.state();
        state.current = None;
        // It may have interrupted the link that came of it.
        if state.interrupted { Err(TransportError::Interrupted) } else { result }
    }
}

impl Interrupt for Attempts {
    fn interrupt(&self) {
        let mut state = self.state();
        state.interrupted = true;
        if let Some(current) = &state.current {
            current.interrupt();
        }
    }
}

impl fmt::Debug for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempts")
            .field("interrupted", &self.state().interrupted)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::control::protocol::Rejoin;
    use crate::testing::memory_transport;

    #[test]
    fn what_was_said_on_a_link_before_is_nobodys_return() {
        let (ours, other) = (MigrationKey::random().unwrap(), MigrationKey::random().unwrap());
        let said = |key: &MigrationKey, epoch| {
            let rejoin = Rejoin {
                oldest_version: 1,
                newest_version: 1,
                key: key.clone(),
                epoch,
                rounds: 0,
                switchovers: 0,
                committed: false,
            };
            Message::Rejoin(rejoin).encode()
        };
        let returning = Returning::by(ours.clone(), 3);
        for (key, epoch, is_back) in
            [(&ours, 2, false), (&ours, 3, false), (&ours, 4, true), (&other, 4, false)]
        {
            assert_eq!(returning.is_back(&said(key, epoch)), is_back, "epoch {epoch}");
        }
    }

    #[derive(Default)]
    struct Flag(AtomicBool);

    impl Interrupt for Flag {
        fn interrupt(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn one_link_is_one_link() {
        let (here, there) = memory_transport::pair();
        let mut connector = OneLink::source(Box::new(here));
        let mut rendezvous = OneLink::destination(Box::new(there));
        assert!(!connector.redials() && !rendezvous.waits_again());
        connector.connect(LinkPurpose::Begin).unwrap();
        rendezvous.accept(LinkPurpose::Begin, None).unwrap();
        let again = LinkPurpose::Rejoin { migration: MigrationId([1; 16]), epoch: 1 };
        assert!(matches!(connector.connect(again), Err(TransportError::Unsupported(_))));
        assert!(matches!(rendezvous.accept(again, None), Err(TransportError::Unsupported(_))));
    }

    #[test]
    fn an_interrupt_ends_the_attempt_that_is_made_and_those_to_come() {
        let (attempts, first) = (Attempts::default(), Arc::new(Flag::default()));
        let made = attempts.make(Arc::clone(&first) as Arc<dyn Interrupt>, || Ok(7));
        assert!(matches!(made, Ok(7)));
        let second = Arc::new(Flag::default());
        let made = attempts.make(Arc::clone(&second) as Arc<dyn Interrupt>, || {
            attempts.interrupt();
            Ok(7)
        });
        assert!(matches!(made, Err(TransportError::Interrupted)));
        assert!(second.0.load(Ordering::SeqCst) && !first.0.load(Ordering::SeqCst));
        let made = attempts.make(first, || -> Result<(), _> { panic!("another attempt") });
        assert!(matches!(made, Err(TransportError::Interrupted)));
    }
}
