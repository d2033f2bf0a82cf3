//! What arrives, whatever the guest writes meanwhile.

use std::time::Duration;

use pageferry::testing::TestMemory;
use pageferry::{Error, Event};

use crate::scene::{REGION_PAGES, Scene, WORKING_SET};
use crate::support::SoftwareLog;

#[test]
fn a_busy_guest_moves_with_any_number_of_channels() {
    for channels in [1, 2, 5, 8] {
        let mut scene = Scene::new();
        scene.source = scene.source.channels(channels);
        let (departed, arrived) = scene.play(|link| link).expect_moved();
        let statistics = departed.statistics;
        assert!(statistics.rounds.len() >= 2, "{statistics:?}");
        assert!(statistics.pages.data >= 2100, "{statistics:?}");
        assert!(statistics.pages.zero >= REGION_PAGES.iter().sum::<u64>() - 2100);
        assert_eq!(arrived.statistics.pages.data, statistics.pages.data);
        // The in-memory transport copies, and says so.
        assert_eq!(statistics.user_copied_bytes, statistics.pages.data * 4096);
        let parts = statistics.downtime;
        assert!(parts.total() > Duration::ZERO && parts.standstill() >= parts.total());
        assert!(parts.standstill() <= statistics.total);
    }
}

#[test]
fn pages_that_are_zero_are_not_touched_on_either_side() {
    let mut scene = Scene::new();
    scene.here = TestMemory::of_memfds(&REGION_PAGES);
    scene.there = TestMemory::of_memfds(&REGION_PAGES);
    scene.log = SoftwareLog::new(&scene.here);
    (0..1000).for_each(|page| scene.here.fill_page(0, page, 1));
    // Zero pages that the source has touched are not touched at the destination either.
    (1000..2000).for_each(|page| scene.here.write(0, page, &[0; 4096]));
    let (here, there) = (scene.here.clone(), scene.there.clone());
    let before = here.allocated_bytes();
    let (_, arrived) = scene.play(|link| link).expect_moved_without_reading();
    // One page more at the source: saving the machine writes it.
    assert_eq!(here.allocated_bytes(), before + 4096);
    // The guest makes some of its pages zero; those are not touched either.
    assert!(there.allocated_bytes() <= 1001 * 4096, "{}", there.allocated_bytes());
    // Only pages that were sent as data before are mentioned as zero.
    assert!(arrived.statistics.pages.zero <= arrived.statistics.pages.data);
}

#[test]
fn memory_is_populated_ahead_where_there_is_data() {
    let mut scene = Scene::new();
    scene.here = TestMemory::of_memfds(&REGION_PAGES);
    scene.there = TestMemory::of_memfds(&REGION_PAGES);
    scene.log = SoftwareLog::new(&scene.here);
    (500..1500).for_each(|page| scene.here.fill_page(0, page, 1));
    scene.destination = scene.destination.populate_ahead(2);
    let there = scene.there.clone();
    let (_, arrived) = scene.play(|link| link).expect_moved_without_reading();
    let populated = arrived.statistics.populated;
    assert_eq!(populated.threads, 2);
    assert!(populated.bytes > 0 && populated.took > Duration::ZERO, "{populated:?}");
    // What the guest has written since, and nothing that is zero.
    assert!(there.allocated_bytes() <= 1501 * 4096, "{}", there.allocated_bytes());
}

/// What a dirty source misses is lost at the destination, and only comparing memory tells.
#[test]
fn memory_that_differs_is_found_before_the_commit() {
    let mut scene = Scene::new();
    let here = scene.here.clone();
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::GuestPaused) {
            // Behind the log's back.
            here.fill_page(0, WORKING_SET, 99);
        }
    });
    let (error, there) = scene.play(|link| link).expect_kept();
    assert!(matches!(error, Error::MemoryDiffers { .. }), "{error:?}");
    assert!(matches!(there, Some(Error::PeerFailed { .. })), "{there:?}");
}
