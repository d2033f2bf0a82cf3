//! Data channels that are lost, fall silent, lag or are slow.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::testing::TestMemory;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::transport::SourceLink;
use pageferry::{Blame, Error, Event, Timeouts};

use crate::scene::Scene;
use crate::support::SoftwareLog;

#[test]
fn a_lost_channel_is_made_up_for_by_the_others() {
    for (seed, pages) in (0..).zip([0, 1, 200, 400]) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let mut scene = Scene::new();
        scene.source = scene.source.on_event(move |event| {
            if let Event::ChannelLost { channel } = event {
                sink.lock().unwrap().push(*channel);
            }
        });
        // What the lost channel sent last may land late.
        let faults = Faults {
            lose_channel: Some((1, pages * 4096)),
            delay_at_most: Duration::from_millis(1),
            reorder_depth: 4,
            ..Faults::default()
        };
        let wrap =
            |link| -> Box<dyn SourceLink> { Box::new(FaultySource::new(link, faults, seed)) };
        let (departed, arrived) = scene.play(wrap).expect_moved();
        assert_eq!(*events.lock().unwrap(), [1]);
        assert_eq!(departed.statistics.lost_channels, 1);
        assert_eq!(arrived.statistics.lost_channels, 1);
    }
}

#[test]
fn the_last_channel_cannot_be_made_up_for() {
    let mut scene = Scene::new();
    scene.source = scene.source.channels(1);
    let faults = Faults { lose_channel: Some((0, 1000 * 4096)), ..Faults::default() };
    let outcome = scene.play(|link| Box::new(FaultySource::new(link, faults, 1)));
    let not_landed = outcome.log.put_back.lock().unwrap().count();
    let (error, _) = outcome.expect_kept();
    // By this side's account, or by the destination's if it was heard first.
    assert!(matches!(error.blame(), Blame::Transport | Blame::PeerFailed), "{error:?}");
    assert!(not_landed >= 1100, "{not_landed}");
}

#[test]
fn a_channel_that_lags_is_given_less() {
    let weights = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&weights);
    let mut scene = Scene::new();
    (scene.here, scene.there) = (TestMemory::new(&[20_000]), TestMemory::new(&[20_000]));
    (0..10_000).for_each(|page| scene.here.fill_page(0, page, 1));
    scene.log = SoftwareLog::new(&scene.here);
    scene.source = scene.source.channels(2).on_event(move |event| {
        if let Event::Rebalanced { weights } = event {
            sink.lock().unwrap().push(weights.clone());
        }
    });
    let faults =
        Faults { slow_channel: Some((1, Duration::from_millis(200))), ..Faults::default() };
    let outcome = scene.play(|link| Box::new(FaultySource::new(link, faults, 1)));
    let (departed, _) = outcome.expect_moved_without_reading();
    let weights = weights.lock().unwrap();
    assert!(!weights.is_empty() && weights[0][1] < weights[0][0], "{weights:?}");
    assert_eq!(departed.statistics.rebalances as usize, weights.len());
}

/// A path that swallows what is sent on it, and says nothing.
#[test]
fn a_channel_that_falls_silent_is_closed_while_the_others_go_on() {
    for pages in [0, 300] {
        let faults = Faults { silent_channel: Some((1, pages * 4096)), ..Faults::default() };
        let outcome = Scene::new().play(|link| Box::new(FaultySource::new(link, faults, 1)));
        let (departed, arrived) = outcome.expect_moved();
        assert_eq!(departed.statistics.lost_channels, 1);
        assert_eq!(arrived.statistics.lost_channels, 1);
    }
}

/// The other end of a channel does not read, and no one else does either.
#[test]
fn the_only_channel_that_falls_silent_ends_the_migration_in_time() {
    let faults = Faults { silent_channel: Some((0, 300 * 4096)), ..Faults::default() };
    let mut scene = Scene::new();
    scene.source = scene.source.channels(1);
    let outcome = scene.play(|link| Box::new(FaultySource::new(link, faults, 1)));
    let (error, _) = outcome.expect_kept();
    assert!(matches!(error, Error::TimedOut { what: "pages to land", .. }), "{error:?}");
}

/// What many channels hand to a slow link takes its time to land; some of it always does.
#[test]
fn a_slow_link_with_many_channels_is_not_taken_for_a_dead_one() {
    let stall = Duration::from_secs(3);
    let mut scene = Scene::new();
    let timeouts = Timeouts { stall, ..Timeouts::default() };
    scene.source = scene.source.channels(16).timeouts(timeouts);
    // The pages that hold data take longer than nothing may land for.
    let rate = 2 << 20;
    assert!(2100 * 4096 / rate > stall.as_secs());
    let faults = Faults { rate: Some(rate), ..Faults::default() };
    let outcome = scene.play(|link| Box::new(FaultySource::new(link, faults, 1)));
    let (departed, _) = outcome.expect_moved();
    assert_eq!(departed.statistics.lost_channels, 0);
}
