//! What whoever watches learns of a link that is lost.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::Kind;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::memory_transport;
use pageferry::transport::{LinkPurpose, SourceLink};
use pageferry::{MigrationHandle, Phase};

use crate::support::SoftwareLog;
use crate::trouble::{scene_with, timeouts};

/// Whether the guest writes: it has so long for that.
fn is_written_within(log: &SoftwareLog, time: Duration) -> bool {
    let (began, marks) = (Instant::now(), log.marks.load(Ordering::SeqCst));
    while began.elapsed() < time {
        if log.marks.load(Ordering::SeqCst) != marks {
            return true;
        }
        thread::yield_now();
    }
    false
}

#[test]
fn the_guest_runs_and_the_phase_is_told_while_there_is_no_link() {
    for (before, runs) in [(Kind::Round, true), (Kind::Prepare, true), (Kind::Commit, false)] {
        let scene = scene_with(timeouts());
        let handle: MigrationHandle = scene.source.handle();
        let log = Arc::clone(&scene.log);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&seen);
        let (dialler, rendezvous) = memory_transport::meeting();
        let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
            if purpose == LinkPurpose::Begin {
                let faults =
                    Faults { cut_before_message: Some(before as u16), ..Faults::default() };
                return Ok(Box::new(FaultySource::new(Box::new(link), faults, 1)));
            }
            let time = if runs { Duration::from_secs(20) } else { Duration::from_millis(20) };
            notes.lock().unwrap().push((handle.snapshot().phase, is_written_within(&log, time)));
            Ok(Box::new(link))
        });
        let outcome = scene.play_by(Box::new(dialler), Box::new(rendezvous));
        let (departed, _) = outcome.expect_moved();
        assert_eq!(departed.statistics.rejoins, 1, "{before}");
        assert_eq!(*seen.lock().unwrap(), [(Phase::LinkLost, runs)], "{before}");
        // The guest stood still for what was called off, and for the commit.
        assert_eq!(departed.statistics.called_off.is_zero(), before != Kind::Prepare, "{before}");
    }
}
