//! A ring of one data channel, and the thread that uses it.
//!
//! [`Ring::run`] returns when all requests of a chain are complete, whatever comes: so nothing is
//! under way between two calls, nothing has to be cancelled, and what the requests use may be
//! borrowed. A lost link ends them, and an interrupt shuts the socket down, which ends them too.
//! The exception are notifications of zero-copy sends, which come when the NIC is done; they use
//! pinned memory only, and the account of them says which batches are not released yet.
//!
//! The kernel may take a part of a chain only: where it has no memory for a request, say. What it
//! took is then waited for, and nothing is handed over any more, neither the rest, which would run
//! unlinked and out of order and point to what is gone by then, nor another chain.
#![expect(unsafe_code, reason = "requests are handed to the kernel")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, ThreadId};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue};
use pageferry::transport::{TransportError, ZeroCopyCounts};
use rustix::event::{PollFd, PollFlags, poll};

use crate::chain::{Chain, ZeroCopySend};
use crate::features::{Feature, Features};
use crate::setup::{MAX_CHAIN, RingSetup};
use crate::table::Table;

/// Most zero-copy sends that wait for their notification.
const MAX_NOTIFICATIONS: usize = 1024;

/// Marks the user data of zero-copy sends; below it are the slot and the step.
const ZERO_COPY: u64 = 1 << 63;
/// `IORING_ENTER_GETEVENTS`.
const ENTER_GETEVENTS: u32 = 1;
/// `IORING_NOTIF_USAGE_ZC_COPIED`.
const COPIED: u32 = 1 << 31;

/// Zero-copy sends whose memory may still be read.
#[derive(Debug, Default)]
struct Account {
    /// Ticket and length of each, by slot.
    slots: Vec<Option<(u64, u64)>>,
    /// How many of each batch.
    outstanding: BTreeMap<u64, u32>,
}

impl Account {
    fn begin(&mut self, ticket: u64) -> u64 {
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[free] = Some((ticket, 0));
        *self.outstanding.entry(ticket).or_default() += 1;
        free as u64
    }

    fn len(&self) -> usize {
        self.outstanding.values().map(|count| *count as usize).sum()
    }

    fn sent(&mut self, slot: usize, bytes: u64) {
        if let Some(Some((_, sent))) = self.slots.get_mut(slot) {
            *sent = bytes;
        }
    }

    /// Takes a send off the account; its length.
    fn end(&mut self, slot: usize) -> u64 {
        let Some((ticket, bytes)) = self.slots.get_mut(slot).and_then(Option::take) else {
            return 0;
        };
        if let Some(count) = self.outstanding.get_mut(&ticket) {
            *count -= 1;
            if *count == 0 {
                self.outstanding.remove(&ticket);
            }
        }
        bytes
    }
}

/// A kernel's ring with its account.
struct Issuer {
    ring: IoUring,
    thread: ThreadId,
    account: Account,
}

impl Issuer {
    /// Waits for completions, and hands nothing over, whatever is in the submission queue.
    fn wait(&self, completions: usize) -> io::Result<usize> {
        let completions = u32::try_from(completions).unwrap_or(u32::MAX);
        let submitter = self.ring.submitter();
        // SAFETY: nothing is submitted, and there is no argument.
        unsafe { submitter.enter::<libc::sigset_t>(0, completions, ENTER_GETEVENTS, None) }
    }

    /// As [`Self::wait`] for one, at most so long.
    fn wait_at_most(&self, most: Duration) -> io::Result<()> {
        let most = rustix::event::Timespec::try_from(most).ok();
        // SAFETY: the ring, which is held, has it open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], most.as_ref())?;
        self.wait(0).map(drop)
    }

    /// Takes all completions that are there. What a step of the running chain came to goes to
    /// `results`; the rest are notifications. Returns how many steps are done.
    fn reap(&mut self, results: &mut [i32], counts: &mut ZeroCopyCounts) -> usize {
        let mut steps = 0;
        for entry in self.ring.completion() {
            let data = entry.user_data();
            let step = usize::try_from(data & 0xffff).unwrap_or(usize::MAX);
            let slot = usize::try_from((data & !ZERO_COPY) >> 16).unwrap_or(usize::MAX);
            if cqueue::notif(entry.flags()) {
                let bytes = self.account.end(slot);
                if bytes == 0 {
                    // It failed, or was cancelled.
                    continue;
                }
                counts.sent += 1;
                counts.sent_bytes += bytes;
                if entry.result().cast_unsigned() & COPIED != 0 {
                    counts.copied_by_kernel += 1;
                    counts.copied_bytes += bytes;
                }
                continue;
            }
            steps += 1;
            if let Some(result) = results.get_mut(step) {
                *result = entry.result();
            }
            if data & ZERO_COPY != 0 {
                self.account.sent(slot, u64::try_from(entry.result()).unwrap_or(0));
                if !cqueue::more(entry.flags()) {
                    // It failed before anything was read: no notification follows.
                    self.account.end(slot);
                }
            }
        }
        steps
    }
}

/// The ring of a data channel. The channel may be handed from thread to thread: where rings are
/// bound to one, the next thread gets a new one.
pub(crate) struct Ring {
    setup: RingSetup,
    table: Option<Arc<Table>>,
    /// Made and not enabled: which thread will use it is not known before it does.
    fresh: Option<IoUring>,
    issuer: Option<Issuer>,
    /// Rings of threads before, which still wait for notifications.
    retired: Vec<Issuer>,
    counts: ZeroCopyCounts,
    system_calls: u64,
    /// The kernel took a part of a chain only: nothing can follow.
    broken: bool,
    results: Vec<i32>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("setup", &self.setup).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring with the buffers of `table`, if there is one.
    pub(crate) fn new(
        setup: RingSetup,
        table: Option<Arc<Table>>,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Io { operation: "set up a ring", cause };
        let fresh = match &table {
            Some(table) => table.attached_ring(&setup, check)?,
            None => setup.build().map_err(failed)?,
        };
        Ok(Self {
            setup,
            table,
            fresh: Some(fresh),
            issuer: None,
            retired: Vec::new(),
            counts: ZeroCopyCounts::default(),
            system_calls: 0,
            broken: false,
            results: Vec::new(),
        })
    }

    pub(crate) fn features(&self) -> Features {
        self.setup.features
    }

    pub(crate) fn system_calls(&self) -> u64 {
        self.system_calls
    }

    pub(crate) fn zero_copy(&self) -> ZeroCopyCounts {
        self.counts
    }

    /// Has a ring that this thread may use.
    fn prepare(&mut self) -> io::Result<()> {
        let here = thread::current().id();
        let bound = self.setup.features.has(Feature::SingleIssuer);
        if self.issuer.as_ref().is_some_and(|issuer| !bound || issuer.thread == here) {
            return Ok(());
        }
        let ring = match (self.fresh.take(), &self.table) {
            (Some(fresh), _) => fresh,
            (None, Some(table)) => {
                table.attached_ring(&self.setup, || Ok(())).map_err(io::Error::other)?
            }
            (None, None) => self.setup.build()?,
        };
        self.system_calls += 1;
        ring.submitter().register_enable_rings()?;
        let issuer = Issuer { ring, thread: here, account: Account::default() };
        if let Some(former) = self.issuer.replace(issuer)
            && former.account.len() > 0
        {
            self.retired.push(former);
        }
        Ok(())
    }

    /// Hands a chain to the kernel and waits until all of it is complete. Gives what each step
    /// came to: a length, or minus an error number.
    pub(crate) fn run(&mut self, socket: &impl AsFd, chain: &mut Chain<'_>) -> io::Result<&[i32]> {
        if self.broken {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.prepare()?;
        let steps = chain.len();
        debug_assert!((1..=MAX_CHAIN).contains(&steps));
        self.results.clear();
        self.results.resize(steps, -libc::ECANCELED);
        let Some(issuer) = &mut self.issuer else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        // What is there must not be taken for what is waited for.
        issuer.reap(&mut [], &mut self.counts);
        let report = self.setup.features.has(Feature::ReportUsage);
        let mut entries = chain.entries(Fd(socket.as_fd().as_raw_fd()), report);
        for (step, entry) in entries.iter_mut().enumerate() {
            let slot = chain
                .zero_copy_send(step)
                .map(|ZeroCopySend { ticket, .. }| ZERO_COPY | issuer.account.begin(ticket) << 16);
            entry.set_user_data(slot.unwrap_or(0) | step as u64);
        }
        // SAFETY: what the entries point to is borrowed by the chain, which is borrowed until all
        // of them are complete; zero-copy sends may read on, from memory that is pinned.
        let pushed = unsafe { issuer.ring.submission().push_multiple(&entries) };
        pushed.map_err(io::Error::other)?;
        let (entered, not_taken) = loop {
            self.system_calls += 1;
            let entered = issuer.ring.submit_and_wait(steps);
            let not_taken = issuer.ring.submission().len();
            match &entered {
                Err(error) if not_taken == steps && passing(error) => {
                    // Notifications that found no room stand in the way.
                    issuer.reap(&mut [], &mut self.counts);
                    thread::yield_now();
                }
                _ => break (entered, not_taken),
            }
        };
        // The kernel's thread, where there is one, takes the rest in its own time, if it lives.
        let dead = |error: &io::Error| error.raw_os_error() == Some(libc::EOWNERDEAD);
        let polls = self.setup.sq_poll.is_some() && !entered.as_ref().is_err_and(dead);
        let never_taken = if polls { 0 } else { not_taken };
        if never_taken > 0 {
            self.broken = true;
            // Ends what waits for the other side.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
        let mut left = steps - never_taken;
        loop {
            left -= issuer.reap(&mut self.results, &mut self.counts).min(left);
            if left == 0 {
                break;
            }
            self.system_calls += 1;
            // The kernel's thread may have to be woken, which this does.
            let waited = if polls { issuer.ring.submit_and_wait(left) } else { issuer.wait(left) };
            if let Err(error) = waited
                && !passing(&error)
            {
                // It uses memory of ours and cannot be left alone.
                tracing::error!("failed to wait for requests: {error}");
                thread::yield_now();
            }
        }
        if self.broken {
            return Err(entered.err().unwrap_or_else(|| {
                io::Error::other("the kernel took a part of a chain of requests only")
            }));
        }
        Ok(&self.results)
    }

    /// Takes the notifications that are there, without a system call.
    pub(crate) fn take_notifications(&mut self) {
        for issuer in self.issuer.iter_mut().chain(&mut self.retired) {
            issuer.reap(&mut [], &mut self.counts);
        }
        self.retired.retain(|issuer| issuer.account.len() > 0);
    }

    /// The oldest batch that may still be read.
    pub(crate) fn oldest_unreleased(&self) -> Option<u64> {
        let accounts = self.issuer.iter().chain(&self.retired).map(|issuer| &issuer.account);
        accounts.filter_map(|account| account.outstanding.keys().next().copied()).min()
    }

    /// How many more zero-copy sends may begin.
    pub(crate) fn room_for_zero_copy(&self) -> usize {
        let all = self.issuer.iter().chain(&self.retired);
        let outstanding: usize = all.map(|issuer| issuer.account.len()).sum();
        MAX_NOTIFICATIONS.saturating_sub(outstanding)
    }

    /// Waits for a notification, at most so long.
    pub(crate) fn await_notification(&mut self, most: Duration) -> io::Result<()> {
        let here = thread::current().id();
        let bound = self.setup.features.has(Feature::SingleIssuer);
        match &mut self.issuer {
            Some(issuer) if issuer.account.len() > 0 && (!bound || issuer.thread == here) => {
                issuer.reap(&mut [], &mut self.counts);
                self.system_calls += 1;
                let waited = if self.broken {
                    issuer.wait_at_most(most)
                } else {
                    let most: Timespec = most.into();
                    let args = SubmitArgs::new().timespec(&most);
                    issuer.ring.submitter().submit_with_args(1, &args).map(drop)
                };
                match waited {
                    Err(error) if !passing(&error) => return Err(error),
                    _ => {}
                }
            }
            // Those of another thread come when it is in the kernel, or ends.
            _ => thread::yield_now(),
        }
        self.take_notifications();
        Ok(())
    }
}

fn passing(error: &io::Error) -> bool {
    let passing = [libc::EINTR, libc::ETIME, libc::EAGAIN, libc::EBUSY];
    error.raw_os_error().is_some_and(|errno| passing.contains(&errno))
}

impl Drop for Ring {
    fn drop(&mut self) {
        for ring in
            self.issuer.iter().chain(&self.retired).map(|issuer| &issuer.ring).chain(&self.fresh)
        {
            // Closing a ring lets go of its buffers some time later; this does now. Only the
            // thread of a ring may, and there may be none.
            let _ = ring.submitter().unregister_buffers();
        }
    }
}

#[cfg(test)]
mod tests;
