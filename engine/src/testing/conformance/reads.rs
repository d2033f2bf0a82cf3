//! What holds of lanes, by which the destination reads the source's memory.

use std::sync::Arc;
use std::time::Instant;

use super::fixture::{Opened, REGION_PAGES, interrupted, is_zero};
use super::{PROMPT, Trial};
use crate::pages::memory::{PAGE_BYTES, PageRange};
use crate::testing::TestMemory;
use crate::transport::{PageServer, ReadLane, Received, TransportError};

type Server = Box<dyn PageServer>;

fn range(region: u16, first_page: u64, pages: u32) -> PageRange {
    PageRange { region, first_page, pages }
}

/// Both ends of so many lanes, which land where the destination's memory is.
fn lanes(trial: &Trial, opened: &mut Opened, lanes: u16) -> (Vec<Server>, Vec<ReadLane>) {
    let Opened { source, destination, there, .. } = opened;
    let into = Arc::clone(there.memory());
    let (servers, readers) = trial.watch.together(|crew| {
        let opening = crew.spawn(|| destination.open_readers(lanes, &into, PROMPT));
        let servers = source.serve_reads(lanes).expect("lanes are served");
        (servers, opening.join().expect("lanes are opened"))
    });
    assert_eq!((servers.len(), readers.len()), (lanes.into(), lanes.into()), "number of lanes");
    (servers, readers)
}

fn lane(trial: &Trial, opened: &mut Opened) -> (Server, ReadLane) {
    let (mut servers, mut readers) = lanes(trial, opened, 1);
    (servers.remove(0), readers.remove(0))
}

/// Waits for what was asked for.
fn land(lane: &mut ReadLane) {
    let landed = lane.landings.receive().expect("what was asked for lands");
    assert!(matches!(landed, Received::Batch(_)), "{landed:?}");
}

fn read(lane: &mut ReadLane, ranges: &[PageRange]) {
    lane.requests.request(ranges).expect("pages are asked for");
    land(lane);
}

fn finish(lane: &mut ReadLane) {
    lane.requests.finish().expect("the lane ends");
    assert_eq!(lane.landings.receive().expect("the end"), Received::End);
}

/// A lane brings the source's pages to their place here and touches nothing else, until it ends in order.
pub(super) fn pages_are_read_into_place(trial: &Trial) {
    let mut opened = trial.open(1);
    opened.here.fill(7);
    // Also those that are zero at the source, and not here.
    opened.here.write(2, 101, &[0; 4096]);
    opened.there.fill_page(2, 101, 9);
    let (mut server, mut lane) = lane(trial, &mut opened);
    let wanted = [range(0, 3, 1), range(2, 100, 200), range(1, 0, 1)];
    trial.watch.together(|crew| {
        let serving = crew.spawn(move || server.serve());
        read(&mut lane, &wanted);
        finish(&mut lane);
        serving.join().expect("the destination has ended the lane");
    });
    let is_wanted = |region, page| {
        wanted.iter().any(|range| {
            let pages = range.first_page..range.first_page + u64::from(range.pages);
            range.region == region && pages.contains(&page)
        })
    };
    for (region, pages) in (0..).zip(REGION_PAGES) {
        for page in 0..pages {
            let right = if is_wanted(region, page) {
                opened.there.read(region, page) == opened.here.read(region, page)
            } else {
                is_zero(&opened.there, region, page)
            };
            assert!(right, "page {page} of region {region}");
        }
    }
}

/// Several requests are under way at once, each lands before the one after it, and none says so before it has.
pub(super) fn requests_land_in_order(trial: &Trial) {
    let mut opened = trial.open(1);
    opened.here.fill(7);
    let (mut server, lane) = lane(trial, &mut opened);
    let pages: Vec<_> = (0..300).collect();
    trial.watch.together(|crew| {
        let serving = crew.spawn(move || server.serve());
        let ReadLane { mut requests, mut landings } = lane;
        let asking = crew.spawn({
            let pages = pages.clone();
            move || {
                for (ticket, page) in (1..).zip(pages) {
                    let asked = requests.request(&[range(0, page, 1)]);
                    assert_eq!(asked.expect("pages are asked for"), ticket, "number of a request");
                }
                requests.finish()
            }
        });
        for page in pages {
            let landed = landings.receive().expect("what was asked for lands");
            assert!(matches!(landed, Received::Batch(_)), "{landed:?}");
            let right = opened.there.read(0, page) == opened.here.read(0, page);
            assert!(right, "page {page} has landed");
        }
        assert_eq!(landings.receive().expect("the end"), Received::End);
        asking.join().expect("all was asked for");
        serving.join().expect("the destination has ended the lane");
    });
}

/// What is urgent on one lane does not wait for what nobody takes on another.
pub(super) fn a_lane_waits_for_no_other(trial: &Trial) {
    let mut opened = trial.open(1);
    opened.here.fill(7);
    let pages = u32::try_from(opened.batch_pages()).expect("small");
    let (servers, mut readers) = lanes(trial, &mut opened, 2);
    trial.watch.together(|crew| {
        let serving: Vec<_> =
            servers.into_iter().map(|mut server| crew.spawn(move || server.serve())).collect();
        let mut background = readers.remove(0);
        for _ in 0..3 {
            background.requests.request(&[range(2, 0, pages)]).expect("pages are asked for");
        }
        let mut urgent = readers.remove(0);
        let began = Instant::now();
        for page in 0..50 {
            read(&mut urgent, &[range(0, page, 1)]);
        }
        assert!(began.elapsed() < PROMPT, "urgent requests took {:?}", began.elapsed());
        finish(&mut urgent);
        (0..3).for_each(|_| land(&mut background));
        finish(&mut background);
        for serving in serving {
            serving.join().expect("the destination has ended the lane");
        }
    });
}

/// What lands elsewhere than in registered memory touches nothing of that.
pub(super) fn pages_land_in_the_memory_that_was_given(trial: &Trial) {
    let mut opened = trial.open(1);
    opened.here.fill(7);
    let landing = TestMemory::new(&REGION_PAGES);
    let into = Arc::clone(landing.memory());
    let Opened { source, destination, .. } = &mut opened;
    let (mut servers, mut readers) = trial.watch.together(|crew| {
        let opening = crew.spawn(|| destination.open_readers(1, &into, PROMPT));
        let servers = source.serve_reads(1).expect("lanes are served");
        (servers, opening.join().expect("lanes are opened"))
    });
    let (mut server, mut lane) = (servers.remove(0), readers.remove(0));
    trial.watch.together(|crew| {
        let serving = crew.spawn(move || server.serve());
        read(&mut lane, &[range(0, 5, 2)]);
        finish(&mut lane);
        serving.join().expect("the destination has ended the lane");
    });
    for page in 0..REGION_PAGES[0] {
        assert!(is_zero(&opened.there, 0, page), "page {page} of registered memory");
        let right = if (5..7).contains(&page) {
            landing.read(0, page) == opened.here.read(0, page)
        } else {
            is_zero(&landing, 0, page)
        };
        assert!(right, "page {page}");
    }
}

/// Nothing is asked for that is too much, or lies outside of memory.
pub(super) fn requests_beyond_the_limits_are_refused(trial: &Trial) {
    let mut opened = trial.open(1);
    let limits = opened.destination.capabilities();
    let (mut server, mut lane) = lane(trial, &mut opened);
    let beyond = u32::try_from(limits.max_batch_bytes / PAGE_BYTES + 1).expect("small");
    let many = vec![range(0, 0, 1); limits.max_batch_runs + 1];
    trial.watch.together(|crew| {
        let serving = crew.spawn(move || server.serve());
        for outside in [range(0, REGION_PAGES[0] - 1, 2), range(3, 0, 1), range(0, u64::MAX, 1)] {
            let result = lane.requests.request(&[outside]);
            let refused = matches!(result, Err(TransportError::OutOfRange(_)));
            assert!(refused, "{outside:?}: {result:?}");
        }
        for large in [&[range(2, 0, beyond)][..], &many] {
            let result = lane.requests.request(large);
            assert!(matches!(result, Err(TransportError::TooLarge { .. })), "{result:?}");
        }
        lane.requests.request(&[]).expect_err("nothing is asked for");
        // Of what was refused nothing went out.
        read(&mut lane, &[range(0, 0, 1)]);
        finish(&mut lane);
        serving.join().expect("the destination has ended the lane");
    });
}

/// A lane that ends here ends there, in whatever way, and no other does.
pub(super) fn a_lane_ends_alone(trial: &Trial) {
    let mut opened = trial.open(1);
    opened.here.fill(7);
    let (mut servers, mut readers) = lanes(trial, &mut opened, 4);
    trial.watch.together(|crew| {
        let mut rest = servers.split_off(2).into_iter();
        let (ended, dropped) = (rest.next().expect("four"), rest.next().expect("four"));
        let serve = |mut server: Server| crew.spawn(move || server.serve());
        let (lives, deserted) = (serve(servers.remove(0)), serve(servers.remove(0)));
        let (stop, stopped) = (ended.interrupter(), serve(ended));
        // The source is gone.
        drop(dropped);
        let mut orphan = readers.pop().expect("four");
        let gone =
            orphan.requests.request(&[range(0, 0, 1)]).and_then(|_| orphan.landings.receive());
        gone.expect_err("nobody serves");
        // It is interrupted.
        stop.interrupt();
        interrupted(stopped.join(), "serve");
        let mut unserved = readers.pop().expect("four");
        let gone =
            unserved.requests.request(&[range(0, 0, 1)]).and_then(|_| unserved.landings.receive());
        gone.expect_err("nobody serves");
        // The destination is gone: in order or not, a source may not know.
        drop(readers.pop().expect("four"));
        let deserted = deserted.join();
        let over = matches!(deserted, Ok(()) | Err(TransportError::Lost { .. }));
        assert!(over, "serve: {deserted:?}");
        let mut lane = readers.pop().expect("four");
        read(&mut lane, &[range(0, 1, 1)]);
        finish(&mut lane);
        lives.join().expect("the destination has ended the lane");
    });
    assert!(opened.there.read(0, 1) == opened.here.read(0, 1));
}

/// Whoever waits on a lane, at either end, wakes up when its link is interrupted.
pub(super) fn an_interrupt_ends_all_lanes(trial: &Trial) {
    let mut opened = trial.open(1);
    let (mut server, mut lane) = lane(trial, &mut opened);
    let (here, there) = (opened.source.interrupter(), opened.destination.interrupter());
    trial.watch.together(|crew| {
        let serving = crew.spawn(move || server.serve());
        let landing = crew.spawn(move || {
            let landed = lane.landings.receive();
            (lane, landed)
        });
        there.interrupt();
        let (mut lane, landed) = landing.join_promptly("an interrupt ends the wait for a read");
        interrupted(landed, "receive");
        interrupted(lane.requests.request(&[range(0, 0, 1)]), "request");
        here.interrupt();
        let ended = serving.join_promptly("an interrupt ends a server");
        // It may have seen the other side's end before.
        let over = matches!(
            ended,
            Ok(()) | Err(TransportError::Interrupted | TransportError::Lost { .. })
        );
        assert!(over, "serve: {ended:?}");
    });
}
