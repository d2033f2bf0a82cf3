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
#![expect(unsafe_code, reason = "threads write to words of one bitmap, each to its own")]

use std::ops::Range;

use crate::dirty::{DirtyBitmap, STRIPE_WORDS};
use crate::memory::Layout;
use crate::partition::{Partition, Stripe};
use crate::sync::{self, Arc, AtomicBool, Ordering, UnsafeCell};

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

    /// All pages of the stripe that was given last are on their way, or need not be; `sent` says
    /// which of them may hold data at the destination from now on.
    pub fn done(&mut self, sent: StripeBits) {
        let Some(number) = self.current.take() else { return };
        // SAFETY: `current` is a stripe of my channel's.
        unsafe { self.table.dirty.put(number, [0; STRIPE_WORDS]) };
        // SAFETY: as above.
        unsafe { self.table.sent.put(number, sent) };
    }

    /// Whether the driver wants the ledger back.
    pub fn is_asked_back(&self) -> bool {
        self.table.asked_back.load(Ordering::Relaxed)
    }

    /// Stripes of mine behind me, and all of them.
    pub fn progress(&self) -> (usize, usize) {
        (self.passed, self.partition.count(self.channel))
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
    use crate::memory::{PAGE_BYTES, RegionLayout};

    fn layout(pages: u64) -> Layout {
        let len_bytes = pages * PAGE_BYTES;
        Layout::new(vec![RegionLayout { guest_addr: 0, len_bytes, backing_page_bytes: PAGE_BYTES }])
            .unwrap()
    }

    #[test]
    fn what_is_done_is_clean_and_the_rest_stays_dirty() {
        let layout = layout(5 * 512 + 3);
        let partition = Partition::new(&layout, 2);
        let (loan, mut shares) = Ledger::new(&layout).lend(&partition);
        let (stripe, dirty) = shares[1].next_dirty().unwrap();
        assert_eq!((stripe.first_page(), dirty), (512, [u64::MAX; 8]));
        assert_eq!(shares[1].sent(), [0; 8]);
        shares[1].done([1; 8]);
        // Given, and not done.
        assert_eq!(shares[1].next_dirty().unwrap().0.first_page(), 3 * 512);
        assert_eq!(shares[1].progress(), (2, 3));
        let loan = loan.take_back().expect_err("shares are still there");
        drop(shares);
        let ledger = loan.take_back().unwrap();
        assert_eq!(ledger.dirty.count(), 4 * 512 + 3);
        // What was sent is known to whoever owns the stripe next.
        let (_loan, mut shares) = ledger.lend(&Partition::new(&layout, 1));
        assert_eq!(shares[0].next_dirty().unwrap().0.first_page(), 0);
        assert_eq!(shares[0].next_dirty().unwrap().0.first_page(), 2 * 512);
        assert_eq!(shares[0].sent(), [0; 8]);
        let seen: Vec<_> = std::iter::from_fn(|| shares[0].next_dirty()).collect();
        assert_eq!(seen.last().unwrap().1, [0b111, 0, 0, 0, 0, 0, 0, 0]);
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

/// All interleavings of a driver, two senders and a guest, explored by loom: no word is used by
/// two threads at once, and the newest bytes win when a stripe changes hands.
#[cfg(all(test, loom))]
mod explored {
    use loom::sync::atomic::AtomicU32;
    use loom::sync::mpsc::{Receiver, Sender, channel};
    use loom::thread;

    use super::*;
    use crate::memory::{PAGE_BYTES, RegionLayout};

    const STRIPES: usize = 2;

    /// A page of each stripe, by version. What is on its way is with its sender.
    struct World {
        guest: [AtomicU32; STRIPES],
        dirty_log: [AtomicBool; STRIPES],
        there: [AtomicU32; STRIPES],
    }

    impl World {
        fn write(&self, page: usize, version: u32) {
            self.guest[page].store(version, Ordering::SeqCst);
            self.dirty_log[page].store(true, Ordering::SeqCst);
        }

        fn harvest(&self, into: &mut DirtyBitmap) {
            for page in 0..STRIPES {
                if self.dirty_log[page].swap(false, Ordering::SeqCst) {
                    into.set(0, page as u64 * 512);
                }
            }
        }
    }

    /// What the driver tells a sender, as [`crate::sender::Command`].
    enum Command {
        Round(Share),
        Settle,
        Finish,
    }

    fn send(world: &World, commands: &Receiver<Command>, done: &Sender<()>) {
        let mut on_its_way = Vec::new();
        loop {
            match commands.recv().unwrap() {
                Command::Round(mut share) => {
                    while !share.is_asked_back()
                        && let Some((stripe, bits)) = share.next_dirty()
                    {
                        let page = stripe.first_word / STRIPE_WORDS;
                        on_its_way.push((page, world.guest[page].load(Ordering::SeqCst)));
                        share.done(bits);
                    }
                }
                Command::Settle => land(world, &mut on_its_way),
                Command::Finish => return land(world, &mut on_its_way),
            }
            done.send(()).unwrap();
        }
    }

    /// In order, as on any channel.
    fn land(world: &World, on_its_way: &mut Vec<(usize, u32)>) {
        for (page, version) in on_its_way.drain(..) {
            world.there[page].store(version, Ordering::SeqCst);
        }
    }

    /// Whether old bytes won in any interleaving; `settles` is whether the driver keeps to the rule
    /// of the fence.
    fn old_bytes_win(settles: bool) -> bool {
        let old_won = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let seen = std::sync::Arc::clone(&old_won);
        let mut model = loom::model::Builder::new();
        // Deeper costs hours, and has found nothing.
        model.preemption_bound = Some(2);
        model.check(move || {
            let len_bytes = STRIPES as u64 * 512 * PAGE_BYTES;
            let region = RegionLayout { guest_addr: 0, len_bytes, backing_page_bytes: PAGE_BYTES };
            let layout = Layout::new(vec![region]).unwrap();
            let world = Arc::new(World {
                guest: [AtomicU32::new(1), AtomicU32::new(1)],
                dirty_log: [AtomicBool::new(false), AtomicBool::new(false)],
                there: [AtomicU32::new(0), AtomicU32::new(0)],
            });
            let (done, is_done) = channel();
            let senders: Vec<_> = (0..2)
                .map(|_| {
                    let (give, commands) = channel();
                    let (world, done) = (Arc::clone(&world), done.clone());
                    (give, thread::spawn(move || send(&world, &commands, &done)))
                })
                .collect();
            let round = |ledger: Ledger, weights: &[u32], ask_back: bool, version: u32| {
                let (loan, shares) =
                    ledger.lend(&Partition::weighted(&layout, weights, &DirtyBitmap::new(&layout)));
                for ((give, _), share) in senders.iter().zip(shares) {
                    give.send(Command::Round(share)).unwrap();
                }
                // The guest writes while the senders read.
                world.write(0, version);
                if ask_back {
                    loan.ask_back();
                }
                senders.iter().for_each(|_| is_done.recv().unwrap());
                if ask_back && settles {
                    for (give, _) in &senders {
                        give.send(Command::Settle).unwrap();
                    }
                    senders.iter().for_each(|_| is_done.recv().unwrap());
                }
                let mut ledger = loan.take_back().expect("all shares were dropped");
                world.harvest(&mut ledger.dirty);
                ledger
            };
            // The first epoch is fenced; in the second the stripes have changed hands.
            let ledger = round(Ledger::new(&layout), &[1, 1], true, 2);
            let ledger = round(ledger, &[0, 1], false, 3);
            // The guest is paused; what is dirty is sent, and all lands.
            let (loan, shares) =
                ledger.lend(&Partition::weighted(&layout, &[0, 1], &DirtyBitmap::new(&layout)));
            for ((give, _), share) in senders.iter().zip(shares) {
                give.send(Command::Round(share)).unwrap();
            }
            for (give, _) in &senders {
                give.send(Command::Finish).unwrap();
            }
            for (_, thread) in senders {
                thread.join().unwrap();
            }
            assert!(loan.take_back().unwrap().dirty.is_empty());
            for page in 0..STRIPES {
                let newest = world.guest[page].load(Ordering::SeqCst);
                if world.there[page].load(Ordering::SeqCst) != newest {
                    seen.store(true, Ordering::SeqCst);
                }
            }
        });
        old_won.load(Ordering::SeqCst)
    }

    #[test]
    fn the_newest_bytes_win_across_a_fence() {
        assert!(!old_bytes_win(true));
    }

    /// The exploration sees it when senders do not wait for what they have sent.
    #[test]
    fn without_the_wait_old_bytes_win() {
        assert!(old_bytes_win(false));
    }
}
