//! The two bitmaps that senders work on, and how they are lent to them without a lock.
//!
//! A [`Ledger`] belongs to the driver between rounds. For a round it is *lent*: every channel
//! gets a [`Share`], which alone may use the words of the stripes that the [`Partition`] gives to
//! its channel. Words are neither atomic nor locked; what keeps threads apart is that a stripe has
//! one owner, and that the ledger comes back, for the driver to harvest into or to lend with
//! another partition, only when every share is gone.
//!
//! So ownership changes by a **fenced epoch**, and by nothing else: the driver
//! [asks the shares back](Loan::ask_back) (or waits for the end of the round), every sender drops
//! its share, every sender, whether it was interrupted or had finished, waits until what it has
//! sent has landed, the driver [takes the ledger back](Loan::take_back) and lends it anew. What
//! the old owner of a stripe sent has landed before the new one sends, so the newest bytes win
//! also across channels.
//!
//! # What may hold data
//!
//! A page that is zero is not mentioned to a destination that knows it to be zero. So there is an
//! invariant, whatever fails and whoever owns a stripe next:
//!
//! > **sent ⊇ all pages that may hold data at the destination.**
//!
//! - A page is marked ([`Share::mark_sent`]) *before* it becomes part of a batch, in the ledger
//!   itself: a batch that fills up goes out in the middle of a stripe, and what follows may fail.
//! - A page that the destination wrote itself, as it loaded device state, is marked with word of that
//!   ([`Ledger::written_there`]).
//! - Nothing takes a mark away: the mention that a page is zero may be lost with its channel.
//! - The marks go with the ledger, through every epoch; nobody keeps them anywhere else.
//! - A page is left out unmentioned, as zero or as a hole of a file, only if it is not marked.
//!
//! Marks too many cost a few bytes; one too few, and a page keeps its old bytes for ever.
#![expect(unsafe_code, reason = "threads write to words of one bitmap, each to its own")]

use std::ops::Range;

use crate::pages::dirty::{DirtyBitmap, STRIPE_WORDS};
use crate::pages::memory::{Layout, PageRange};
use crate::pages::partition::{Partition, Stripe};
use crate::pages::sync::{self, Arc, AtomicBool, Ordering, UnsafeCell};

/// The bitmap words of one stripe; beyond the end of a region they are 0.
pub type StripeBits = [u64; STRIPE_WORDS];

/// What is to be sent, and what was.
#[derive(Debug)]
pub struct Ledger {
    /// Pages to be sent.
    pub dirty: DirtyBitmap,
    /// Pages that may hold data at the destination. All others are zero there.
    sent: DirtyBitmap,
}

impl Ledger {
    /// For a migration that begins: all pages are to be sent, none was.
    pub fn new(layout: &Layout) -> Self {
        Self { dirty: DirtyBitmap::all(layout), sent: DirtyBitmap::new(layout) }
    }

    /// Pages that the destination itself has written: they are to be sent, and hold data there.
    pub fn written_there(&mut self, range: PageRange) {
        for page in range.first_page..range.first_page + u64::from(range.pages) {
            self.dirty.set(range.region, page);
            self.sent.set(range.region, page);
        }
    }

    /// Whether a page may hold data at the destination.
    pub(crate) fn is_marked(&self, region: u16, page: u64) -> bool {
        self.sent.get(region, page)
    }

    /// Lends it: one share for each channel of the partition, in order.
    ///
    /// # Panics
    ///
    /// If the partition is of another layout.
    pub fn lend(self, partition: &Partition) -> (Loan, Vec<Share>) {
        let table = Arc::new(Table {
            dirty: Cells::new(self.dirty),
            sent: Cells::new(self.sent),
            asked_back: AtomicBool::new(false),
        });
        assert_eq!(partition.total(), table.dirty.stripes.len(), "a partition of this layout");
        let shares = (0..partition.channels())
            .map(|channel| Share {
                table: Arc::clone(&table),
                partition: partition.clone(),
                channel,
                piece: 0,
                next: 0,
                passed: 0,
                given: partition.count(channel),
                clean: true,
                current: None,
            })
            .collect();
        (Loan { table }, shares)
    }
}

/// A ledger that is lent.
#[derive(Debug)]
pub struct Loan {
    table: Arc<Table>,
}

impl Loan {
    /// Asks all holders of shares to stop where they are and to drop them.
    pub fn ask_back(&self) {
        self.table.asked_back.store(true, Ordering::Relaxed);
    }

    /// The ledger, once all shares were dropped. Until then, the loan.
    pub fn take_back(self) -> Result<Ledger, Self> {
        // Synchronises with the drop of each share: what its holder wrote is seen.
        let table = Arc::try_unwrap(self.table).map_err(|table| Self { table })?;
        Ok(Ledger { dirty: table.dirty.into_bitmap(), sent: table.sent.into_bitmap() })
    }
}

/// One channel's right to its stripes, for as long as it exists. Neither cloned nor made twice.
#[derive(Debug)]
pub struct Share {
    table: Arc<Table>,
    partition: Partition,
    channel: u16,
    /// Which of the channel's ranges of stripes is being looked at.
    piece: usize,
    /// The stripe to look at next, if it is in that range.
    next: u32,
    /// Stripes looked at.
    passed: usize,
    /// All stripes of the channel.
    given: usize,
    /// Whether the range before this one ended with clean stripes.
    clean: bool,
    /// The stripe that was given last, one of the channel's.
    current: Option<u32>,
}

impl Share {
    /// The next stripe of mine with dirty pages, and which these are. They stay dirty until
    /// [`done`](Self::done).
    pub fn next_dirty(&mut self) -> Option<(Stripe, StripeBits)> {
        while let Some(range) = self.partition.owned(self.channel).get(self.piece) {
            let range = self.next.max(range.start)..range.end;
            // SAFETY: the stripes are my channel's.
            let found = unsafe { self.table.dirty.first_of(range.clone(), self.clean) };
            self.clean = found.is_none();
            if let Some((number, bits)) = found {
                self.passed += (number + 1 - range.start) as usize;
                self.next = number + 1;
                self.current = Some(number);
                return Some((self.partition.stripe(number), bits));
            }
            self.passed += range.len();
            self.piece += 1;
        }
        self.current = None;
        None
    }

    /// The dirty words from the stripe on that was given last, of mine in its region: up to so many dirty
    /// pages and words, but that stripe in any case. Returns how many pages are dirty in them.
    ///
    /// Words of others' stripes in between are 0.
    pub fn look_ahead(&self, most_pages: u64, most_words: usize, words: &mut Vec<u64>) -> u64 {
        words.clear();
        let Some(first) = self.current else { return 0 };
        let region = self.partition.stripe(first).region;
        let pieces = self.partition.owned(self.channel).get(self.piece..).unwrap_or_default();
        let mine = pieces.iter().flat_map(|piece| piece.start.max(first)..piece.end);
        let mut pages = 0;
        for number in mine {
            let stripe = self.partition.stripe(number);
            let begin = (number - first) as usize * STRIPE_WORDS;
            let fits = stripe.region == region && begin + stripe.words <= most_words;
            // SAFETY: the stripe is my channel's.
            let bits = unsafe { self.table.dirty.of(number) };
            let more = bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            if number != first && (!fits || pages + more > most_pages) {
                break;
            }
            if more > 0 {
                pages += more;
                words.resize(begin, 0);
                words.extend(&bits[..stripe.words]);
            }
        }
        pages
    }

    /// Begins again with the first stripe: what is not done is given once more.
    pub fn rewind(&mut self) {
        (self.piece, self.next, self.passed) = (0, 0, 0);
        self.current = None;
    }

    /// Which pages of the stripe that was given last may hold data at the destination.
    pub fn sent(&self) -> StripeBits {
        self.current.map_or([0; STRIPE_WORDS], |number| {
            // SAFETY: `current` is a stripe of my channel's.
            unsafe { self.table.sent.of(number) }
        })
    }

    /// Pages of the stripe that was given last are about to go out as data: they may hold data at
    /// the destination from now on, whatever becomes of the stripe.
    pub fn mark_sent(&mut self, pages: &StripeBits) {
        let Some(number) = self.current else { return };
        let mut sent = self.sent();
        sent.iter_mut().zip(pages).for_each(|(sent, pages)| *sent |= pages);
        // SAFETY: `current` is a stripe of my channel's.
        unsafe { self.table.sent.put(number, sent) };
    }

    /// All pages of the stripe that was given last are on their way, or need not be.
    pub fn done(&mut self) {
        let Some(number) = self.current.take() else { return };
        // SAFETY: `current` is a stripe of my channel's.
        unsafe { self.table.dirty.put(number, [0; STRIPE_WORDS]) };
    }

    /// Whether the driver wants the ledger back.
    pub fn is_asked_back(&self) -> bool {
        self.table.asked_back.load(Ordering::Relaxed)
    }

    /// Stripes of mine behind me, and all of them.
    pub fn progress(&self) -> (usize, usize) {
        (self.passed, self.given)
    }
}

#[derive(Debug)]
struct Table {
    dirty: Cells,
    sent: Cells,
    asked_back: AtomicBool,
}

/// A bitmap whose stripes are used by several threads, each by one.
#[derive(Debug)]
struct Cells {
    stripes: Box<[UnsafeCell<StripeBits>]>,
    /// The bitmap without its words.
    empty: DirtyBitmap,
}

// SAFETY: a stripe is only used through a share, by whom the partition says that it is his; see
// `Cells::of`.
unsafe impl Sync for Cells {}

impl Cells {
    fn new(mut bitmap: DirtyBitmap) -> Self {
        Self { stripes: sync::into_cells(bitmap.take_stripes()), empty: bitmap }
    }

    fn into_bitmap(self) -> DirtyBitmap {
        let mut bitmap = self.empty;
        bitmap.put_stripes(sync::into_values(self.stripes));
        bitmap
    }

    /// The first of some stripes that is not all 0; `clean` says what the one before was like, and
    /// so most likely the first of them.
    ///
    /// # Safety
    ///
    /// As for [`Self::of`], of each of them.
    #[inline]
    unsafe fn first_of(&self, stripes: Range<u32>, clean: bool) -> Option<(u32, StripeBits)> {
        /// Looked at together after a clean stripe: so are most, then, and one question costs as
        /// much as many.
        const AT_ONCE: u32 = 64;
        let look = |stripe: u32| {
            // SAFETY: one of the caller's.
            let bits = unsafe { self.of(stripe) };
            (bits != [0; STRIPE_WORDS]).then_some((stripe, bits))
        };
        let mut begin = stripes.start;
        if !clean {
            if let found @ Some(_) = stripes.clone().next().and_then(look) {
                return found;
            }
            begin += 1;
        }
        while begin < stripes.end {
            let end = begin.saturating_add(AT_ONCE).min(stripes.end);
            let mut all = [0; STRIPE_WORDS];
            for cell in &self.stripes[begin as usize..end as usize] {
                cell.with(|bits| {
                    // SAFETY: valid, and nobody writes to it, says the caller.
                    let bits = unsafe { &*bits };
                    all.iter_mut().zip(bits).for_each(|(all, word)| *all |= word);
                });
            }
            if all != [0; STRIPE_WORDS] {
                return (begin..end).find_map(look);
            }
            begin = end;
        }
        None
    }

    /// The words of a stripe.
    ///
    /// # Safety
    ///
    /// The stripe belongs to the channel whose share the caller holds. There is one share a
    /// channel, and one thread uses it; so nobody else uses the stripe meanwhile.
    #[inline]
    unsafe fn of(&self, stripe: u32) -> StripeBits {
        self.stripes[stripe as usize].with(|bits| {
            // SAFETY: valid, and nobody writes to it, says the caller.
            unsafe { *bits }
        })
    }

    /// Replaces the words of a stripe.
    ///
    /// # Safety
    ///
    /// As for [`Self::of`].
    #[inline]
    unsafe fn put(&self, stripe: u32, value: StripeBits) {
        self.stripes[stripe as usize].with_mut(|bits| {
            // SAFETY: valid, and nobody else uses it, says the caller.
            unsafe { *bits = value }
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pages::memory::{PAGE_BYTES, RegionLayout};

    fn layout(pages: u64) -> Layout {
        let len_bytes = pages * PAGE_BYTES;
        Layout::new(vec![RegionLayout { guest_addr: 0, len_bytes, backing_page_bytes: PAGE_BYTES }])
            .unwrap()
    }

    #[test]
    fn what_the_destination_wrote_is_sent_also_where_it_is_zero() {
        let layout = layout(600);
        let mut ledger = Ledger::new(&layout);
        ledger.dirty.clear();
        ledger.written_there(PageRange { region: 0, first_page: 511, pages: 2 });
        assert_eq!(ledger.dirty.count(), 2);
        let marked = |ledger: &Ledger| (0..600).filter(|page| ledger.is_marked(0, *page)).count();
        assert!(ledger.is_marked(0, 511) && ledger.is_marked(0, 512) && marked(&ledger) == 2);
    }

    #[test]
    fn what_is_done_is_clean_and_the_rest_stays_dirty() {
        let layout = layout(5 * 512 + 3);
        let partition = Partition::new(&layout, 2);
        let (loan, mut shares) = Ledger::new(&layout).lend(&partition);
        let (stripe, dirty) = shares[1].next_dirty().unwrap();
        assert_eq!((stripe.first_page(), dirty), (512, [u64::MAX; 8]));
        assert_eq!(shares[1].sent(), [0; 8]);
        shares[1].mark_sent(&[1; 8]);
        shares[1].mark_sent(&[2; 8]);
        shares[1].done();
        // Given, and not done.
        assert_eq!(shares[1].next_dirty().unwrap().0.first_page(), 3 * 512);
        assert_eq!(shares[1].progress(), (2, 3));
        let loan = loan.take_back().expect_err("shares are still there");
        drop(shares);
        let ledger = loan.take_back().unwrap();
        assert_eq!(ledger.dirty.count(), 4 * 512 + 3);
        // What was sent is known to whoever owns the stripe next.
        let (loan, mut shares) = ledger.lend(&Partition::new(&layout, 1));
        assert_eq!(shares[0].next_dirty().unwrap().0.first_page(), 0);
        assert_eq!(shares[0].next_dirty().unwrap().0.first_page(), 2 * 512);
        assert_eq!(shares[0].sent(), [0; 8]);
        // Marked, and not done: both last.
        shares[0].mark_sent(&[4; 8]);
        let seen: Vec<_> = std::iter::from_fn(|| shares[0].next_dirty()).collect();
        assert_eq!(seen.last().unwrap().1, [0b111, 0, 0, 0, 0, 0, 0, 0]);
        drop(shares);
        let mut ledger = loan.take_back().unwrap();
        let marked = |stripe: usize| ledger.sent.region_words(0)[8 * stripe..][..8].to_vec();
        assert_eq!((marked(0), marked(1), marked(2)), (vec![0; 8], vec![3; 8], vec![4; 8]));
        ledger.dirty.fill();
        let (_loan, mut shares) = ledger.lend(&Partition::new(&layout, 2));
        assert_eq!(shares[1].next_dirty().unwrap().0.first_page(), 512);
        assert_eq!(shares[1].sent(), [3; 8]);
    }

    #[test]
    fn what_is_ahead_is_mine_and_stays_dirty() {
        // One channel in two has stripes 0, 2, 4, …
        let layout = layout(9 * 512 + 70);
        let mut ledger = Ledger::new(&layout);
        ledger.dirty.clear();
        for page in [3, 512, 1024, 2048 + 100, 2048 + 101, 9 * 512] {
            ledger.dirty.set(0, page);
        }
        let before = ledger.dirty.clone();
        let (loan, mut shares) = ledger.lend(&Partition::new(&layout, 2));
        let mut words = vec![7];
        assert_eq!(shares[0].look_ahead(10, 100, &mut words), 0, "none was given yet");
        assert!(words.is_empty());
        shares[0].next_dirty().unwrap();
        let mut ahead = |most_pages, most_words| {
            let pages = shares[0].look_ahead(most_pages, most_words, &mut words);
            let set = words.iter().enumerate().filter(|(_, word)| **word != 0);
            (pages, words.len(), set.map(|(index, word)| (index, *word)).collect::<Vec<_>>())
        };
        assert_eq!(ahead(10, 100), (4, 40, vec![(0, 8), (16, 1), (33, 3 << 36)]));
        // The stripe of two pages is too much, or too far.
        assert_eq!(ahead(3, 100), (2, 24, vec![(0, 8), (16, 1)]));
        assert_eq!(ahead(10, 39), (2, 24, vec![(0, 8), (16, 1)]));
        assert_eq!(ahead(0, 0), (1, 8, vec![(0, 8)]));
        shares[0].done();
        shares[1].next_dirty().unwrap();
        assert_eq!(shares[1].look_ahead(10, 100, &mut words), 2);
        // To the end of the region, and no further.
        assert_eq!((words.len(), words[0], words[64]), (66, 1, 1));
        drop(shares);
        let mut after = loan.take_back().unwrap().dirty;
        assert_ne!(after, before);
        after.set(0, 3);
        assert_eq!(after, before);
    }

    #[test]
    fn shares_learn_that_they_are_wanted_back() {
        let layout = layout(512);
        let (loan, shares) = Ledger::new(&layout).lend(&Partition::new(&layout, 1));
        assert!(!shares[0].is_asked_back());
        loan.ask_back();
        assert!(shares[0].is_asked_back());
    }
}

#[cfg(all(test, loom))]
mod explored;
