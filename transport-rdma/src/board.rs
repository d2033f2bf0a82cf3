//! What the acceptor's thread and the links tell each other: which migration is being served, and
//! which of its connections wait for their link.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::MAX_CHANNELS;
use pageferry::transport::{MigrationId, TransportError};

use crate::preamble::{Preamble, Purpose};
use crate::state::LinkState;

/// Connections for reads that may wait.
const MAX_READERS: usize = 64;

/// A source whose control connections are there.
pub(crate) trait Arrived {
    fn migration(&self) -> MigrationId;

    /// Whether the source has left, as far as is known.
    fn has_left(&mut self) -> bool;

    /// Takes in what the source may have said.
    fn listen(&mut self);

    /// What is left to know of it once somebody has accepted it.
    fn voice(&self) -> Arc<dyn Voice>;
}

/// What is known of a source that was accepted.
pub(crate) trait Voice: Send + Sync + fmt::Debug {
    /// Whether it has greeted, and goes on. Strangers who speak a preamble do not.
    fn keeps_place(&self) -> bool;

    /// Ends its link.
    fn interrupt(&self);
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is the first of a migration.
    Begins,
    /// It belongs to one that has begun, and is not there yet.
    Completes,
    /// It belongs to the migration that is being served.
    Waits,
    /// It is a source's, and another one is being served.
    Later,
}

#[derive(Debug)]
pub(crate) struct Board<A, R> {
    state: Mutex<State<A, R>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<A, R> {
    current: Option<Migration<A, R>>,
    /// It has spoken while the current one had not, which therefore has to go.
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

    /// Whether its source has spoken, and goes on: others are told to come later.
    fn keeps_place(&mut self) -> bool {
        if let Some(arrived) = &mut self.arrived {
            arrived.listen();
        }
        self.voice.keeps_place()
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
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<A: Arrived, R> Board<A, R> {
    fn state(&self) -> MutexGuard<'_, State<A, R>> {
        // No critical section leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a request belongs, given whether its migration has begun and is not there yet; or why it is
    /// refused, in words for the other side.
    pub(crate) fn judge(&self, preamble: &Preamble, begun: bool) -> Result<Place, String> {
        let mut state = self.state();
        if state.current.as_mut().is_some_and(Migration::was_given_up) {
            state.current = None;
        }
        let busy =
            state.next.is_some() || state.current.as_mut().is_some_and(Migration::keeps_place);
        match (preamble.purpose, &state.current) {
            (Purpose::Control, _) if busy => Ok(Place::Later),
            (Purpose::Control, _) if begun => {
                Err("the migration with this id has begun already".to_owned())
            }
            (Purpose::Control, _) => Ok(Place::Begins),
            (Purpose::ControlBack, _) if begun => Ok(Place::Completes),
            (Purpose::Table | Purpose::Pages { .. } | Purpose::Reads, Some(current))
                if current.id == preamble.migration =>
            {
                current.judge(preamble.purpose).map(|()| Place::Waits)
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

    /// A source is there. Given back as long as another one has its place; who has spoken takes that of
    /// one who has not.
    pub(crate) fn arrive(&self, mut arrived: A) -> Result<(), A> {
        arrived.listen();
        let mut state = self.state();
        let Some(current) = &mut state.current else {
            state.current = Some(Migration::new(arrived));
            self.changed.notify_all();
            return Ok(());
        };
        let gone = current.was_given_up();
        if !gone && (state.next.is_some() || !arrived.voice().keeps_place()) {
            return Err(arrived);
        }
        let Some(current) = &mut state.current else { return Err(arrived) };
        if !gone && current.keeps_place() {
            return Err(arrived);
        }
        if gone || current.arrived.is_some() {
            *current = Migration::new(arrived);
            self.changed.notify_all();
            return Ok(());
        }
        tracing::warn!(migration = %current.id, "given up: it says nothing, and another source does");
        let displaced = Arc::clone(&current.voice);
        state.next = Some(Migration::new(arrived));
        drop(state);
        displaced.interrupt();
        Ok(())
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

    /// Whether it was heard, and whether it was interrupted.
    #[derive(Debug, Default)]
    struct Said(AtomicBool, AtomicBool);

    impl Voice for Said {
        fn keeps_place(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }

        fn interrupt(&self) {
            self.1.store(true, Ordering::Relaxed);
        }
    }

    #[derive(Debug)]
    struct Source {
        migration: MigrationId,
        left: bool,
        said: Arc<Said>,
    }

    fn source(migration: MigrationId, left: bool, spoke: bool) -> Source {
        let said = Arc::new(Said(AtomicBool::new(spoke), AtomicBool::new(false)));
        Source { migration, left, said }
    }

    impl Arrived for Source {
        fn migration(&self) -> MigrationId {
            self.migration
        }

        fn has_left(&mut self) -> bool {
            self.left
        }

        fn listen(&mut self) {}

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
    ) -> Result<Place, String> {
        board.judge(&Preamble { purpose, migration, mtu: 5 }, migration == OTHER)
    }

    fn arrive(board: &Board<Source, u32>, migration: MigrationId) -> Result<(), Source> {
        board.arrive(source(migration, false, true))
    }

    #[test]
    fn a_second_source_is_told_to_come_later_and_then_let_in() {
        let board = board();
        assert_eq!(judge(&board, SOURCE, Purpose::Control), Ok(Place::Begins));
        arrive(&board, SOURCE).unwrap();
        for _ in 0..2 {
            assert_eq!(judge(&board, MigrationId([3; 16]), Purpose::Control), Ok(Place::Later));
            arrive(&board, OTHER).unwrap_err();
            // Waiting to be accepted, and accepted, are the same to others.
            let _ = board.next_migration(Some(Duration::ZERO));
        }
        board.end_migration();
        assert_eq!(judge(&board, MigrationId([3; 16]), Purpose::Control), Ok(Place::Begins));
    }

    #[test]
    fn whoever_speaks_first_is_the_source() {
        for accepted in [false, true] {
            let board = board();
            let silent = source(SOURCE, false, false);
            let said = Arc::clone(&silent.said);
            board.arrive(silent).unwrap();
            if accepted {
                board.next_migration(None).unwrap();
            }
            assert_eq!(judge(&board, MigrationId([3; 16]), Purpose::Control), Ok(Place::Begins));
            board.arrive(source(OTHER, false, false)).unwrap_err();
            arrive(&board, OTHER).unwrap();
            assert_eq!(said.1.load(Ordering::Relaxed), accepted, "its link is interrupted");
            assert_eq!(judge(&board, MigrationId([3; 16]), Purpose::Control), Ok(Place::Later));
            if accepted {
                board.end_migration();
            }
            assert_eq!(board.next_migration(None).unwrap().migration, OTHER);
        }
    }

    #[test]
    fn a_source_that_left_before_it_was_accepted_is_forgotten() {
        let board = board();
        board.arrive(source(SOURCE, true, true)).unwrap();
        let nobody = board.next_migration(Some(Duration::ZERO)).unwrap_err();
        assert!(matches!(nobody, TransportError::TimedOut { .. }), "{nobody:?}");
        board.arrive(source(SOURCE, true, true)).unwrap();
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
        assert_eq!(judge(&board, SOURCE, Purpose::Table), Ok(Place::Waits));
    }

    #[test]
    fn a_migration_that_has_begun_is_completed_and_not_begun_again() {
        let board = board();
        assert_eq!(judge(&board, OTHER, Purpose::ControlBack), Ok(Place::Completes));
        judge(&board, OTHER, Purpose::Control).unwrap_err();
        judge(&board, OTHER, Purpose::Pages { channel: 0 }).unwrap_err();
    }

    #[test]
    fn data_connections_must_name_the_migration_and_a_free_channel() {
        let board = board();
        arrive(&board, SOURCE).unwrap();
        let pages = |channel| Purpose::Pages { channel };
        for (purpose, request) in [(Purpose::Table, 7), (pages(0), 8), (pages(3), 9)] {
            assert_eq!(judge(&board, SOURCE, purpose), Ok(Place::Waits));
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
            assert_eq!(judge(&board, SOURCE, Purpose::Reads), Ok(Place::Waits));
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
