//! The source's end of a data channel.
//!
//! `send` only queues ([`crate::queue`]). The kernel is told when the queue is full, when the
//! engine waits, and at the end: everything queued is then one chain of requests that the kernel
//! does in order, going on by itself after partial sends, and one system call hands the chain
//! over and waits for its end. The last request takes what acknowledgements are there.
//!
//! Pages go out without a copy where that pays ([`Trial`]): long runs from registered buffers
//! if there are any, or pinned by the kernel for the time of one send; all else is copied by the
//! kernel. There are no plain sends from registered buffers: `IORING_OP_SEND` takes none, and
//! `IORING_OP_WRITE_FIXED` neither goes on after a partial send nor, before Linux 6.18, spares the
//! program a SIGPIPE.
//!
//! # Acknowledgements
//!
//! As tcp has them: a flag on a batch now and then, and a request when this side waits and no
//! answer would come otherwise ([`AckSchedule`](stream::AckSchedule)). A batch that was sent zero-copy counts as landed
//! when the kernel has let go of its memory too, which is mostly before.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::stream;
use pageferry::transport::{
    ChannelCounters, Interrupt, PageSender, Run, Ticket, TransportError, Watermarks, ZeroCopyCounts,
};
use pageferry_tcp::{DataSocket, ZeroCopy};
use rustix::io::Errno;

use crate::chain::{Chain, Sends, Until};
use crate::landings::Landings;
use crate::options::IoUringOptions;
use crate::queue::{Queue, WireBatch};
use crate::ring::Ring;
use crate::setup::MAX_CHAIN;
use crate::table::Table;
use crate::trial::Trial;
use crate::vectors::{Outgoing, ZeroCopyRuns};

/// A queue that has waited for so long is handed over at the next look.
const STALE: Duration = Duration::from_millis(1);
/// How long a wait for notifications lasts before it looks whether it is to go on: an interrupt ends
/// requests on the socket only.
const TURN: Duration = Duration::from_millis(50);
/// How long a finished channel waits for notifications before it takes its memory back.
const LINGER: Duration = Duration::from_secs(2);
/// The same of a channel that was lost or reset.
const LAST_READS: Duration = Duration::from_millis(200);

const SENDING: &str = "send pages";
const AWAITING_ACKS: &str = "receive acknowledgements";
const AWAITING_RELEASE: &str = "wait for the end of zero-copy sends";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The end record is out.
    Finished,
    /// Something failed, perhaps in the middle of a batch: nothing can follow.
    Broken,
}

/// Whether a request failed because the kernel could not pin its memory, or had none for it.
fn is_no_room(result: i32) -> bool {
    [libc::ENOBUFS, libc::ENOMEM].contains(&-result)
}

/// What goes out with what is queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    Nothing,
    /// A request for an acknowledgement, where none is under way.
    Request,
    /// The end of the channel.
    End,
}

#[derive(Debug)]
pub(crate) struct IoUringPageSender {
    ring: Ring,
    socket: DataSocket,
    memory: Arc<GuestMemory>,
    table: Option<Arc<Table>>,
    trial: Trial,
    threshold_bytes: usize,
    sends: Sends,
    phase: Phase,
    /// Why it is broken, if nobody was told yet.
    untold: Option<TransportError>,
    queue: Queue,
    queued_since: Option<Instant>,
    outgoing: Outgoing,
    head: Vec<u8>,
    /// The engine's tickets.
    sent: Ticket,
    landings: Landings,
    wire_bytes: u64,
}

impl IoUringPageSender {
    pub(crate) fn new(
        socket: DataSocket,
        memory: Arc<GuestMemory>,
        table: Option<Arc<Table>>,
        ring: Ring,
        options: &IoUringOptions,
    ) -> Self {
        // What is encrypted is a copy.
        let zero_copy = if socket.is_encrypted() { ZeroCopy::Off } else { options.zero_copy };
        let sends = if socket.is_encrypted() { Sends::InPart } else { Sends::Whole };
        let trial = Trial::new(zero_copy, ring.features(), socket.is_within_host());
        Self {
            ring,
            socket,
            table,
            trial,
            sends,
            threshold_bytes: usize::try_from(options.zero_copy_threshold_bytes)
                .unwrap_or(usize::MAX),
            phase: Phase::Open,
            untold: None,
            queue: Queue::new(crate::queue_bytes(options)),
            queued_since: None,
            outgoing: Outgoing::new(Arc::clone(&memory)),
            memory,
            head: Vec::new(),
            sent: 0,
            landings: Landings::default(),
            wire_bytes: 0,
        }
    }

    fn check_open(&mut self) -> Result<(), TransportError> {
        self.socket.check()?;
        if let Some(error) = self.untold.take() {
            return Err(error);
        }
        match self.phase {
            Phase::Open => Ok(()),
            Phase::Finished => Err(TransportError::OutOfOrder("the data channel is finished")),
            Phase::Broken => Err(self.socket.failed(SENDING, Errno::NOTCONN.into())),
        }
    }

    /// Something failed, perhaps in the middle of a record.
    fn give_up(&mut self) {
        self.phase = Phase::Broken;
        self.outgoing.clear();
        self.socket.break_off();
    }

    /// Hands over all that is queued, and waits until the kernel has it.
    fn flush(&mut self, last: Last) -> Result<(), TransportError> {
        let result = self.encode(last).and_then(|()| self.send_all());
        if result.is_err() {
            self.give_up();
        }
        self.outgoing.clear();
        result
    }

    /// Makes requests of the queue.
    fn encode(&mut self, last: Last) -> Result<(), TransportError> {
        self.queued_since = None;
        for WireBatch { runs, last, .. } in self.queue.drain() {
            let (number, ask) = self.landings.number(last, &runs);
            stream::encode_batch(number, &runs, ask, &mut self.head);
            self.outgoing.record(number, &self.head, runs);
        }
        match last {
            Last::Nothing => {}
            Last::Request => {
                if self.landings.are_due() && !self.landings.are_expected() {
                    stream::encode_ack_request(&mut self.head);
                    self.outgoing.record(0, &self.head, Vec::new());
                    self.landings.request();
                }
            }
            Last::End => {
                stream::encode_end(&mut self.head);
                self.outgoing.record(0, &self.head, Vec::new());
                // The end is a request too.
                self.landings.request();
            }
        }
        let (most_bytes, most_sends) = self.trial.most(|| self.ring.room_for_zero_copy());
        let before = most_sends;
        let mut zero_copy = (most_sends > 0).then_some(ZeroCopyRuns {
            table: self.table.as_deref(),
            least_bytes: self.threshold_bytes,
            most_bytes,
            most_sends,
        });
        self.outgoing.prepare(zero_copy.as_mut())?;
        if let Some(zero_copy) = zero_copy {
            self.trial.spend(before - zero_copy.most_sends);
        }
        Ok(())
    }

    /// Sends what was encoded, in as few chains as it takes.
    fn send_all(&mut self) -> Result<(), TransportError> {
        while !self.outgoing.is_done() {
            self.socket.check()?;
            let mut chain = Chain::new();
            self.outgoing.request(&mut chain, MAX_CHAIN - 1, self.sends);
            let sends = chain.len();
            let with_acks = self.landings.are_expected();
            if with_acks {
                chain.then().receive(self.landings.room(), Until::Now);
            }
            let results = self.ring.run(&self.socket, &mut chain);
            let results = results.map_err(|cause| self.socket.failed(SENDING, cause))?;
            let acks = with_acks.then(|| results[sends]);
            // The kernel may look for room before it begins a chain, and then sends nothing of it.
            let refused = results[..sends].iter().position(|result| is_no_room(*result));
            let refused = refused.filter(|step| self.outgoing.copy_from(*step));
            let errno = refused.map(|step| -results[step]);
            let mut failure = None;
            for &result in &results[..sends] {
                let sent = usize::try_from(result).unwrap_or(0);
                self.socket.note_sent(sent);
                self.wire_bytes += sent as u64;
                if !self.outgoing.advance(sent) {
                    // The rest was cancelled by the kernel: it is sent again from here on.
                    let again = [libc::EINTR, libc::EAGAIN, libc::ECANCELED];
                    let again = again.contains(&-result) || errno == Some(-result);
                    if result < 0 && !again {
                        failure = Some(io::Error::from_raw_os_error(-result));
                    } else if result == 0 {
                        failure = Some(io::ErrorKind::WriteZero.into());
                    }
                    break;
                }
            }
            if let Some(errno) = errno {
                self.no_room(errno);
            }
            if let Some(acks) = acks {
                self.take_acks(acks)?;
            }
            if let Some(cause) = failure {
                return Err(self.socket.failed(SENDING, cause));
            }
        }
        if self.trial.judge(|| self.ring.zero_copy()) {
            let peer = self.socket.peer_addr();
            let ZeroCopyCounts { sent, copied_by_kernel, .. } = self.ring.zero_copy();
            tracing::debug!(%peer, sent, copied_by_kernel, "zero-copy sends: {:?}", self.trial);
        }
        Ok(())
    }

    /// The kernel may not pin any more; what was to be zero-copy is copied.
    fn no_room(&mut self, errno: i32) {
        self.ring.take_notifications();
        if self.trial == Trial::Pays && self.ring.oldest_unreleased().is_some() {
            // What is under way has the room, and gives it back.
            return;
        }
        self.trial = Trial::DoesNotPay;
        let (peer, cause) = (self.socket.peer_addr(), io::Error::from_raw_os_error(errno));
        tracing::warn!(
            %peer,
            "sends without zero-copy from here on: no room to pin guest memory ({cause}); raise \
             RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= of systemd) or give CAP_IPC_LOCK"
        );
    }

    /// What a receive of acknowledgements came to.
    fn take_acks(&mut self, result: i32) -> Result<(), TransportError> {
        let received = match usize::try_from(result) {
            Ok(0) => return Err(self.socket.ended(AWAITING_ACKS)),
            Ok(received) => received,
            Err(_) if [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&-result) => {
                return Ok(());
            }
            Err(_) => {
                let cause = io::Error::from_raw_os_error(-result);
                return Err(self.socket.failed(AWAITING_ACKS, cause));
            }
        };
        self.wire_bytes += received as u64;
        self.landings.take(received).map_err(|error| {
            self.give_up();
            error.into()
        })
    }

    /// Waits for acknowledgements, at most so long.
    fn await_acks(&mut self, most: Duration) -> Result<(), TransportError> {
        let mut chain = Chain::new();
        chain.receive(self.landings.room(), Until::Some);
        chain.then().time_out(most);
        let results = self.ring.run(&self.socket, &mut chain);
        let results = results.map_err(|cause| self.socket.failed(AWAITING_ACKS, cause))?;
        let received = results[0];
        self.take_acks(received)
    }

    /// How far all has come.
    fn advance_marks(&mut self) -> Watermarks {
        self.ring.take_notifications();
        self.landings.advance(self.ring.oldest_unreleased());
        self.landings.marks()
    }

    /// Waits until the kernel reads no guest memory any more, at most so long.
    fn await_release(&mut self, most: Duration) -> Result<(), TransportError> {
        let deadline = Instant::now() + most;
        self.ring.take_notifications();
        while self.ring.oldest_unreleased().is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.ring.await_notification(left);
            waited.map_err(|cause| self.socket.failed(AWAITING_RELEASE, cause))?;
        }
        Ok(())
    }
}

impl PageSender for IoUringPageSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.check_open()?;
        self.socket.check_key(SENDING)?;
        if runs.is_empty() {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, "the batch has no runs");
            return Err(TransportError::Io { operation: SENDING, cause });
        }
        crate::CAPABILITIES.check(runs)?;
        runs.iter().try_for_each(|run| self.memory.span(run.range).map(drop))?;
        self.sent += 1;
        self.queue.push(self.sent, runs);
        self.queued_since.get_or_insert_with(Instant::now);
        if self.queue.is_full() {
            self.flush(Last::Nothing)?;
        }
        Ok(self.sent)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.socket.check()?;
        let before = self.landings.marks().landed;
        let Some(wait) = wait else {
            let stale = self.queued_since.is_some_and(|since| since.elapsed() >= STALE);
            if stale && self.phase == Phase::Open {
                self.flush(Last::Nothing)?;
            }
            return Ok(self.advance_marks());
        };
        let deadline = Instant::now().checked_add(wait);
        if self.phase == Phase::Open && before < self.sent {
            // What landed before the link was lost is worth knowing; the next call fails.
            self.untold = self.flush(Last::Request).err();
            if self.advance_marks().landed == before {
                self.check_open()?;
            }
        }
        let mut marks = self.advance_marks();
        while marks.landed == before && marks.landed < self.sent {
            let left = deadline
                .map_or(wait, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            if self.phase == Phase::Broken {
                self.check_open()?;
            }
            if self.landings.are_due() {
                self.await_acks(left)?;
            } else {
                let waited = self.ring.await_notification(left.min(TURN));
                waited.map_err(|cause| self.socket.failed(AWAITING_RELEASE, cause))?;
            }
            self.socket.check()?;
            marks = self.advance_marks();
        }
        Ok(marks)
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters {
            wire_bytes: self.wire_bytes,
            user_copied_bytes: 0,
            system_calls: self.ring.system_calls(),
            zero_copy: self.ring.zero_copy(),
            ..ChannelCounters::default()
        }
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        if self.phase == Phase::Finished {
            return self.socket.check();
        }
        self.check_open()?;
        self.flush(Last::End)?;
        self.phase = Phase::Finished;
        self.await_release(LINGER)?;
        self.socket.check()?;
        self.advance_marks();
        self.socket.finish();
        Ok(())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.socket.interrupter()
    }
}

impl Drop for IoUringPageSender {
    fn drop(&mut self) {
        if self.phase != Phase::Finished {
            self.socket.break_off();
        } else if self.landings.are_due() {
            // The last batches may still be in this side's send buffer. The link holds the
            // socket open; tell it to be patient when it goes.
            self.socket.ask_to_linger();
        }
        self.ring.take_notifications();
        if self.ring.oldest_unreleased().is_none() {
            return;
        }
        // A reset has the kernel forget what it has queued, and with it the memory. What is left
        // is what a NIC reads just now; its pages stay pinned until it has, whatever becomes of
        // the mapping.
        let reset = rustix::net::connect_unspec(&self.socket);
        let waited = self.await_release(LAST_READS);
        if self.ring.oldest_unreleased().is_some() {
            let peer = self.socket.peer_addr();
            tracing::warn!(%peer, ?reset, ?waited, "zero-copy sends of a reset connection go on");
        }
    }
}
