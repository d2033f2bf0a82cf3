use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

const SOURCE: LinkId = LinkId([1; 16]);
const OTHER: LinkId = LinkId([2; 16]);
const NOW: Option<Duration> = Some(Duration::ZERO);

/// How it stands, and whether it was displaced.
#[derive(Debug)]
struct Said(Place, AtomicBool);

impl Served for Said {
    fn place(&self) -> Place {
        self.0
    }

    fn displace(&self) {
        self.1.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Source {
    migration: LinkId,
    left: bool,
    can_be_told: bool,
    said: Arc<Said>,
}

fn source(migration: LinkId, place: Place) -> Source {
    let said = Arc::new(Said(place, AtomicBool::new(false)));
    Source { migration, left: false, can_be_told: true, said }
}

impl Arrived for Source {
    fn greeting(&self) -> Option<&[u8]> {
        Some(&self.migration.0)
    }

    fn link(&self) -> LinkId {
        self.migration
    }

    fn peer(&self) -> SocketAddr {
        ([10, 0, 0, self.migration.0[0]], 7400).into()
    }

    fn has_left(&mut self) -> bool {
        self.left
    }

    fn served(&self) -> Arc<dyn Served> {
        Arc::clone(&self.said) as Arc<dyn Served>
    }

    fn take_place(&mut self) -> io::Result<()> {
        if self.can_be_told { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }
}

type TestBoard = Board<Source, Vec<u32>>;

/// Who has the place, where somebody else wanted it.
fn holder(refused: Option<(Source, Holder)>) -> Option<(LinkId, Place)> {
    refused.map(|(_, Holder { id, place })| (id, place))
}

fn accept(board: &TestBoard) -> LinkId {
    board.next_migration(NOW, || Ok(())).expect("somebody has the place").migration
}

/// Keeps something for the link of a migration, if it is served.
fn keep(board: &TestBoard, migration: LinkId, what: u32) -> bool {
    board.connections(migration, |kept| kept.map(|kept| kept.push(what)).is_some())
}

fn assert_nobody_comes(board: &TestBoard) {
    let nobody = board.next_migration(NOW, || Ok(()));
    assert!(matches!(nobody, Err(TransportError::TimedOut { .. })), "{nobody:?}");
}

#[test]
fn one_source_has_the_place_until_its_link_is_gone() {
    let board = TestBoard::default();
    assert_nobody_comes(&board);
    assert_eq!(holder(board.admit(source(SOURCE, Place::Kept))), None);
    for accepted in [false, true] {
        let refused = board.admit(source(OTHER, Place::Open));
        assert_eq!(holder(refused), Some((SOURCE, Place::Kept)));
        if !accepted {
            assert_eq!(accept(&board), SOURCE);
        }
    }
    assert_nobody_comes(&board);
    board.end_migration();
    assert_eq!(holder(board.admit(source(OTHER, Place::Open))), None);
    assert_eq!(accept(&board), OTHER);
}

#[test]
fn a_source_that_is_back_displaces_its_own_link_however_firm_that_seems() {
    let board = TestBoard::default();
    let first = source(SOURCE, Place::Kept);
    let said = Arc::clone(&first.said);
    assert_eq!(holder(board.admit(first)), None);
    assert_eq!(accept(&board), SOURCE);
    assert!(!board.is_returning(&source(OTHER, Place::Open)), "nobody is expected");
    board.expect_return(SOURCE, Returning::new(|frame| frame == OTHER.0));
    let stranger = source(LinkId([3; 16]), Place::Open);
    assert!(!board.is_returning(&stranger));
    assert_eq!(holder(board.admit(stranger)), Some((SOURCE, Place::Kept)));
    let back = source(OTHER, Place::Kept);
    assert!(board.is_returning(&back));
    assert_eq!(holder(board.admit(back)), None);
    assert!(said.1.load(Ordering::Relaxed), "the link that seemed to live is over");
    assert_nobody_comes(&board);
    board.end_migration();
    assert_eq!(accept(&board), OTHER);
    // It is expected on the link that it has now only once that says so.
    assert!(!board.is_returning(&source(OTHER, Place::Open)));
}

#[test]
fn who_has_left_keeps_no_place() {
    let board = TestBoard::default();
    let left = |migration| Source { left: true, ..source(migration, Place::Kept) };
    assert_eq!(holder(board.admit(left(SOURCE))), None);
    assert!(!keep(&board, SOURCE, 7), "nothing is kept for its link");
    assert_eq!(holder(board.admit(left(SOURCE))), None);
    assert_nobody_comes(&board);
    assert_eq!(holder(board.admit(left(SOURCE))), None);
    assert_eq!(holder(board.admit(source(OTHER, Place::Kept))), None);
    assert_eq!(accept(&board), OTHER);
}

#[test]
fn who_cannot_be_told_that_it_has_the_place_does_not_get_it() {
    let board = TestBoard::default();
    let deaf = Source { can_be_told: false, ..source(SOURCE, Place::Kept) };
    assert_eq!(holder(board.admit(deaf)), None);
    assert_nobody_comes(&board);
    assert_eq!(holder(board.admit(source(OTHER, Place::Kept))), None);
    assert_eq!(accept(&board), OTHER);
}

#[test]
fn who_has_forfeited_its_place_is_displaced_by_the_first_and_the_first_alone() {
    let board = TestBoard::default();
    let silent = source(SOURCE, Place::Forfeited);
    let said = Arc::clone(&silent.said);
    assert_eq!(holder(board.admit(silent)), None);
    assert_eq!(accept(&board), SOURCE);
    let third = LinkId([3; 16]);
    assert_eq!(holder(board.admit(source(OTHER, Place::Kept))), None);
    assert!(said.1.load(Ordering::Relaxed), "displaced");
    // The place is not taken twice: until the link is gone the others wait.
    assert_eq!(holder(board.admit(source(third, Place::Kept))), Some((SOURCE, Place::Open)));
    assert_nobody_comes(&board);
    board.end_migration();
    assert_eq!(accept(&board), OTHER);
    assert_eq!(holder(board.admit(source(third, Place::Kept))), Some((OTHER, Place::Kept)));
}

#[test]
fn connections_are_their_migrations_alone() {
    let board = TestBoard::default();
    let take = |of, deadline| board.take(of, deadline, || Ok(()), Vec::pop);
    assert!(!keep(&board, SOURCE, 7));
    board.admit(source(SOURCE, Place::Kept));
    assert!(!keep(&board, OTHER, 7));
    assert_eq!(take(SOURCE, Some(Instant::now())).unwrap(), None);
    assert!(keep(&board, SOURCE, 8));
    assert_eq!(accept(&board), SOURCE);
    assert_eq!(take(SOURCE, None).unwrap(), Some(8));
    let none = take(OTHER, None).unwrap_err();
    assert!(matches!(none, TransportError::OutOfOrder(_)), "{none:?}");
    assert!(keep(&board, SOURCE, 9));
    board.end_migration();
    board.admit(source(SOURCE, Place::Kept));
    assert_eq!(take(SOURCE, Some(Instant::now())).unwrap(), None, "it was another migration");
}

/// Whether they look before it happens or after.
#[test]
fn whoever_waits_looks_again_when_something_changes() {
    let board = Arc::new(TestBoard::default());
    let over = AtomicBool::new(false);
    let check = || {
        let over = over.load(Ordering::SeqCst);
        if over { Err(TransportError::Displaced) } else { Ok(()) }
    };
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let id = board.next_migration(None, || Ok(()))?.migration;
            board.take(id, None, || Ok(()), Vec::pop)
        });
        board.admit(source(SOURCE, Place::Kept));
        assert!(keep(&board, SOURCE, 5));
        assert_eq!(waiting.join().unwrap().unwrap(), Some(5));
        let waiting = scope.spawn(|| board.take(SOURCE, None, check, Vec::pop));
        over.store(true, Ordering::SeqCst);
        board.waker()();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, TransportError::Displaced), "{error:?}");
    });
}

#[test]
fn interrupts_and_a_thread_that_ended_end_waits() {
    let board = TestBoard::default();
    board.admit(source(SOURCE, Place::Kept));
    assert!(!board.is_stopped());
    board.stop(Some(io::Error::from_raw_os_error(24)));
    assert!(board.is_stopped());
    for stopped in [
        board.next_migration(None, || Ok(())).map(drop).unwrap_err(),
        board.take(SOURCE, None, || Ok(()), Vec::pop).map(drop).unwrap_err(),
    ] {
        let TransportError::Io { cause, .. } = stopped else { panic!("{stopped:?}") };
        assert_eq!(cause.raw_os_error(), Some(24));
    }
    let left: Vec<_> = board.left_over().iter().map(|source| source.migration).collect();
    assert_eq!(left, [SOURCE]);
    board.interrupt();
    let interrupted = board.next_migration(None, || Ok(())).unwrap_err();
    assert!(matches!(interrupted, TransportError::Interrupted), "{interrupted:?}");
}
