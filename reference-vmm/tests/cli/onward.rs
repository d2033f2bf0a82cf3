//! Guests that move on where they came to, by commands alone; and some that are paused on the way.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::host::{guest_kind, skipped};
use crate::support::peer::closed_port;
use crate::support::process::Process;
use crate::support::sides::{
    SMALL, destination, destination_that_stays, source, source_that_stays,
};

/// Moves of one guest.
const MOVES: usize = 20;

#[test]
fn a_guest_moves_twenty_times() {
    // In an emulated machine a switchover takes long.
    let options = ["--verify", "--downtime-limit=10s"];
    let mut here = source_that_stays(&[&options[..], &["--vcpus=2"]].concat());
    let mut beats = here.beats();
    let began = Clock::of(&mut here);
    for number in 1..=MOVES {
        // The last one looks at its memory.
        let (mut there, address) = match number {
            MOVES => destination(&[]),
            _ => destination_that_stays(&[&options[..], &["--on-demand"]].concat()),
        };
        here.say(format!("migrate {address}"));
        let departed = here.await_report();
        departed.assert_departed();
        assert_eq!(departed.flag("memory_match"), Some(true));
        here.finish().assert_status(0);
        if number == MOVES {
            let arrived = there.finish().report(0);
            arrived.assert_arrived();
            assert!(arrived.count("heartbeats") > beats, "{arrived:?}");
            return;
        }
        let arrived = there.await_report();
        assert_eq!(arrived.text("outcome"), "completed");
        assert!(arrived.count("heartbeats") > beats, "{beats} before: {arrived:?}");
        beats = arrived.count("heartbeats");
        there.await_beats_beyond(beats);
        if let (Some(began), Some(now)) = (&began, Clock::of(&mut there)) {
            now.assert_goes_with_ours_since(began);
        }
        here = there;
    }
}

/// What a guest's own clock showed at a moment.
struct Clock {
    shows: Duration,
    /// Ours, before and after it was asked for.
    between: [Instant; 2],
}

/// How long a guest that runs may not have looked at its clock, on a busy machine.
const GLANCE: Duration = Duration::from_millis(300);

impl Clock {
    /// `None` of a guest that has none.
    fn of(process: &mut Process) -> Option<Self> {
        let before = Instant::now();
        process.say("status");
        let line = process.await_message("the guest runs here, ");
        let between = [before, Instant::now()];
        let Some((_, told)) = line.split_once("so far, ") else {
            skipped("the guest has no clock: no KVM, or one that does not tell how fast it goes");
            return None;
        };
        let seconds = told.split(' ').next().and_then(|word| word.parse().ok());
        let shows = Duration::from_secs_f64(seconds.unwrap_or_else(|| panic!("{line}")));
        Some(Self { shows, between })
    }

    /// As much time has gone by in the guest as here.
    fn assert_goes_with_ours_since(&self, earlier: &Self) {
        let passed = self.shows.checked_sub(earlier.shows).expect("it does not go back");
        let most = self.between[1] - earlier.between[0] + GLANCE;
        let least = (self.between[0] - earlier.between[1]).saturating_sub(GLANCE);
        assert!((least..=most).contains(&passed), "{passed:?}, and {least:?} to {most:?} here");
    }
}

#[test]
fn a_guest_moves_on_by_itself() {
    let (mut last, third) = destination(&[]);
    let (mut middle, second) =
        destination_that_stays(&["--migrate-to", &third, "--migrate-after=50ms"]);
    let mut first = source_that_stays(&["--migrate-to", &second]);
    first.say("migrate");
    first.finish().report(0).assert_departed();
    let [arrived, departed] = &middle.finish().reports[..] else { panic!("two reports") };
    assert_eq!(arrived.text("guest_at"), "destination");
    departed.assert_departed();
    last.finish().report(0).assert_arrived();
}

/// And stays where it is if it cannot.
#[test]
fn a_guest_that_arrived_stays_if_it_cannot_move_on() {
    let (_held, nowhere) = closed_port();
    let (mut middle, second) = destination(&["--migrate-to", &nowhere, "--migrate-after=1ms"]);
    let mut first = source_that_stays(&["--migrate-to", &second]);
    first.say("migrate");
    first.finish().report(0).assert_departed();
    let ended = middle.finish();
    let [arrived, failed] = &ended.reports[..] else { panic!("two reports") };
    assert_eq!(arrived.text("outcome"), "completed");
    assert_eq!((failed.text("outcome"), failed.text("guest_at")), ("failed", "source"));
    assert_eq!(failed.flag("oracle_ok"), Some(true), "{failed:?}");
}

#[test]
fn a_guest_from_a_file_moves_on() {
    let file = format!("{}/onward-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let save = ["save", &file, "--guest", guest_kind(), "--run-for=100ms"];
    let (status, _) = Process::start("save", &[&save, SMALL].concat()).finish_for_people();
    assert_eq!(status, Some(0));
    let (mut there, address) = destination(&[]);
    let restore = ["restore", &file, "--json", "--migrate-to", &address, "--migrate-after=50ms"];
    let (status, out) = Process::start("restore", &restore).finish_for_people();
    assert_eq!(status, Some(0), "{out}");
    let reports: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(reports.len(), 2, "{out}");
    assert_eq!(
        (&reports[0]["oracle_ok"], &reports[1]["guest_at"]),
        (&true.into(), &"destination".into())
    );
    there.finish().report(0).assert_arrived();
    std::fs::remove_file(file).expect("the file");
}

#[test]
fn a_paused_guest_arrives_paused_and_moves_on_paused() {
    let mut here = source_that_stays(&["--verify"]);
    let beats = here.beats();
    here.await_beats_beyond(beats);
    here.say("pause");
    let paused = here.await_message("the guest is paused here, ");
    for _ in 0..2 {
        let (mut there, address) = destination_that_stays(&["--verify"]);
        here.say(format!("migrate {address}"));
        here.await_message("guest is at the destination, paused as it was");
        let ended = here.finish();
        ended.assert_status(0);
        let departed = ended.reports.last().expect("a report");
        departed.assert_departed();
        assert_eq!(departed.flag("guest_paused"), Some(true));
        there.await_message("the guest is paused here, as it was");
        there.say("status");
        // It has not beaten meanwhile.
        assert_eq!(there.await_message("the guest is paused here, "), paused);
        let arrived = there.await_report();
        assert_eq!(arrived.text("outcome"), "completed");
        assert_eq!(arrived.flag("guest_paused"), Some(true));
        here = there;
    }
    here.say("resume");
    let beats = here.beats();
    here.await_beats_beyond(beats);
    here.signal(Signal::INT);
    here.finish().assert_status(0);
}

#[test]
fn a_paused_guest_whose_migration_fails_is_still_paused() {
    let (_held, nowhere) = closed_port();
    let mut here = source_that_stays(&[]);
    here.say("pause");
    let paused = here.await_message("the guest is paused here, ");
    here.say(format!("migrate {nowhere}"));
    let failed = here.await_report();
    assert_eq!((failed.text("outcome"), failed.text("guest_at")), ("failed", "source"));
    here.await_message("the guest is still paused here");
    here.say("status");
    assert_eq!(here.await_message("the guest is paused here, "), paused);
    here.say("resume");
    let beats = here.beats();
    here.await_beats_beyond(beats);
    here.say("quit");
    here.finish().assert_status(1);
}

/// What a migration that is under way has, the operator cannot pause meanwhile.
#[test]
fn a_guest_that_is_checked_in_the_end_may_be_paused() {
    let mut here = source(&[]);
    here.say("pause");
    here.await_message("the guest is paused here, ");
    here.say("pause");
    here.await_message("the guest is paused here, ");
    here.say("quit");
    let report = here.finish().report(3);
    assert_eq!(report.flag("oracle_ok"), Some(true), "{report:?}");
}
