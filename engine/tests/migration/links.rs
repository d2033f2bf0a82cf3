//! Links that are slow, choppy and out of order, and links that are cut.

use std::time::Duration;

use pageferry::Blame;
use pageferry::testing::faulty::{Faults, FaultySource};

use crate::scene::Scene;

#[test]
fn trouble_within_the_contract_is_survived() {
    for seed in 0..4 {
        eprintln!("seed {seed}");
        let faults = Faults {
            delay_at_most: Duration::from_micros(30),
            pieces_of_pages: Some(2 + 3 * u32::try_from(seed).unwrap()),
            reorder_depth: 4,
            ..Faults::default()
        };
        Scene::new().play(|link| Box::new(FaultySource::new(link, faults, seed))).expect_moved();
    }
}

#[test]
fn a_link_cut_while_pages_flow_leaves_the_guest_at_the_source() {
    for pages in [0, 1, 100, 1500, 2100] {
        let faults = Faults { cut_after_page_bytes: Some(pages * 4096), ..Faults::default() };
        let outcome = Scene::new().play(|link| Box::new(FaultySource::new(link, faults, pages)));
        let not_landed = outcome.log.put_back.lock().unwrap().count();
        let (error, _) = outcome.expect_kept();
        assert_eq!(error.blame(), Blame::Transport, "{error:?}");
        // What had not landed was put back: at least what never went out.
        let sent_at_most = pages;
        assert!(not_landed >= 2100 - sent_at_most, "{not_landed} put back after {pages}");
    }
}

#[test]
fn a_link_cut_at_any_control_message_is_safe() {
    const COMMIT: u16 = 8;
    // How many messages a migration takes is not the same each time, so the one that matters most is
    // told by its type.
    let by_count =
        (0..20).map(|frames| Faults { cut_after_frames: Some(frames), ..Faults::default() });
    let at_the_commit = Faults { cut_before_message: Some(COMMIT), ..Faults::default() };
    let mut ends = [0_u32; 3];
    for faults in by_count.chain([at_the_commit, Faults::default()]) {
        let outcome = Scene::new().play(|link| Box::new(FaultySource::new(link, faults, 1)));
        let source_runs = match &outcome.source {
            Ok(departed) => departed.machine.is_running(),
            Err(failure) => failure.machine.is_running(),
        };
        let destination_runs = match &outcome.destination {
            Ok(Ok(arrived)) => arrived.machine.is_running(),
            Ok(Err(failure)) => failure.machine.is_running(),
            Err(_) => false,
        };
        let uncertain = matches!(&outcome.source, Err(failure) if failure.error.is_uncertain())
            || matches!(&outcome.destination, Ok(Err(failure)) if failure.error.is_uncertain());
        assert!(!(source_runs && destination_runs), "two guests: {faults:?}");
        assert!(source_runs || destination_runs || uncertain, "no guest: {faults:?}");
        assert!(uncertain || faults.cut_before_message.is_none(), "certain without a commit");
        ends[if uncertain { 2 } else { usize::from(destination_runs) }] += 1;
    }
    assert!(ends.iter().all(|count| *count > 0), "kept, moved, uncertain: {ends:?}");
}
