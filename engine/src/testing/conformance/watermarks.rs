//! Tickets and watermarks: true, growing, and as prompt as the caller asked.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::Trial;
use super::fixture::{
    VERY_LONG, batches, check_marks, data, drain, is_zero, look, release, send, settle, wait, zero,
};
use crate::transport::{LandingWatch, Run, RunKind, TransportError, Watermarks};

/// Tickets are 1, 2, 3 and so on, of zero runs as of data.
pub(super) fn tickets_count_from_one(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(20);
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        for expected in 1..=300 {
            let run = if expected % 3 == 0 { zero(0, 1, 1) } else { data(0, expected, 1) };
            assert_eq!(send(&mut sender, &[run]), expected, "the ticket of a batch");
        }
        settle(&mut sender, 300);
        sender.finish().expect("the channel ends");
    });
}

/// How long a batch is left lying that nobody receives.
const UNRECEIVED: Duration = Duration::from_secs(2);

/// When a batch has landed its bytes are in the destination's memory, without any further help.
pub(super) fn landed_means_landed(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    let most = opened.batch_pages();
    let whole = batches(most, 2, most).remove(0);
    let (checked, to_be_checked) = bounded::<()>(1);
    trial.watch.together(|crew| {
        crew.spawn(|| {
            // Until then nobody receives: what is said to have landed must be there all the same. A
            // transport may have a send wait for its receiver, and then only the rest is checked.
            let _ = to_be_checked.recv_timeout(UNRECEIVED);
            drain(&mut receiver);
        });
        opened.here.fill_page(0, 0, 9);
        let ticket = send(&mut sender, &[data(0, 0, 1)]);
        for time in [None, Some(Duration::from_millis(20)), None] {
            let marks = sender.watermarks(time).expect("watermarks");
            let there = opened.here.read(0, 0) == opened.there.read(0, 0);
            assert!(marks.landed < ticket || there, "landed before anybody received: {marks:?}");
        }
        checked.send(()).ok();
        for page in 1..50 {
            opened.here.fill_page(0, page, 9);
            let ticket = send(&mut sender, &[data(0, page, 1)]);
            settle(&mut sender, ticket);
            let there = opened.here.read(0, page) == opened.there.read(0, page);
            assert!(there, "page {page} landed and is not there");
        }
        // Much at once: its last page is written last.
        for version in 0..20 {
            opened.here.fill_page(2, most - 1, version);
            let ticket = send(&mut sender, &whole);
            settle(&mut sender, ticket);
            let there = opened.here.read(2, most - 1) == opened.there.read(2, most - 1);
            assert!(there, "the last page of a large batch landed and is not there");
        }
        // And zeroes.
        for version in 0..20 {
            opened.there.fill_page(2, most - 1, version);
            let ticket = send(&mut sender, &[zero(2, 0, u32::try_from(most).expect("small"))]);
            settle(&mut sender, ticket);
            let there = is_zero(&opened.there, 2, most - 1);
            assert!(there, "the last page of a large zero run landed and is not there");
        }
        sender.finish().expect("the channel ends");
    });
}

/// Who watches what lands is told of every page once its bytes are there, and before the source can know.
pub(super) fn landings_are_told_before_the_source_knows(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    let told = Arc::new(Mutex::new(HashSet::new()));
    let (here, there, sink) = (opened.here.clone(), opened.there.clone(), Arc::clone(&told));
    let watched = receiver.watch_landings(LandingWatch::new(move |runs| {
        for Run { range, kind } in runs {
            for page in range.first_page..range.first_page + u64::from(range.pages) {
                let is_there = match kind {
                    RunKind::Data => {
                        here.read(range.region, page) == there.read(range.region, page)
                    }
                    RunKind::Zero => is_zero(&there, range.region, page),
                };
                assert!(is_there, "page {page} was told of and is not there");
                sink.lock().expect("no panic").insert((range.region, page));
            }
        }
    }));
    if !opened.tells_landings() {
        assert!(matches!(watched, Err(TransportError::Unsupported(_))), "{watched:?}");
        return;
    }
    watched.expect("a watch");
    let most = opened.batch_pages();
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        for version in 1..=100 {
            opened.here.fill_page(0, version, version);
            opened.there.fill_page(0, 500, version);
            let runs = [data(0, version, 1), zero(0, 500, 1)];
            let ticket = send(&mut sender, &runs);
            settle(&mut sender, ticket);
            let mut told = told.lock().expect("no panic");
            let all = told.remove(&(0, version)) && told.remove(&(0, 500));
            assert!(
                all && told.is_empty(),
                "batch {version} landed, and it was told of others: {told:?}"
            );
        }
        let ticket = send(&mut sender, &batches(most, 2, most).remove(0));
        settle(&mut sender, ticket);
        let count = told.lock().expect("no panic").len() as u64;
        assert_eq!(count, most, "pages of a large batch that were told of");
        sender.finish().expect("the channel ends");
    });
}

/// When a batch is released its pages are not read any more: what is written to them then does not
/// arrive.
pub(super) fn released_means_released(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    let most = opened.batch_pages();
    let last_page = most - 1;
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        for version in 0..30 {
            opened.here.fill_page(2, last_page, version);
            opened.here.fill_page(0, 0, version);
            let sent = (opened.here.read(0, 0), opened.here.read(2, last_page));
            send(&mut sender, &batches(most, 2, most).remove(0));
            let ticket = send(&mut sender, &[data(0, 0, 1)]);
            release(&mut sender, ticket);
            opened.here.fill_page(2, last_page, 1 << 32);
            opened.here.fill_page(0, 0, 1 << 32);
            settle(&mut sender, ticket);
            let right = (opened.there.read(0, 0), opened.there.read(2, last_page)) == sent;
            assert!(right, "a page was read after its batch was released");
        }
        sender.finish().expect("the channel ends");
    });
}

/// Watermarks never go back nor beyond what was sent, however they are asked for.
pub(super) fn watermarks_only_grow(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(21);
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        let mut before = Watermarks::default();
        let mut last = 0;
        for round in 0..300 {
            last = send(&mut sender, &[data(2, round, 2)]);
            for time in [None, (round % 4 == 0).then_some(Duration::from_micros(300)), None] {
                let marks = sender.watermarks(time).expect("watermarks");
                check_marks(before, marks, last);
                before = marks;
            }
        }
        settle(&mut sender, last);
        // And when nothing is under way any more.
        let at_the_end = look(&mut sender);
        for time in [None, Some(Duration::from_millis(1))].repeat(8) {
            let marks = sender.watermarks(time).expect("watermarks");
            assert_eq!(marks, at_the_end, "watermarks after all has landed");
        }
        sender.finish().expect("the channel ends");
    });
}

/// Without a time, nobody waits: neither for batches that cannot land, nor for others.
pub(super) fn a_look_does_not_wait(trial: &Trial) {
    let (opened, mut sender, _receiver) = trial.open_one();
    opened.here.fill(22);
    send(&mut sender, &[data(0, 0, 1)]);
    trial.watch.together(|crew| {
        let looking = crew.spawn(|| {
            let looks = (0..20).map(|_| {
                let began = Instant::now();
                look(&mut sender);
                began.elapsed()
            });
            looks.min().expect("some")
        });
        // The shortest, since a busy machine makes any of them long.
        let shortest = looking.join_promptly("looks at the watermarks do not wait");
        assert!(shortest < Duration::from_millis(5), "a look at the watermarks took {shortest:?}");
    });
}

/// A wait in which nothing lands ends when its time is over, not before and not much later.
pub(super) fn a_wait_is_as_long_as_asked(trial: &Trial) {
    let (opened, mut sender, _receiver) = trial.open_one();
    opened.here.fill(23);
    let ticket = send(&mut sender, &[data(0, 0, 1)]);
    let time = Duration::from_millis(50);
    trial.watch.together(|crew| {
        let waiting = crew.spawn(|| {
            let waits = (0..5).map(|_| {
                let before = look(&mut sender);
                let began = Instant::now();
                let marks = wait(&mut sender, time);
                check_marks(before, marks, ticket);
                // One-sided batches land with nobody receiving.
                let ends_early = marks.landed > before.landed || marks.landed == ticket;
                (!ends_early).then(|| began.elapsed())
            });
            waits.flatten().collect::<Vec<_>>()
        });
        let waits = waiting.join_promptly("waits for batches to land end in time");
        if let (Some(shortest), Some(longest)) = (waits.iter().min(), waits.iter().max()) {
            let early = *shortest < time * 9 / 10;
            assert!(!early, "a wait of {time:?} for batches to land ended after {shortest:?}");
            // The shortest, since a busy machine makes any of them long.
            let late = *shortest > time * 6;
            assert!(!late, "waits of {time:?} took {shortest:?} to {longest:?}");
        }
    });
}

/// A wait ends as soon as something lands, without another batch to push it; and when all has
/// landed there is none.
pub(super) fn a_wait_ends_when_batches_land(trial: &Trial) {
    for late in [false, true] {
        let (opened, mut sender, mut receiver) = trial.open_one();
        opened.here.fill(24);
        trial.watch.together(|crew| {
            let waiting = crew.spawn(|| {
                for page in 0..10 {
                    send(&mut sender, &[zero(0, 600, 1)]);
                    let ticket = send(&mut sender, &[data(0, page, 1)]);
                    while look(&mut sender).landed < ticket {
                        wait(&mut sender, VERY_LONG);
                    }
                    // Nothing is under way: at once.
                    assert_eq!(wait(&mut sender, VERY_LONG).landed, ticket, "what has landed");
                }
                sender.finish().expect("the channel ends");
            });
            if late && !opened.one_sided() {
                crew.await_standstill("the source's watermarks");
            }
            crew.spawn(|| drain(&mut receiver));
            waiting.join_promptly("a wait ends when batches land, and when all has landed");
        });
    }
}
