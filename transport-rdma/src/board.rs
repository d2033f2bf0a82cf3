//! What the acceptor's thread and the links tell each other: which migration is being served, and
//! which of its connections wait for their link.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::MAX_CHANNELS;
use pageferry::transport::{Holder, MigrationId, Place, TransportError, Warnings};

use crate::preamble::{Preamble, Purpose};
use crate::state::LinkState;

/// Connections for reads that may wait.
const MAX_READERS: usize = 64;

/// A source whose control connections are there, and that has greeted.
pub(crate) trait Arrived {
    fn migration(&self) -> MigrationId;

    /// Whether the source has left, as far as is known.
    fn has_left(&mut self) -> bool;

    /// Whether it keeps its place while nobody has accepted it.
    fn place(&self) -> Place;

    /// What is left to know of it once somebody has accepted it.
    fn voice(&self) -> Arc<dyn Voice>;
}

/// What is known of a source that was accepted.
pub(crate) trait Voice: Send + Sync + fmt::Debug {
    /// Whether it keeps its place.
    fn place(&self) -> Place;

    /// Ends its link for the sake of another source.
    fn displace(&self);
}

impl Voice for LinkState {
    fn place(&self) -> Place {
        LinkState::place(self)
    }

    fn displace(&self) {
        LinkState::displace(self);
    }
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// It is the first of a migration.
    Begins,
    /// It belongs to one that has begun, and is not there yet.
    Completes,
    /// It belongs to the migration that is being served.
    Waits,
}

#[derive(Debug)]
pub(crate) struct Board<A, R> {
    state: Mutex<State<A, R>>,
    changed: Condvar,
    /// Of strangers.
    pub(crate) warnings: Warnings,
}

#[derive(Debug)]
struct State<A, R> {
    current: Option<Migration<A, R>>,
    /// It has greeted, while the current one did not answer, which therefore has to go.
    next: Option<Migration<A, R>>,
    accept_interrupted: bool,
    stopped: Option<Stopped>,
}

#[derive(Debug)]
struct Stopped {
    cause: Option<io::ErrorKind>,
}

/// The one migration that is being served, until its link is gone.
#[derive(Debug)]
struct Migration<A, R> {
    id: MigrationId,
    /// Until somebody accepts it.
    arrived: Option<A>,
    voice: Arc<dyn Voice>,
    /// How many data channels there will be; [`MAX_CHANNELS`] until it is known.
    channels: u16,
    /// Connections that came, whether they were taken or not; each comes once.
    seen: BTreeSet<Purpose>,
    waiting: Vec<(Purpose, R)>,
}

impl<A: Arrived, R> Migration<A, R> {
    fn new(arrived: A) -> Self {
        Self {
            id: arrived.migration(),
            voice: arrived.voice(),
            arrived: Some(arrived),
            channels: MAX_CHANNELS,
            seen: BTreeSet::new(),
            waiting: Vec::new(),
        }
    }

    fn place(&self) -> Place {
        self.arrived.as_ref().map_or_else(|| self.voice.place(), Arrived::place)
    }

    /// Whether nobody accepted it yet, and nobody will.
    fn was_given_up(&mut self) -> bool {
        self.arrived.as_mut().is_some_and(Arrived::has_left)
    }

    fn judge(&self, purpose: Purpose) -> Result<(), String> {
        match purpose {
            Purpose::Pages { channel } if channel >= self.channels => {
                Err(format!("data channel {channel} of only {} channels", self.channels))
            }
            Purpose::Reads => {
                let readers = self.waiting.iter().filter(|(purpose, _)| *purpose == Purpose::Reads);
                if readers.count() < MAX_READERS {
                    return Ok(());
                }
                Err("too many connections for reads are waiting".to_owned())
            }
            purpose if self.seen.contains(&purpose) => {
                Err(format!("{purpose} is connected already"))
            }
            _ => Ok(()),
        }
    }
}

impl<A, R> Default for Board<A, R> {
    fn default() -> Self {
        let state = State { current: None, next: None, accept_interrupted: false, stopped: None };
        Self { state: Mutex::new(state), changed: Condvar::new(), warnings: Warnings::default() }
    }
}

impl<A: Arrived, R> Board<A, R> {
    fn state(&self) -> MutexGuard<'_, State<A, R>> {
        // No critical section leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a request belongs, given whether its migration has begun and is not there yet; or why it is
    /// refused, in words for the other side.
    pub(crate) fn judge(&self, preamble: &Preamble, begun: bool) -> Result<Part, String> {
        let mut state = self.state();
        if state.current.as_mut().is_some_and(Migration::was_given_up) {
            state.current = None;
        }
        match (preamble.purpose, &state.current) {
            (Purpose::Control, _) if begun => {
                Err("the migration with this id has begun already".to_owned())
            }
            (Purpose::Control, _) => Ok(Part::Begins),
            (Purpose::ControlBack, _) if begun => Ok(Part::Completes),
            (Purpose::Table | Purpose::Pages { .. } | Purpose::Reads, Some(current))
                if current.id == preamble.migration =>
            {
                current.judge(preamble.purpose).map(|()| Part::Waits)
            }
            _ => Err("no migration with this id is being served".to_owned()),
        }
    }

    /// Keeps a request of the current migration for its link.
    pub(crate) fn keep(&self, purpose: Purpose, request: R) {
        if let Some(current) = &mut self.state().current {
            current.seen.insert(purpose);
            current.waiting.push((purpose, request));
        }
        self.changed.notify_all();
    }

    /// Gives a source its place; or gives the source back, if somebody has that.
    pub(crate) fn admit(&self, arrived: A) -> Option<(A, Holder)> {
        let mut state = self.state();
        if state.current.as_mut().is_some_and(Migration::was_given_up) {
            state.current = None;
        }
        let Some(current) = &state.current else {
            state.current = Some(Migration::new(arrived));
            self.changed.notify_all();
            return None;
        };
        let place = if state.next.is_some() { Place::Open } else { current.place() };
        if place != Place::Forfeited {
            return Some((arrived, Holder { id: current.id, place }));
        }
        self.warnings.warn(
            current.id,
            "displaced: it does not answer its welcome, and another source waits",
        );
        let displaced = Arc::clone(&current.voice);
        state.next = Some(Migration::new(arrived));
        drop(state);
        displaced.displace();
        None
    }

    /// Waits for a source.
    pub(crate) fn next_migration(&self, timeout: Option<Duration>) -> Result<A, TransportError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state();
        loop {
            if state.accept_interrupted {
                return Err(TransportError::Interrupted);
            }
            state.check_running()?;
            if state.current.as_mut().is_some_and(Migration::was_given_up) {
                state.current = None;
            }
            if let Some(arrived) = state.current.as_mut().and_then(|current| current.arrived.take())
            {
                return Ok(arrived);
            }
            state = self.wait(state, deadline).ok_or(TransportError::TimedOut {
                operation: "accept a source",
                after: timeout.unwrap_or_default(),
            })?;
        }
    }

    /// From here on the current migration has so many data channels; gives back those beyond.
    pub(crate) fn set_channels(&self, channels: u16) -> Vec<R> {
        let mut state = self.state();
        let Some(current) = &mut state.current else { return Vec::new() };
        current.channels = channels;
        let beyond = |purpose: &Purpose| matches!(purpose, Purpose::Pages { channel } if *channel >= channels);
        current.waiting.extract_if(.., |(purpose, _)| beyond(purpose)).map(|(_, r)| r).collect()
    }

    /// Waits for a connection of the current migration, until `deadline`; `None` if none came.
    pub(crate) fn take(
        &self,
        wanted: Purpose,
        deadline: Option<Instant>,
        link: &LinkState,
    ) -> Result<Option<R>, TransportError> {
        let mut state = self.state();
        loop {
            link.check()?;
            state.check_running()?;
            let Some(current) = &mut state.current else {
                return Err(TransportError::OutOfOrder("connections of no migration"));
            };
            if let Some(at) = current.waiting.iter().position(|(purpose, _)| *purpose == wanted) {
                return Ok(Some(current.waiting.remove(at).1));
            }
            match self.wait(state, deadline) {
                Some(changed) => state = changed,
                None => return Ok(None),
            }
        }
    }

    /// Waits for a change; `None` when the time is over.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State<A, R>>,
        deadline: Option<Instant>,
    ) -> Option<MutexGuard<'a, State<A, R>>> {
        let Some(deadline) = deadline else {
            return Some(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner));
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let waited = self.changed.wait_timeout(state, left);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// The link of the current migration is gone: the next one may come.
    pub(crate) fn end_migration(&self) {
        let mut state = self.state();
        let next = state.next.take();
        let ended = std::mem::replace(&mut state.current, next);
        self.changed.notify_all();
        drop(state);
        // Its requests are refused where they are dropped, which is a system call.
        drop(ended);
    }

    /// Ends the wait of [`Board::next_migration`], now and later.
    pub(crate) fn interrupt_accept(&self) {
        self.state().accept_interrupted = true;
        self.changed.notify_all();
    }

    /// Makes everyone who waits look again.
    pub(crate) fn wake_all(&self) {
        // With the lock held nobody is between looking and waiting.
        let _state = self.state();
        self.changed.notify_all();
    }

    /// The acceptor's thread ends; with a cause if it did not mean to.
    pub(crate) fn stop(&self, cause: Option<io::ErrorKind>) {
        self.state().stopped = Some(Stopped { cause });
        self.changed.notify_all();
    }

    /// Once it is stopped: sources that nobody has accepted.
    pub(crate) fn left_over(&self) -> Vec<A> {
        let mut state = self.state();
        let State { current, next, .. } = &mut *state;
        [current, next].into_iter().flatten().filter_map(|waits| waits.arrived.take()).collect()
    }

    /// Whether the acceptor's thread was asked to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.state().stopped.is_some()
    }
}

impl<A, R> State<A, R> {
    fn check_running(&self) -> Result<(), TransportError> {
        match self.stopped {
            None => Ok(()),
            Some(Stopped { cause }) => {
                let cause = cause.unwrap_or(io::ErrorKind::NotConnected).into();
                Err(TransportError::Io { operation: "accept connections", cause })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const SOURCE: MigrationId = MigrationId([1; 16]);
    const OTHER: MigrationId = MigrationId([2; 16]);

    /// How it stands, and whether it was displaced.
    #[derive(Debug)]
    struct Said(Place, AtomicBool);

    impl Voice for Said {
        fn place(&self) -> Place {
            self.0
        }

        fn displace(&self) {
            self.1.store(true, Ordering::Relaxed);
        }
    }

    #[derive(Debug)]
    struct Source {
        migration: MigrationId,
        left: bool,
        said: Arc<Said>,
    }

    fn source(migration: MigrationId, left: bool, place: Place) -> Source {
        let said = Arc::new(Said(place, AtomicBool::new(false)));
        Source { migration, left, said }
    }

    impl Arrived for Source {
        fn migration(&self) -> MigrationId {
            self.migration
        }

        fn has_left(&mut self) -> bool {
            self.left
        }

        fn place(&self) -> Place {
            Place::Open
        }

        fn voice(&self) -> Arc<dyn Voice> {
            Arc::clone(&self.said) as Arc<dyn Voice>
        }
    }

    fn board() -> Board<Source, u32> {
        Board::default()
    }

    fn judge(
        board: &Board<Source, u32>,
        migration: MigrationId,
        purpose: Purpose,
    ) -> Result<Part, String> {
        board.judge(&Preamble { purpose, migration, mtu: 5 }, migration == OTHER)
    }

    fn arrive(board: &Board<Source, u32>, migration: MigrationId) -> Result<(), Source> {
        board.admit(source(migration, false, Place::Kept)).map_or(Ok(()), |(source, _)| Err(source))
    }

    #[test]
    fn a_second_source_waits_and_is_then_let_in() {
        let board = board();
        assert_eq!(judge(&board, SOURCE, Purpose::Control), Ok(Part::Begins));
        arrive(&board, SOURCE).unwrap();
        for place in [Place::Open, Place::Kept] {
            // Where it may go, it may say who it is.
            assert_eq!(judge(&board, MigrationId([3; 16]), Purpose::Control), Ok(Part::Begins));
            let (_, holder) = board.admit(source(OTHER, false, Place::Open)).unwrap();
            assert_eq!((holder.id, holder.place), (SOURCE, place));
            // Waiting to be accepted, and accepted.
            let _ = board.next_migration(Some(Duration::ZERO));
        }
        board.end_migration();
        arrive(&board, OTHER).unwrap();
    }

    #[test]
    fn who_forfeits_its_place_is_displaced_once() {
        let board = board();
        let silent = source(SOURCE, false, Place::Forfeited);
        let said = Arc::clone(&silent.said);
        assert!(board.admit(silent).is_none());
        board.next_migration(None).unwrap();
        arrive(&board, OTHER).unwrap();
        assert!(said.1.load(Ordering::Relaxed), "its link is interrupted");
        let (_, holder) = board.admit(source(SOURCE, false, Place::Open)).unwrap();
        assert_eq!(holder.place, Place::Open, "who comes after it waits");
        board.end_migration();
        assert_eq!(board.next_migration(None).unwrap().migration, OTHER);
    }

    #[test]
    fn nobody_is_left_over_without_a_word() {
        let board = board();
        arrive(&board, SOURCE).unwrap();
        board.stop(None);
        let left: Vec<_> = board.left_over().iter().map(|source| source.migration).collect();
        assert_eq!(left, [SOURCE]);
    }

    #[test]
    fn a_source_that_left_before_it_was_accepted_is_forgotten() {
        let board = board();
        assert!(board.admit(source(SOURCE, true, Place::Kept)).is_none());
        let nobody = board.next_migration(Some(Duration::ZERO)).unwrap_err();
        assert!(matches!(nobody, TransportError::TimedOut { .. }), "{nobody:?}");
        assert!(board.admit(source(SOURCE, true, Place::Kept)).is_none());
        arrive(&board, OTHER).unwrap();
        assert_eq!(board.next_migration(None).unwrap().migration, OTHER);
    }

    /// However many come for migrations that nobody serves: none of them is kept.
    #[test]
    fn requests_of_migrations_that_nobody_serves_take_no_room() {
        let board = board();
        for served in [false, true] {
            if served {
                arrive(&board, SOURCE).unwrap();
            }
            for stranger in 0..1_000_u16 {
                let id = MigrationId([u8::try_from(3 + stranger % 200).unwrap(); 16]);
                for purpose in [Purpose::ControlBack, Purpose::Table, Purpose::Pages { channel: 0 }]
                {
                    judge(&board, id, purpose).unwrap_err();
                }
            }
        }
        assert_eq!(judge(&board, SOURCE, Purpose::Table), Ok(Part::Waits));
    }

    #[test]
    fn a_migration_that_has_begun_is_completed_and_not_begun_again() {
        let board = board();
        assert_eq!(judge(&board, OTHER, Purpose::ControlBack), Ok(Part::Completes));
        judge(&board, OTHER, Purpose::Control).unwrap_err();
        judge(&board, OTHER, Purpose::Pages { channel: 0 }).unwrap_err();
    }

    #[test]
    fn data_connections_must_name_the_migration_and_a_free_channel() {
        let board = board();
        arrive(&board, SOURCE).unwrap();
        let pages = |channel| Purpose::Pages { channel };
        for (purpose, request) in [(Purpose::Table, 7), (pages(0), 8), (pages(3), 9)] {
            assert_eq!(judge(&board, SOURCE, purpose), Ok(Part::Waits));
            board.keep(purpose, request);
            judge(&board, SOURCE, purpose).unwrap_err();
        }
        judge(&board, SOURCE, pages(MAX_CHANNELS)).unwrap_err();
        let link = LinkState::new(|| {}).unwrap();
        assert_eq!(board.set_channels(2), [9]);
        assert_eq!(board.take(pages(0), Some(Instant::now()), &link).unwrap(), Some(8));
        assert_eq!(board.take(pages(1), Some(Instant::now()), &link).unwrap(), None);
        let refused = judge(&board, SOURCE, pages(0)).unwrap_err();
        assert_eq!(refused, "data channel 0 is connected already", "though it was taken");
        let refused = judge(&board, SOURCE, pages(2)).unwrap_err();
        assert_eq!(refused, "data channel 2 of only 2 channels");
        board.end_migration();
        judge(&board, SOURCE, Purpose::Table).unwrap_err();
    }

    #[test]
    fn connections_for_reads_are_many_and_not_without_bound() {
        let board = board();
        arrive(&board, SOURCE).unwrap();
        for reader in 0..64 {
            assert_eq!(judge(&board, SOURCE, Purpose::Reads), Ok(Part::Waits));
            board.keep(Purpose::Reads, reader);
        }
        judge(&board, SOURCE, Purpose::Reads).unwrap_err();
    }

    #[test]
    fn interrupts_and_a_thread_that_ended_end_waits() {
        let board = board();
        arrive(&board, SOURCE).unwrap();
        let weak = LinkState::new(|| {}).unwrap();
        pageferry::transport::Interrupt::interrupt(&*weak);
        let interrupted = board.take(Purpose::Table, None, &weak).unwrap_err();
        assert!(matches!(interrupted, TransportError::Interrupted), "{interrupted:?}");
        board.stop(Some(io::ErrorKind::NotFound));
        let stopped = board.next_migration(None).unwrap_err();
        assert!(matches!(stopped, TransportError::Io { .. }), "{stopped:?}");
        board.interrupt_accept();
        let interrupted = board.next_migration(None).unwrap_err();
        assert!(matches!(interrupted, TransportError::Interrupted), "{interrupted:?}");
    }
}
