//! What every dirty source has to pass, whatever tracks and whoever writes.
#![expect(unsafe_code, reason = "guest memory is read by raw pointer")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, DirtySource, WORD_PAGES};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};

/// Words of 2 MiB of guest memory, which are one thread's.
const STRIPE_WORDS: usize = 8;

/// Stripes that a thread re-arms with one call, as the engine does it, with another's between them.
const STRIPES_AT_ONCE: usize = 3;

/// How long the writer writes at full speed.
const HAMMERED: Duration = Duration::from_secs(1);
/// And at most, where the writer is not seen.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often each page is written once.
const SINGLE_PASSES: usize = 20;

/// Someone who writes to guest memory, and is seen by the source under test.
pub(crate) trait Writer: Sync {
    /// Pages that may be written. No page is in two ranges.
    fn ranges(&self) -> Vec<PageRange>;

    /// Adds one to the first 32-bit word of each page of a range inside one of `ranges`, and
    /// returns when that is done.
    fn touch(&self, range: PageRange);

    /// Does so over all `ranges`, over and over as fast as it can, until told to stop, and once at least.
    fn hammer(&self, stop: &AtomicBool);
}

/// A source with its memory and its writer.
pub(crate) struct Bench<'b> {
    pub(crate) memory: &'b GuestMemory,
    pub(crate) source: &'b dyn DirtySource,
    pub(crate) writer: &'b dyn Writer,
    /// 4 KiB pages that are reported together, because they are one page to the tracker.
    pub(crate) granule_pages: u64,
}

/// Runs all checks; the source must not be started, and is stopped again at the end.
pub(crate) fn passes_all(bench: &Bench) {
    state_is_checked(bench);
    bench.source.start().unwrap();
    bench.clean();
    writes_are_seen_and_forgotten(bench);
    put_back_is_seen_again(bench);
    writes_between_harvest_and_rearm_are_kept(bench);
    a_busy_writer_loses_nothing(bench);
    wrong_words_are_refused(bench);
    bench.source.stop().unwrap();
    restarts(bench);
}

/// Runs just the check that counts, for a source that may report more than was written.
pub(crate) fn loses_nothing(bench: &Bench) {
    bench.source.start().unwrap();
    bench.clean();
    a_busy_writer_loses_nothing(bench);
    bench.source.stop().unwrap();
}

impl Bench<'_> {
    fn harvest(&self) -> DirtyBitmap {
        let mut found = DirtyBitmap::new(self.memory.layout());
        self.source.harvest(&mut found).unwrap();
        let untrimmed = found.clone();
        found.trim();
        assert_eq!(found, untrimmed, "no bit past the end of a region");
        found
    }

    fn rearm(&self, pages: &DirtyBitmap) {
        for region in 0..u16::try_from(pages.regions()).unwrap() {
            self.source.rearm(region, 0, pages.region_words(region)).unwrap();
        }
    }

    /// Re-arms everything that was written up to now.
    fn clean(&self) {
        let pages = self.harvest();
        self.rearm(&pages);
    }

    /// The pages of a range, as the tracker reports them.
    fn pages_of(&self, range: PageRange) -> DirtyBitmap {
        let mut pages = DirtyBitmap::new(self.memory.layout());
        let start = range.first_page / self.granule_pages * self.granule_pages;
        let end = range.first_page + u64::from(range.pages);
        let end = end.next_multiple_of(self.granule_pages).min(pages.region_pages(range.region));
        (start..end).for_each(|page| pages.set(range.region, page));
        pages
    }

    /// Ranges of several shapes inside what may be written: single pages at both ends, a run
    /// across words, everything.
    fn samples(&self) -> Vec<PageRange> {
        let mut samples = Vec::new();
        for range in self.writer.ranges() {
            let PageRange { region, first_page, pages } = range;
            let last = first_page + u64::from(pages) - 1;
            samples.push(PageRange { region, first_page, pages: 1 });
            samples.push(PageRange { region, first_page: last, pages: 1 });
            let third = pages / 3;
            samples.push(PageRange {
                region,
                first_page: first_page + u64::from(third),
                pages: third.max(1),
            });
            samples.push(range);
        }
        samples
    }
}

fn state_is_checked(bench: &Bench) {
    let mut into = DirtyBitmap::new(bench.memory.layout());
    bench.source.stop().unwrap_err();
    bench.source.harvest(&mut into).unwrap_err();
    bench.source.rearm(0, 0, &[1]).unwrap_err();
    bench.source.start().unwrap();
    let error = bench.source.start().unwrap_err();
    let cause = std::error::Error::source(&error).expect("a cause").to_string();
    assert_eq!(cause, "tracking was already started");
    bench.source.stop().unwrap();
    bench.source.stop().unwrap_err();
}

fn writes_are_seen_and_forgotten(bench: &Bench) {
    assert!(bench.harvest().is_empty(), "clean without a write");
    for range in bench.samples() {
        let expected = bench.pages_of(range);
        bench.writer.touch(range);
        let found = bench.harvest();
        assert!(found == expected, "{range:?}: {} pages reported", found.count());
        bench.rearm(&found);
        assert!(bench.harvest().is_empty(), "{range:?}: clean after re-arming");
        bench.writer.touch(range);
        let found = bench.harvest();
        assert!(found == expected, "{range:?}: seen again after re-arming");

        // What is set in the engine's bitmap stays set.
        bench.rearm(&found);
        let mut kept = DirtyBitmap::all(bench.memory.layout());
        bench.source.harvest(&mut kept).unwrap();
        assert_eq!(kept, DirtyBitmap::all(bench.memory.layout()));
    }
}

fn put_back_is_seen_again(bench: &Bench) {
    for range in bench.samples() {
        bench.writer.touch(range);
        let found = bench.harvest();
        bench.rearm(&found);
        bench.source.put_back(&found).unwrap();
        let mut again = bench.harvest();
        assert!(again == found, "{range:?}: put back");

        // Re-arming half of the words takes just those back.
        let words = bench.pages_of(range).region_words(range.region).to_vec();
        let half = words.len() / 2;
        bench.source.rearm(range.region, 0, &words[..half]).unwrap();
        let left = bench.harvest();
        again.region_words_mut(range.region)[..half].fill(0);
        assert!(left == again, "{range:?}: half re-armed");
        bench.clean();
        assert!(bench.harvest().is_empty(), "{range:?}: re-arming takes it back");
    }
}

/// The bytes that are read after re-arming hold a write between harvest and re-arming; the next
/// harvest must tell of any write after it, whether or not it tells of that one too.
fn writes_between_harvest_and_rearm_are_kept(bench: &Bench) {
    let (mut copied, mut now) = (Vec::new(), Vec::new());
    for range in bench.samples() {
        let page = PageRange { pages: 1, ..range };
        bench.writer.touch(range);
        let found = bench.harvest();
        bench.writer.touch(range);
        bench.rearm(&found);
        bench.memory.copy_out(page, &mut copied).unwrap();
        let later = bench.harvest();
        assert!(later.is_empty() || later == found, "{range:?}");
        bench.memory.copy_out(page, &mut now).unwrap();
        assert!(copied == now, "{range:?}: the write is in the bytes");
        bench.rearm(&later);

        bench.writer.touch(range);
        let found = bench.harvest();
        bench.writer.touch(range);
        bench.rearm(&found);
        bench.writer.touch(range);
        let later = bench.harvest();
        assert!(later == bench.pages_of(range), "{range:?}: a write after re-arming is seen");
        bench.rearm(&later);
    }
}

/// The property all is about: what a migration copies is what was written.
fn a_busy_writer_loses_nothing(bench: &Bench) {
    let page_bytes = usize::try_from(PAGE_BYTES).unwrap();
    let regions = bench.memory.layout().regions();
    let mut shadow: Vec<Vec<u8>> =
        regions.iter().map(|region| vec![0; usize::try_from(region.len_bytes).unwrap()]).collect();

    // One round: harvest, then two threads that own every other stripe re-arm and copy.
    let round = |first: bool, shadow: &mut [Vec<u8>]| -> u64 {
        let mut pages = bench.harvest();
        if first {
            pages.fill();
        }
        for (region, shadow) in (0..).zip(shadow) {
            let words = pages.region_words(region);
            let stripe_bytes = STRIPE_WORDS * usize::try_from(WORD_PAGES).unwrap() * page_bytes;
            let mut owned: [Vec<_>; 2] = [Vec::new(), Vec::new()];
            for (index, stripe) in
                words.chunks(STRIPE_WORDS).zip(shadow.chunks_mut(stripe_bytes)).enumerate()
            {
                owned[index % 2].push((index, stripe));
            }
            std::thread::scope(|scope| {
                for stripes in owned {
                    scope.spawn(move || {
                        let mut stripes = stripes;
                        for stripes in stripes.chunks_mut(STRIPES_AT_ONCE) {
                            rearm_stripes(bench, region, stripes);
                            for (index, (words, shadow)) in stripes {
                                let first_page = (*index * STRIPE_WORDS) as u64 * WORD_PAGES;
                                copy_stripe(bench, region, first_page, words, shadow);
                            }
                        }
                    });
                }
            });
        }
        pages.count()
    };

    // At full speed, so that every step meets writes.
    let stop = AtomicBool::new(false);
    let mut rounds = 0;
    let mut copied = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| bench.writer.hammer(&stop));
        let began = Instant::now();
        // A busy machine may let the writer wait.
        let is_seen =
            |copied: u64| copied > bench.memory.layout().pages() || began.elapsed() > PATIENCE;
        while began.elapsed() < HAMMERED || rounds < 5 || !is_seen(copied) {
            copied += round(rounds == 0, &mut shadow);
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    round(false, &mut shadow);
    eprintln!("  {}: {rounds} rounds, {copied} pages", bench.source.name());
    assert!(copied > bench.memory.layout().pages(), "the writer was not seen at all");
    is_copied(bench, &shadow);

    // A page that is written again and again is found again, even if a write to it was lost. So
    // let each page be written once, somewhere in the middle of a round.
    for _ in 0..SINGLE_PASSES {
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                bench.writer.ranges().into_iter().for_each(|range| bench.writer.touch(range));
            });
            while !writer.is_finished() {
                round(false, &mut shadow);
            }
        });
        round(false, &mut shadow);
        is_copied(bench, &shadow);
    }
    assert!(bench.harvest().is_empty());
}

fn is_copied(bench: &Bench, shadow: &[Vec<u8>]) {
    const BYTES: usize = 4096;
    let mut page_bytes = [0; BYTES];
    for (region, shadow) in (0..).zip(shadow) {
        for (page, shadow) in (0..).zip(shadow.as_chunks::<BYTES>().0) {
            let range = PageRange { region, first_page: page, pages: 1 };
            copy_page(bench.memory, range, &mut page_bytes);
            assert!(page_bytes == *shadow, "a write to page {page} of region {region} was lost");
        }
    }
}

/// A stripe of one thread's, by its number: its words and what was copied.
type Owned<'s> = (usize, (&'s [u64], &'s mut [u8]));

/// Re-arms stripes with one call; the words of those in between are 0, whatever they hold.
fn rearm_stripes(bench: &Bench, region: u16, stripes: &[Owned]) {
    let Some((first, _)) = stripes.first() else { return };
    let mut all = Vec::new();
    for (index, (words, _)) in stripes {
        all.resize((index - first) * STRIPE_WORDS, 0);
        all.extend_from_slice(words);
    }
    bench.source.rearm(region, (first * STRIPE_WORDS) as u64 * WORD_PAGES, &all).unwrap();
}

fn copy_stripe(bench: &Bench, region: u16, first_page: u64, words: &[u64], shadow: &mut [u8]) {
    if words.iter().all(|word| *word == 0) {
        return;
    }
    let pages = shadow.chunks_mut(usize::try_from(PAGE_BYTES).unwrap());
    for (index, shadow) in (0..).zip(pages) {
        if words[usize::try_from(index / WORD_PAGES).unwrap()] >> (index % WORD_PAGES) & 1 == 1 {
            let range = PageRange { region, first_page: first_page + index, pages: 1 };
            copy_page(bench.memory, range, shadow);
        }
    }
}

/// Faster than `GuestMemory::copy_out` without optimisation, so that more rounds fit in.
pub(crate) fn copy_page(memory: &GuestMemory, range: PageRange, shadow: &mut [u8]) {
    let from = memory.span(range).unwrap().addr.cast::<[u8; 8]>();
    for (index, bytes) in shadow.as_chunks_mut().0.iter_mut().enumerate() {
        // SAFETY: inside the page, which is as long as the shadow of it.
        let from = unsafe { from.add(index) };
        // SAFETY: mapped; volatile, for the writer is at it.
        *bytes = unsafe { from.read_volatile() };
    }
}

fn wrong_words_are_refused(bench: &Bench) {
    let regions = u16::try_from(bench.memory.layout().regions().len()).unwrap();
    bench.source.rearm(regions, 0, &[1]).unwrap_err();
    bench.source.rearm(0, 1, &[1]).unwrap_err();
    bench.source.rearm(0, u64::MAX - 63, &[1, 1]).unwrap_err();
    let first = bench.memory.layout().regions()[0];
    let beyond = first.pages().next_multiple_of(WORD_PAGES);
    bench.source.rearm(0, beyond, &[1]).unwrap_err();

    let other = pageferry::memory::Layout::new(vec![pageferry::memory::RegionLayout {
        len_bytes: first.len_bytes + PAGE_BYTES * WORD_PAGES,
        ..first
    }]);
    let mut other = DirtyBitmap::all(&other.unwrap());
    bench.source.harvest(&mut other).unwrap_err();
    bench.source.put_back(&other).unwrap_err();
}

/// A second migration works like the first, and untracked writes between them do no harm.
fn restarts(bench: &Bench) {
    let range = bench.writer.ranges()[0];
    bench.writer.touch(range);
    bench.source.start().unwrap();
    bench.clean();
    assert!(bench.harvest().is_empty());
    bench.writer.touch(range);
    assert!(bench.harvest() == bench.pages_of(range));
    bench.source.stop().unwrap();
    bench.writer.touch(range);
}
