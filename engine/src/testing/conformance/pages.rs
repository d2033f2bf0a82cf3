//! Pages: in their place, in order, and no others.

use super::Trial;
use super::fixture::{
    Opened, REGION_PAGES, batches, data, drain, is_zero, release, run, send, settle, zero,
};
use crate::pages::memory::PAGE_BYTES;
use crate::testing::Random;
use crate::transport::{PageCounts, Run, RunKind, TransportError};

/// Every page of every region lands in its place, and nothing else is touched.
pub(super) fn pages_land_in_place(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(1);
    // The last page of the last region is left out.
    let region_pages = [REGION_PAGES[0], REGION_PAGES[1], REGION_PAGES[2] - 1];
    let pages: u64 = region_pages.iter().sum();
    trial.watch.together(|crew| {
        let receiving = crew.spawn(|| drain(&mut receiver));
        let mut last = 0;
        for (region, count) in (0..).zip(region_pages) {
            for batch in batches(opened.batch_pages().min(256), region, count) {
                last = send(&mut sender, &batch);
            }
        }
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
        let counts = receiving.join();
        if !opened.one_sided() {
            let expected = PageCounts { data: pages, ..PageCounts::default() };
            assert_eq!(counts, expected, "pages that the receiver counted");
        }
    });
    let left_out = (2, REGION_PAGES[2] - 1);
    let differs = opened.here.first_difference(&opened.there);
    assert_eq!(differs, Some(left_out), "the first page (region, page) that differs");
    assert!(is_zero(&opened.there, left_out.0, left_out.1), "a page was touched that was not sent");
}

/// Many channels at once, each with pages of its own in scattered runs.
pub(super) fn channels_work_side_by_side(trial: &Trial) {
    for channels in [2_u16, 8] {
        let mut opened = trial.open(channels);
        opened.here.fill(u64::from(channels));
        let most = usize::try_from(opened.batch_pages()).expect("small");
        let at_once = opened.source.capabilities().max_batch_runs.min(50).min(most);
        trial.watch.together(|crew| {
            for receiver in &mut opened.receivers {
                crew.spawn(|| drain(receiver));
            }
            for (channel, sender) in (0..).zip(&mut opened.senders) {
                crew.spawn(move || {
                    let mut last = 0;
                    for (region, pages) in (0..).zip(REGION_PAGES) {
                        let mine: Vec<Run> = (0..pages)
                            .filter(|page| page % u64::from(channels) == channel)
                            .map(|page| data(region, page, 1))
                            .collect();
                        for batch in mine.chunks(at_once) {
                            last = send(sender, batch);
                        }
                    }
                    settle(sender, last);
                    sender.finish().expect("the channel ends");
                });
            }
        });
        let differs = opened.here.first_difference(&opened.there);
        assert_eq!(differs, None, "the first page that differs with {channels} channels");
    }
}

/// Channel `i` here is channel `i` there. Told by zero runs, which a CPU sees on every transport.
pub(super) fn channels_are_the_same_at_both_ends(trial: &Trial) {
    let mut opened = trial.open(4);
    trial.watch.together(|crew| {
        let channels = (1..).zip(&mut opened.senders).zip(&mut opened.receivers);
        let counts: Vec<_> = channels
            .map(|((pages, sender), receiver)| {
                crew.spawn(move || {
                    let ticket = send(sender, &[zero(2, u64::from(pages) * 10, pages)]);
                    settle(sender, ticket);
                    sender.finish().expect("the channel ends");
                });
                crew.spawn(|| drain(receiver))
            })
            .collect();
        let counts: Vec<u64> = counts.into_iter().map(|counts| counts.join().zero).collect();
        assert_eq!(counts, [1, 2, 3, 4], "zero pages by channel");
    });
}

/// The same page many times over: what was sent last is what stays.
pub(super) fn the_newest_bytes_win(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        for version in 0..200 {
            opened.here.fill_page(2, 7, version);
            let ticket = send(&mut sender, &[data(2, 7, 1)]);
            // The page may be written again once it is not read any more.
            release(&mut sender, ticket);
        }
        sender.finish().expect("the channel ends");
    });
    let same = opened.here.read(2, 7) == opened.there.read(2, 7);
    assert!(same, "an older version of a page is what stays");
}

/// Batches that follow one another without a wait land in their order: each page is made zero and
/// not zero again and again, and is what was said last.
pub(super) fn batches_land_in_order(trial: &Trial) {
    const PAGES: u64 = 40;
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(12);
    let mut random = Random::new(12);
    let kinds: Vec<(u64, RunKind)> = (0..600)
        .map(|_| {
            let kind = if random.below(2) == 0 { RunKind::Zero } else { RunKind::Data };
            (random.below(PAGES), kind)
        })
        .collect();
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        let mut last = 0;
        // Twice the other way round: any two neighbours that change places leave a page wrong.
        for (page, kind) in &kinds {
            let before = if *kind == RunKind::Zero { RunKind::Data } else { RunKind::Zero };
            send(&mut sender, &[run(0, *page, 1, before)]);
            last = send(&mut sender, &[run(0, *page, 1, *kind)]);
            if last % 64 == 0 {
                settle(&mut sender, last);
                let right = (*kind == RunKind::Zero) == is_zero(&opened.there, 0, *page);
                assert!(right, "batches before the {last}th landed in another order");
            }
        }
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
    });
    for page in 0..PAGES {
        let said_last = kinds.iter().rev().find(|(other, _)| *other == page).map(|(_, kind)| *kind);
        let right = match said_last {
            Some(RunKind::Data) => opened.there.read(0, page) == opened.here.read(0, page),
            _ => is_zero(&opened.there, 0, page),
        };
        assert!(right, "page {page} is not what was sent last");
    }
}

/// Batches with the most runs there may be, and with the most bytes.
pub(super) fn batches_as_large_as_can_be_land(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(13);
    let most_runs = opened.source.capabilities().max_batch_runs as u64;
    let most_pages = opened.batch_pages();
    // Every other page, so that no run continues another.
    let scattered = |runs: u64, kind| -> Vec<Run> {
        (0..runs.min(REGION_PAGES[2] / 2)).map(|index| run(2, index * 2, 1, kind)).collect()
    };
    let data_runs = scattered(most_runs.min(most_pages), RunKind::Data);
    let zero_runs = scattered(most_runs, RunKind::Zero);
    let bytes = data(2, 0, u32::try_from(most_pages).expect("small"));
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        let last = send(&mut sender, &data_runs);
        settle(&mut sender, last);
        for (index, sent) in data_runs.iter().enumerate() {
            let page = sent.range.first_page;
            let landed = opened.there.read(2, page) == opened.here.read(2, page);
            assert!(landed, "run {index} of a batch of {} is not there", data_runs.len());
            assert!(is_zero(&opened.there, 2, page + 1), "a page between the runs was touched");
        }
        let last = send(&mut sender, &[bytes]);
        settle(&mut sender, last);
        for page in 0..most_pages {
            let landed = opened.there.read(2, page) == opened.here.read(2, page);
            assert!(landed, "page {page} of a batch of {most_pages} pages is not there");
        }
        // Whatever is there, zero runs make it zero.
        opened.there.fill(17);
        let last = send(&mut sender, &zero_runs);
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
    });
    for (index, sent) in zero_runs.iter().enumerate() {
        let zero = is_zero(&opened.there, 2, sent.range.first_page);
        assert!(zero, "zero run {index} of a batch of {} is not there", zero_runs.len());
    }
}

/// Zero runs make pages zero, in order with the data around them.
pub(super) fn zero_runs_zero_pages(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(3);
    trial.watch.together(|crew| {
        crew.spawn(|| drain(&mut receiver));
        send(&mut sender, &[data(0, 0, 20)]);
        send(&mut sender, &[zero(0, 5, 10)]);
        // Mixed, and data again over zero.
        let last = send(&mut sender, &[data(0, 6, 1), zero(0, 0, 2), data(0, 9, 2)]);
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
    });
    for page in 0..20 {
        let zero = matches!(page, 0 | 1 | 5 | 7 | 8 | 11..=14);
        let expected = if zero { vec![0; 4096] } else { opened.here.read(0, page) };
        assert!(opened.there.read(0, page) == expected, "page {page} around zero runs");
    }
}

/// Zero runs of every length zero all of their pages and none beside them, and end up counted.
pub(super) fn long_zero_runs_zero_pages(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.there.fill(14);
    let runs =
        [zero(2, 1, 1), zero(2, 10, 16), zero(2, 40, 17), zero(2, 100, 64), zero(2, 200, 1000)];
    let runs = [&runs[..], &[zero(0, 1, 512), zero(1, 0, 1)]].concat();
    let counted = trial.watch.together(|crew| {
        let receiving = crew.spawn(|| drain(&mut receiver));
        let mut last = 0;
        for run in &runs {
            last = send(&mut sender, &[*run]);
        }
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
        receiving.join()
    });
    for (region, pages) in (0..).zip(REGION_PAGES) {
        for page in 0..pages {
            let run = runs.iter().find(|run| {
                let first = run.range.first_page;
                let covers = (first..first + u64::from(run.range.pages)).contains(&page);
                run.range.region == region && covers
            });
            let zero = is_zero(&opened.there, region, page);
            let what = "page (region, page) in a long zero run or beside it";
            assert!(zero == run.is_some(), "{what}: {:?}", (region, page));
        }
    }
    assert_eq!(counted, PageCounts::of(&runs), "zero pages that the receiver counted");
}

/// Sends batches that must be refused, each on a pair of its own, and looks whether something of
/// them went out all the same.
fn refused(
    trial: &Trial,
    batches: impl Fn(&Opened) -> Vec<(Vec<Run>, &'static str)>,
    is_right: fn(&TransportError) -> bool,
) {
    let mut index = 0;
    loop {
        let (opened, mut sender, mut receiver) = trial.open_one();
        opened.here.fill(15);
        let mut batches = batches(&opened);
        if index == batches.len() {
            return;
        }
        let (batch, what) = batches.swap_remove(index);
        let result = sender.send(&batch);
        let right = result.as_ref().is_err_and(is_right);
        assert!(right, "{what}: {result:?}");
        trial.watch.together(|crew| {
            let receiving = crew.spawn(|| receiver.receive().map(drop));
            drop(sender);
            let result = receiving.join();
            assert!(result.is_err(), "{what} was refused, and something of it went out");
        });
        let batch = batch.iter().filter(|run| run.range.first_page < REGION_PAGES[1]);
        for run in batch.filter(|run| usize::from(run.range.region) < REGION_PAGES.len()) {
            let untouched = is_zero(&opened.there, run.range.region, run.range.first_page);
            assert!(untouched, "{what} was refused, and something of it landed");
        }
        index += 1;
    }
}

/// A batch over the transport's own limits is refused before anything is sent.
pub(super) fn batches_beyond_the_limits_are_refused(trial: &Trial) {
    let too_large = |opened: &Opened| {
        let capabilities = opened.source.capabilities();
        let runs = (0..=capabilities.max_batch_runs as u64).map(|index| index * 2);
        let mut batches = Vec::new();
        // Where they fit into memory; and data only where it is not too many bytes anyway.
        if capabilities.max_batch_runs as u64 * 2 < REGION_PAGES[2] {
            batches.push((runs.map(|page| zero(2, page, 1)).collect(), "a batch of too many runs"));
        }
        let pages = capabilities.max_batch_bytes / PAGE_BYTES;
        if pages < REGION_PAGES[2] {
            let pages = u32::try_from(pages).expect("small");
            batches.push((vec![data(1, 0, 1), data(2, 0, pages)], "a batch of too many bytes"));
        }
        batches
    };
    refused(trial, too_large, |error| matches!(error, TransportError::TooLarge { .. }));
}

/// Nothing outside guest memory is ever read or mentioned, and nothing goes out with it.
pub(super) fn runs_outside_guest_memory_are_refused(trial: &Trial) {
    let outside = |_: &Opened| {
        let mut batches = Vec::new();
        let places = [(0, REGION_PAGES[0], 1), (0, 699, 2), (3, 0, 1), (1, 0, 2), (0, u64::MAX, 1)];
        for (region, first_page, pages) in places {
            let [bytes, mention] =
                [RunKind::Data, RunKind::Zero].map(|kind| run(region, first_page, pages, kind));
            batches.push((vec![bytes], "a data run outside guest memory"));
            batches.push((vec![mention], "a zero run outside guest memory"));
        }
        let last = data(1, 0, 2);
        batches.push((vec![data(0, 0, 1), last], "a good run and one outside guest memory"));
        batches
    };
    refused(trial, outside, |error| matches!(error, TransportError::OutOfRange(_)));
}

/// Counters say at least what the pages are, at both ends, and only grow.
pub(super) fn counters_count(trial: &Trial) {
    let (opened, mut sender, mut receiver) = trial.open_one();
    opened.here.fill(16);
    let pages = 200;
    trial.watch.together(|crew| {
        let receiving = crew.spawn(|| drain(&mut receiver));
        let mut before = sender.counters();
        for batch in batches(opened.batch_pages().min(8), 2, pages) {
            let ticket = send(&mut sender, &batch);
            settle(&mut sender, ticket);
            let now = sender.counters();
            let grown = now.wire_bytes > before.wire_bytes
                && now.user_copied_bytes >= before.user_copied_bytes
                && now.system_calls >= before.system_calls;
            assert!(grown, "the sender's counters went from {before:?} to {now:?}");
            before = now;
        }
        sender.finish().expect("the channel ends");
        receiving.join();
    });
    let bytes = pages * PAGE_BYTES;
    let (sent, got) = (sender.counters(), receiver.counters());
    let enough = |wire_bytes| (bytes..bytes * 2).contains(&wire_bytes);
    assert!(enough(sent.wire_bytes), "the sender counts {sent:?} for {bytes} bytes of pages");
    let enough = opened.one_sided() || enough(got.wire_bytes);
    assert!(enough, "the receiver counts {got:?} for {bytes} bytes of pages");
}
