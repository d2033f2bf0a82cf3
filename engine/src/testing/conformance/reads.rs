//! The case of one-sided reads.

use std::time::Instant;

use super::fixture::{REGION_PAGES, data, drain};
use super::{PROMPT, Trial};
use crate::pages::memory::PageRange;
use crate::transport::TransportError;

/// A reader brings the source's pages to their place here and touches nothing else, as long as the
/// source grants it. Without the capability both sides say that there is no such thing.
pub(super) fn pages_are_read_where_that_is_possible(trial: &Trial) {
    let mut opened = trial.open(1);
    let (mut source, mut destination) = (opened.source, opened.destination);
    if !destination.capabilities().one_sided_read {
        let none = (source.grant_reads().map(drop), destination.open_reader(PROMPT).map(drop));
        let unsupported = |result| matches!(result, Err(TransportError::Unsupported(_)));
        assert!(unsupported(none.0) && unsupported(none.1));
        return;
    }
    opened.here.fill(7);
    let (grant, mut reader) = trial.watch.together(|crew| {
        let opening = crew.spawn(|| destination.open_reader(PROMPT));
        let grant = source.grant_reads().expect("reads are granted");
        (grant, opening.join().expect("a reader opens"))
    });
    let range = |region, first_page, pages| PageRange { region, first_page, pages };
    let outside = [range(0, REGION_PAGES[0] - 1, 2), range(3, 0, 1), range(0, u64::MAX, 1)];
    for range in outside {
        let result = reader.read(&[range]);
        assert!(matches!(result, Err(TransportError::OutOfRange(_))), "{range:?}: {result:?}");
    }
    let wanted = [range(0, 3, 1), range(2, 100, 600), range(1, 0, 1)];
    reader.read(&wanted).expect("pages are read");
    let is_wanted = |region, page| {
        wanted.iter().any(|range| {
            let pages = range.first_page..range.first_page + u64::from(range.pages);
            range.region == region && pages.contains(&page)
        })
    };
    for (region, pages) in (0..).zip(REGION_PAGES) {
        for page in 0..pages {
            let got = opened.there.read(region, page);
            let right = if is_wanted(region, page) {
                got == opened.here.read(region, page)
            } else {
                got.iter().all(|byte| *byte == 0)
            };
            assert!(right, "page {page} of region {region}");
        }
    }
    // What the source writes is read, also while pages flow.
    opened.here.fill_page(0, 3, 8);
    let (sender, receiver) = (&mut opened.senders[0], &mut opened.receivers[0]);
    trial.watch.together(|crew| {
        crew.spawn(|| drain(receiver));
        sender.send(&[data(0, 4, 1)]).expect("a batch goes out");
        reader.read(&[range(0, 3, 1)]).expect("pages are read");
        sender.finish().expect("the channel ends");
    });
    for page in [3, 4] {
        assert!(opened.there.read(0, page) == opened.here.read(0, page), "page {page}");
    }

    drop(grant);
    let began = Instant::now();
    while reader.read(&[range(0, 0, 1)]).is_ok() {
        assert!(began.elapsed() < PROMPT, "the grant goes on without the source");
    }
}
