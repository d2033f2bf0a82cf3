//! Whatever writes come between harvest, re-arm, read and send, the destination ends with the
//! newest bytes.
//!
//! The guest is a script: a few writes at every step of the engine that could lose one. What each
//! page holds last is known from the script alone, by a model that knows no threads, channels or
//! bitmaps. The tracker is as unforgiving as its contract allows: it reports a write only to a
//! page that was armed.

mod guest;
mod links;
mod migration;
mod random;

use pageferry::Timeouts;

use guest::Stall;
use migration::{Migration, SHORT_BATCHES, assert_newest};

/// A guest that writes on after each way of calling a switchover off, over channels that are lost
/// and lag.
#[test]
fn what_is_written_after_a_switchover_was_called_off_is_not_lost() {
    let script = vec![vec![(6, false), (0, false), (9, true)]; 3000];
    for stalls in [vec![Stall::Pages], vec![Stall::Release], vec![Stall::Release, Stall::Pages]] {
        let migration = Migration {
            script: script.clone(),
            stalls,
            channels: 3,
            lose_channel: Some((1, 40)),
            silently: None,
            reorder_depth: 0,
            late_channel: None,
            link: SHORT_BATCHES,
            seed: 1,
        };
        assert_newest(migration);
    }
}

/// The same where a channel falls silent, so that nobody but the source can know.
#[test]
fn what_a_silent_channel_had_under_way_is_not_lost() {
    let migration = Migration {
        script: vec![vec![(6, false), (0, false), (9, true)]; 3000],
        stalls: vec![Stall::Release],
        channels: 3,
        lose_channel: Some((1, 40)),
        silently: Some(Timeouts::default().stall),
        reorder_depth: 0,
        late_channel: Some(2),
        link: SHORT_BATCHES,
        seed: 1,
    };
    assert_newest(migration);
}

/// The third page of a stripe that changes hands between two channels when a third one is lost,
/// while its first owner's batches are still under way.
#[test]
fn what_a_former_owner_sent_does_not_land_on_newer_bytes() {
    let migration = Migration {
        script: vec![vec![(6, false)]; 2000],
        stalls: Vec::new(),
        channels: 3,
        lose_channel: Some((1, 0)),
        silently: None,
        reorder_depth: 0,
        late_channel: Some(2),
        link: SHORT_BATCHES,
        seed: 1,
    };
    assert_newest(migration);
}
