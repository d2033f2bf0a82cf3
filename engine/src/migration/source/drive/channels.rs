//! The sender threads, and the ledger that they work on.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};
use crossbeam_utils::CachePadded;

use crate::control::balance::{self, Lane};
use crate::error::Error;
use crate::migration::sender::Command;
use crate::pages::dirty::DirtyBitmap;
use crate::pages::ledger::{Ledger, Loan, Share};
use crate::pages::memory::{Layout, PageRange};
use crate::pages::partition::Partition;
use crate::pages::sums::draw;
use crate::stats::ChannelGauge;
use crate::transport::{Interrupt, Run};

/// Who has the ledger.
enum Books {
    /// The driver, between rounds.
    Here(Ledger),
    /// The senders.
    Lent(Loan),
    /// Nobody: who was to take it or to give it panicked.
    Lost,
}

const NOT_HERE: Error = Error::Internal("the ledger is not here");

impl Books {
    fn ledger(&mut self) -> Result<&mut Ledger, Error> {
        if let Self::Here(ledger) = self { Ok(ledger) } else { Err(NOT_HERE) }
    }

    /// Lends it, a share to each channel of the partition.
    fn lend(&mut self, partition: &Partition) -> Result<Vec<Share>, Error> {
        match std::mem::replace(self, Self::Lost) {
            Self::Here(ledger) => {
                let (loan, shares) = ledger.lend(partition);
                *self = Self::Lent(loan);
                Ok(shares)
            }
            elsewhere => {
                *self = elsewhere;
                Err(NOT_HERE)
            }
        }
    }

    /// Takes it back, if it was lent. Every share must have been dropped.
    fn take_back(&mut self) -> Result<(), Error> {
        match std::mem::replace(self, Self::Lost) {
            Self::Lent(loan) => {
                let back = loan.take_back();
                let is_back = back.is_ok();
                *self = back.map_or_else(Self::Lent, Self::Here);
                is_back.then_some(()).ok_or(Error::Internal("a share is still held"))
            }
            elsewhere => {
                *self = elsewhere;
                Ok(())
            }
        }
    }
}

pub(super) struct Channels {
    layout: Layout,
    pub(super) gauges: Arc<Vec<CachePadded<ChannelGauge>>>,
    /// `None` for a channel that is lost.
    commands: Vec<Option<Sender<Command>>>,
    /// To end a channel here.
    interrupts: Vec<Arc<dyn Interrupt>>,
    partition: Partition,
    /// 0 for a channel that is lost, or not to be used.
    weights: Vec<u32>,
    books: Books,
    lent_at: Instant,
    /// Whether no round over all pages is complete yet.
    first_look: bool,
    leftovers: (Sender<Vec<Run>>, Receiver<Vec<Run>>),
}

impl Channels {
    /// For so many channels; their threads are yet to be [added](Self::add).
    pub(super) fn new(layout: Layout, channels: u16) -> Self {
        let weights = vec![1; usize::from(channels)];
        Self {
            gauges: Arc::new(ChannelGauge::for_channels(channels)),
            commands: Vec::new(),
            interrupts: Vec::new(),
            partition: Partition::new(&layout, channels),
            weights,
            books: Books::Here(Ledger::new(&layout)),
            lent_at: Instant::now(),
            first_look: true,
            leftovers: unbounded(),
            layout,
        }
    }

    /// All threads have ended with their link: what they had under way is dirty, and others follow on the next one.
    pub(super) fn begin_epoch(&mut self) -> Result<(), Error> {
        self.take_back()?;
        self.commands.clear();
        self.interrupts.clear();
        self.weights.fill(1);
        self.gauges.iter().for_each(|gauge| gauge.begin_epoch());
        self.partition =
            Partition::weighted(&self.layout, &self.weights, &self.books.ledger()?.dirty);
        Ok(())
    }

    /// Adds the thread of the next channel.
    pub(super) fn add(&mut self, commands: Sender<Command>, interrupt: Arc<dyn Interrupt>) {
        self.commands.push(Some(commands));
        self.interrupts.push(interrupt);
    }

    /// Where threads leave what they had taken and not landed.
    pub(super) fn leftovers(&self) -> Sender<Vec<Run>> {
        self.leftovers.0.clone()
    }

    /// The weights with which the first so many live channels are used, and no other, if that is
    /// not so already.
    pub(super) fn restricted_to(&self, most: u16) -> Option<Vec<u32>> {
        let mut left = most.max(1);
        let wanted: Vec<u32> = self
            .commands
            .iter()
            .zip(&self.weights)
            .map(|(commands, weight)| {
                if commands.is_none() || left == 0 {
                    return 0;
                }
                left -= 1;
                (*weight).max(1)
            })
            .collect();
        (wanted != self.weights).then_some(wanted)
    }

    /// The channels' shares.
    pub(super) fn weights(&self) -> &[u32] {
        &self.weights
    }

    pub(super) fn live(&self) -> usize {
        self.commands.iter().flatten().count()
    }

    /// How many are lost.
    pub(super) fn missing(&self) -> u32 {
        let lost = self.commands.iter().filter(|commands| commands.is_none());
        u32::try_from(lost.count()).unwrap_or(u32::MAX)
    }

    /// Which channels are not lost.
    pub(super) fn are_live(&self) -> impl Iterator<Item = bool> {
        self.commands.iter().map(Option::is_some)
    }

    /// The pages to be sent, between rounds.
    pub(super) fn dirty(&mut self) -> Result<&mut DirtyBitmap, Error> {
        Ok(&mut self.books.ledger()?.dirty)
    }

    /// The destination itself has written these pages: they are sent, whatever is in them. Between rounds.
    pub(super) fn written_there(&mut self, ranges: Vec<PageRange>) -> Result<(), Error> {
        let ledger = self.books.ledger()?;
        for range in ranges {
            ledger.written_there(range);
        }
        Ok(())
    }

    /// These pages are sent again, as far as they were sent. Between rounds.
    pub(super) fn send_again(&mut self, ranges: Vec<PageRange>) -> Result<(), Error> {
        let ledger = self.books.ledger()?;
        for range in ranges {
            for page in range.first_page..range.first_page + u64::from(range.pages) {
                if ledger.is_marked(range.region, page) {
                    ledger.dirty.set(range.region, page);
                }
            }
        }
        Ok(())
    }

    /// Pages that may hold data at the destination, drawn at random. Between rounds.
    pub(super) fn draw(&mut self, most: usize, seed: u64) -> Result<Vec<(u16, u64)>, Error> {
        let ledger = self.books.ledger()?;
        Ok(draw(&self.layout, most, seed, |region, page| ledger.is_marked(region, page)))
    }

    /// Lends the ledger to all threads: a round, or what is left of one.
    pub(super) fn lend(&mut self, settle: bool) -> Result<(), Error> {
        let shares = self.books.lend(&self.partition)?;
        self.lent_at = Instant::now();
        for ((commands, share), gauge) in self.commands.iter().zip(shares).zip(&*self.gauges) {
            let (done, given) = share.progress();
            gauge.stripes_done.store(done as u64, Ordering::Relaxed);
            gauge.stripes_given.store(given as u64, Ordering::Relaxed);
            if let Some(commands) = commands {
                let first_look = self.first_look;
                // A thread that is gone has reported why; the wait for its report finds out.
                let _ = commands.send(Command::Round { share, first_look, settle });
            }
        }
        Ok(())
    }

    /// Takes the ledger back, with what threads that have ended left over. All threads have
    /// dropped their shares: they report afterwards.
    pub(super) fn take_back(&mut self) -> Result<(), Error> {
        self.books.take_back()?;
        let leftovers: Vec<_> = self.leftovers.1.try_iter().flatten().collect();
        let dirty = self.dirty()?;
        for Run { range, .. } in leftovers {
            for page in range.first_page..range.first_page + u64::from(range.pages) {
                dirty.set(range.region, page);
            }
        }
        Ok(())
    }

    /// A round over all pages is complete.
    pub(super) fn all_looked_at(&mut self) {
        self.first_look = false;
    }

    /// The weights of a better partition, if a channel lags.
    pub(super) fn lagging(&self) -> Option<Vec<u32>> {
        let lanes: Vec<_> = self
            .commands
            .iter()
            .zip(&self.weights)
            .zip(&*self.gauges)
            .map(|((commands, weight), gauge)| {
                let used = commands.is_some() && *weight > 0;
                used.then(|| Lane {
                    done: gauge.stripes_done.load(Ordering::Relaxed),
                    given: gauge.stripes_given.load(Ordering::Relaxed),
                })
            })
            .collect();
        balance::rebalance(&lanes, self.lent_at.elapsed())
    }

    /// Asks all threads to stop where they are and to give their shares back.
    pub(super) fn ask_back(&self) {
        if let Books::Lent(loan) = &self.books {
            loan.ask_back();
        }
    }

    /// Has all threads report when everything they sent has landed.
    pub(super) fn settle(&self) {
        for commands in self.commands.iter().flatten() {
            // A thread that is gone has reported why.
            let _ = commands.send(Command::Settle);
        }
    }

    /// Deals the stripes out anew, to the channels that are left, between rounds. Everything sent
    /// must have landed: stripes change hands. No more than `most` channels are used.
    pub(super) fn deal(&mut self, weights: Option<Vec<u32>>, most: u16) -> Result<(), Error> {
        self.weights = weights.unwrap_or_else(|| std::mem::take(&mut self.weights));
        if let Some(restricted) = self.restricted_to(most) {
            self.weights = restricted;
        }
        let dirty = &self.books.ledger()?.dirty;
        self.partition = Partition::weighted(&self.layout, &self.weights, dirty);
        Ok(())
    }

    /// Ends a channel here: its thread reports that it failed.
    pub(super) fn interrupt(&self, channel: u16) {
        if let Some(interrupt) = self.interrupts.get(usize::from(channel)) {
            interrupt.interrupt();
        }
    }

    /// A channel is gone, and another is there: its stripes go to the others.
    pub(super) fn lose(&mut self, channel: u16) {
        self.commands[usize::from(channel)] = None;
        self.gauges[usize::from(channel)].lost.store(true, Ordering::Relaxed);
    }

    /// Grows with all that lands.
    pub(super) fn moved(&self) -> u64 {
        let landed_zero_pages =
            self.gauges.iter().map(|gauge| gauge.landed_zero_pages.load(Ordering::Relaxed));
        self.landed().into_iter().chain(landed_zero_pages).fold(0, u64::wrapping_add)
    }

    /// Page bytes that have landed on each channel.
    pub(super) fn landed(&self) -> Vec<u64> {
        self.gauges.iter().map(|gauge| gauge.landed_bytes.load(Ordering::Relaxed)).collect()
    }

    /// Tells all threads to end their channels in order.
    pub(super) fn finish(&self) {
        for commands in self.commands.iter().flatten() {
            // A thread that is gone has nothing to finish.
            let _ = commands.send(Command::Finish);
        }
    }

    /// No more commands will come: threads end.
    pub(super) fn dismiss(&mut self) {
        self.commands.clear();
    }
}
