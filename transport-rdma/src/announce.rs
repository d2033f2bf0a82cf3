//! The other side is told where guest memory is, at once or while it is registered; and hears it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use pageferry::memory::Layout;
use pageferry::transport::{Registration, TransportError};

use crate::memory::Registered;
use crate::pipe::{Inlet, Message, Outlet};
use crate::table::{ENTRIES_AT_ONCE, Entry, RemoteTable, encode};

/// How often somebody who waits for another thread looks by himself.
const GLANCE: Duration = Duration::from_millis(20);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section leaves anything half changed that is used after a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells where memory is, in order, as it is registered. Shared by the destination's threads, which
/// have nothing to do while pages land by themselves: they register what is next.
#[derive(Debug)]
pub(crate) struct Announcer {
    teller: Mutex<Teller>,
    /// All was told, or nobody hears it any more.
    over: AtomicBool,
    /// After the teller's queue pair.
    registered: Arc<Registered>,
    rail: u16,
}

#[derive(Debug)]
struct Teller {
    outlet: Outlet,
    /// Chunks that the other side was told of.
    told: usize,
}

impl Announcer {
    pub(crate) fn new(outlet: Outlet, registered: Arc<Registered>, rail: u16) -> Self {
        let teller = Mutex::new(Teller { outlet, told: 0 });
        Self { teller, over: AtomicBool::new(false), registered, rail }
    }

    /// Tells what is registered and was not told, as far as there are credits. Does not wait for
    /// the other side, which reads when it has to.
    pub(crate) fn announce(&self) -> Result<(), TransportError> {
        let mut teller = locked(&self.teller);
        loop {
            let news: Vec<Entry> =
                self.registered.entries_from(teller.told).take(ENTRIES_AT_ONCE).collect();
            if news.is_empty() || !teller.outlet.has_room()? {
                break;
            }
            teller.outlet.message(&encode(&news), None)?;
            teller.told += news.len();
        }
        if teller.told == self.registered.chunk_count() {
            self.over.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Registers the next chunk and tells of it. Returns until when to wait for something else to
    /// do before the next call; `None` once there is no need to call it again.
    pub(crate) fn go_ahead(
        &self,
        cost: &mut Registration,
    ) -> Result<Option<Instant>, TransportError> {
        if self.over.load(Ordering::Acquire) {
            return Ok(None);
        }
        let more = self.registered.go_ahead(cost).map_err(|error| match error {
            // The other rails go on.
            TransportError::Register { cause, .. } if self.rail > 0 => {
                TransportError::Lost { operation: "register guest memory for another rail", cause }
            }
            error => error,
        })?;
        if let Err(error) = self.announce() {
            // The source may have all it wants, and be about to end its channels. If it has not,
            // it misses the rest and says so.
            tracing::debug!("nobody hears where guest memory is: {error}");
            self.over.store(true, Ordering::Release);
            return Ok(None);
        }
        // Another thread may be registering the last, or credits may have to come back.
        let pause = if more { Duration::ZERO } else { GLANCE };
        Ok(Some(Instant::now() + pause))
    }
}

/// Tells of all memory, which must be registered. Waits while the other side reads it.
pub(crate) fn tell_all(outlet: &mut Outlet, registered: &Registered) -> Result<(), TransportError> {
    let all: Vec<Entry> = registered.entries_from(0).collect();
    all.chunks(ENTRIES_AT_ONCE).try_for_each(|some| outlet.message(&encode(some), None).map(drop))
}

/// Hears of all memory, until a deadline.
pub(crate) fn hear_all(
    inlet: &mut Inlet,
    layout: &Layout,
    timeout: Duration,
) -> Result<RemoteTable, TransportError> {
    let deadline = Instant::now().checked_add(timeout);
    let mut table = RemoteTable::new(layout);
    while !table.is_complete() {
        let Some(message) = inlet.next(deadline)? else {
            let operation = "hear where the other side's guest memory is";
            return Err(TransportError::TimedOut { operation, after: timeout });
        };
        take_in(&mut table, &message)?;
    }
    inlet.acknowledge()?;
    Ok(table)
}

fn take_in(table: &mut RemoteTable, message: &Message) -> Result<(), TransportError> {
    match message {
        Message::Bytes(bytes) => table.take_in(bytes),
        // It says that somebody is there.
        Message::Mark => Ok(()),
    }
}

/// Where messages come from.
pub(crate) trait Hear {
    /// The next message; `None` if none came until `deadline` (without one: for as long as it takes).
    fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Message>, TransportError>;
}

impl Hear for Inlet {
    fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Message>, TransportError> {
        Self::next(self, deadline)
    }
}

/// What the source has heard, shared by its threads. Each has a copy of the table and looks here
/// when a page is not in it.
#[derive(Debug)]
pub(crate) struct Directory<I = Inlet> {
    table: Mutex<RemoteTable>,
    /// The table has grown, or who heard has failed.
    grown: Condvar,
    inlet: Mutex<I>,
}

impl<I: Hear> Directory<I> {
    pub(crate) fn new(inlet: I, layout: &Layout) -> Self {
        let table = Mutex::new(RemoteTable::new(layout));
        Self { table, grown: Condvar::new(), inlet: Mutex::new(inlet) }
    }

    /// Brings a copy up to date with what has come, without waiting. Read now and then, the
    /// destination always has credits to tell more.
    pub(crate) fn refresh(&self, mine: &mut RemoteTable) -> Result<(), TransportError> {
        if mine.is_complete() {
            return Ok(());
        }
        if let Some(mut inlet) = self.try_inlet() {
            while !locked(&self.table).is_complete()
                && let Some(message) = inlet.next(Some(Instant::now()))?
            {
                take_in(&mut locked(&self.table), &message)?;
                self.grown.notify_all();
            }
        }
        mine.catch_up(&locked(&self.table));
        Ok(())
    }

    /// Waits until a copy has this page: the source has overtaken the destination, which is still
    /// registering it. Gives up when `check` fails, which is asked now and then: the inlet is not the
    /// caller's own, so what ends the caller's connection does not wake it.
    pub(crate) fn await_page(
        &self,
        mine: &mut RemoteTable,
        region: u16,
        page: u64,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<(), TransportError> {
        loop {
            check()?;
            // Before the table: what others heard until now is in it, and none will hear what comes.
            let inlet = self.try_inlet();
            {
                let table = locked(&self.table);
                mine.catch_up(&table);
                if mine.piece(region, page).is_some() {
                    return Ok(());
                }
                if table.is_complete() {
                    return Err(TransportError::OutOfOrder("memory that the destination lacks"));
                }
            }
            let Some(mut inlet) = inlet else {
                // Who has it wakes everybody, but may have done so just before.
                drop(self.grown.wait_timeout(locked(&self.table), GLANCE));
                continue;
            };
            let heard = match inlet.next(Some(Instant::now() + GLANCE)) {
                Ok(Some(message)) => take_in(&mut locked(&self.table), &message),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            drop(inlet);
            self.grown.notify_all();
            heard?;
        }
    }

    fn try_inlet(&self) -> Option<MutexGuard<'_, I>> {
        match self.inlet.try_lock() {
            Ok(inlet) => Some(inlet),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use pageferry::memory::{PAGE_BYTES, RegionLayout};

    use super::*;

    /// Messages. Nobody waits long for one that never comes.
    impl Hear for Receiver<Message> {
        fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Message>, TransportError> {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            Ok(self.recv_timeout(left.unwrap_or(Duration::MAX)).ok())
        }
    }

    #[test]
    fn nobody_waits_for_what_another_has_heard() {
        const CHUNKS: u64 = 4;
        let layout = Layout::new(vec![RegionLayout {
            guest_addr: 0,
            len_bytes: CHUNKS * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
        }])
        .unwrap();
        for _ in 0..2_000 {
            let (say, heard) = channel();
            let directory = Directory::new(heard, &layout);
            thread::scope(|scope| {
                let senders: Vec<_> = (0..3)
                    .map(|_| {
                        scope.spawn(|| {
                            let mut mine = RemoteTable::new(&layout);
                            directory.refresh(&mut mine)?;
                            directory.await_page(&mut mine, 0, CHUNKS - 1, || Ok(()))
                        })
                    })
                    .collect();
                for first_page in 0..CHUNKS {
                    let entry = Entry { region: 0, first_page, pages: 1, address: 0, key: 1 };
                    say.send(Message::Bytes(encode(&[entry]))).unwrap();
                }
                for sender in senders {
                    sender.join().unwrap().unwrap();
                }
            });
        }
    }

    #[test]
    fn an_interrupt_ends_the_wait_for_a_page() {
        let layout = Layout::new(vec![RegionLayout {
            guest_addr: 0,
            len_bytes: PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
        }])
        .unwrap();
        let (_say, heard) = channel();
        let directory = Directory::new(heard, &layout);
        let calls = std::cell::Cell::new(0);
        let check = || {
            calls.set(calls.get() + 1);
            if calls.get() < 3 { Ok(()) } else { Err(TransportError::Interrupted) }
        };
        let ended = directory.await_page(&mut RemoteTable::new(&layout), 0, 0, check);
        assert!(matches!(ended, Err(TransportError::Interrupted)), "{ended:?}");
    }
}
