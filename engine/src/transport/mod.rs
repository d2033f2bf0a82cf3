//! The transport port: what moves bytes between the two sides.
//!
//! A transport is chosen at run time, so its traits are object-safe; a call hands over a batch
//! of page runs, never a single page. One migration goes through these stages, each a value that
//! the one before it gives:
//!
//! 1. a **link** ([`SourceLink`], [`DestinationLink`]): the two sides found each other, by what dials
//!    ([`Connector`]) and what waits ([`Rendezvous`]). A migration may have several, one after the other. Its
//!    [control channel](ControlChannel) is reliable, ordered, framed and works both ways. The
//!    handshake runs over it; only after it may the destination allocate memory;
//! 2. **registration** of guest memory ([`Link::register`]): pinning, memory regions,
//!    fixed buffers, or nothing. Explicit, since it costs; revoked when the link is dropped, or what made it;
//! 3. N **data channels** ([`PageSender`], [`PageReceiver`]), each driven by one thread on each
//!    side. Batches of one channel land in the order they were sent. Nothing is promised between
//!    channels, nor between a data channel and the control channel.
//!
//! Every transport passes the conformance suite (`pageferry::testing::conformance`, behind the
//! feature `test-support`).

pub mod addresses;
mod batch;
pub mod byte_stream;
mod error;
mod fate;
mod landing;
mod links;
pub mod race;
pub mod reads;
pub mod reception;
mod stages;
pub mod stream;
pub mod ways;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use batch::{MAX_BATCH_RUNS, MAX_BATCH_ZERO_PAGES, PageCounts, Run, RunKind};
pub use error::TransportError;
pub(crate) use error::rounded;
pub use fate::{Ending, Fate};
pub use landing::LandingWatch;
pub use links::{Attempts, Connector, LinkPurpose, OneLink, Rendezvous, Returning};
pub use reads::{MAX_LANES, PageRequests, PageServer, ReadLane};
pub use reception::{
    Admission, Greeted, Holder, MAX_GREETING_BYTES, Place, Standing, Turn, WaitingRoom, Warnings,
    check_greeting, first_of_the_most,
};
pub use stages::Stages;

pub use crate::control::protocol::MigrationId;
use crate::pages::memory::GuestMemory;

/// Largest control frame in bytes. A sender may not pass more, a receiver refuses more before
/// it allocates.
pub const MAX_FRAME_BYTES: usize = 1 << 20;

/// Names one link: random, made by the source. Data channels find their control channel by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkId(pub [u8; 16]);

impl LinkId {
    /// A fresh random id from the operating system.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkId({self})")
    }
}

/// What a transport can do; asked, never assumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent properties, each asked by name")]
pub struct Capabilities {
    /// The source writes the destination's memory; its CPU does nothing per page.
    pub one_sided_write: bool,
    /// The destination [reads](SourceLink::serve_reads) the source's memory, whose CPU does nothing for it.
    pub one_sided_read: bool,
    /// The kernel or NIC reads guest memory after `send` returned. Then *released* matters:
    /// memory may not be unmapped before it.
    pub zero_copy: bool,
    /// Guest memory must be registered, and so must not be discarded meanwhile.
    pub needs_registration: bool,
    /// What lands is what was sent, or the link is lost: it is authenticated, or stays within one host. Else the engine
    /// makes sure of it ([`PageChecks`](crate::PageChecks)).
    pub protects_pages: bool,
    /// Receivers tell what has landed ([`PageReceiver::watch_landings`]).
    pub tells_landings: bool,
    /// Most page bytes in one batch.
    pub max_batch_bytes: u64,
    /// Most runs in one batch, at most [`MAX_BATCH_RUNS`].
    pub max_batch_runs: usize,
}

impl Capabilities {
    /// Refuses a batch that is over the limits, [`MAX_BATCH_ZERO_PAGES`] among them.
    pub fn check(&self, runs: &[Run]) -> Result<(), TransportError> {
        let payload_bytes: u64 = runs.iter().map(Run::payload_bytes).sum();
        let zero_pages = PageCounts::of(runs).zero;
        for (what, size, limit) in [
            ("batch of runs", runs.len() as u64, self.max_batch_runs as u64),
            ("batch of page bytes", payload_bytes, self.max_batch_bytes),
            ("batch of zero pages", zero_pages, MAX_BATCH_ZERO_PAGES),
        ] {
            if size > limit {
                return Err(TransportError::TooLarge { what, size, limit });
            }
        }
        Ok(())
    }
}

/// What registering guest memory cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registration {
    /// Bytes of guest memory registered; 0 where none is needed.
    pub registered_bytes: u64,
    /// Time it took.
    pub took: Duration,
}

impl Registration {
    /// Adds another.
    pub fn add(&mut self, other: &Self) {
        self.registered_bytes += other.registered_bytes;
        self.took += other.took;
    }
}

/// Ends every operation on a link or a data channel, now and later, with
/// [`TransportError::Interrupted`].
///
/// May be called from any thread, several times, also after the link was dropped. Holds no guest
/// memory.
pub trait Interrupt: Send + Sync {
    /// Wakes everyone up. Does not wait.
    fn interrupt(&self);
}

/// The control channel, cut into its two directions so that each can have its thread.
pub struct ControlChannel {
    /// To the other side.
    pub sender: Box<dyn ControlSender>,
    /// From the other side.
    pub receiver: Box<dyn ControlReceiver>,
}

/// Refuses a control frame that no sender may pass.
pub fn check_frame(frame: &[u8]) -> Result<(), TransportError> {
    if frame.is_empty() {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, "the frame is empty");
        return Err(TransportError::Io { operation: "send a control frame", cause });
    }
    if frame.len() > MAX_FRAME_BYTES {
        let (size, limit) = (frame.len() as u64, MAX_FRAME_BYTES as u64);
        return Err(TransportError::TooLarge { what: "control frame", size, limit });
    }
    Ok(())
}

impl fmt::Debug for ControlChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlChannel").finish_non_exhaustive()
    }
}

/// Sends control frames.
pub trait ControlSender: Send {
    /// Sends one frame of 1 to [`MAX_FRAME_BYTES`] bytes. Returns when the transport has taken
    /// it; frames arrive whole and in order, or the link is lost.
    ///
    /// Where the other side makes no room, gives up after `timeout` with
    /// [`TransportError::TimedOut`]. Part of the frame may be out then, so this half is of no more
    /// use: every later call fails. An interrupt of the link wakes it.
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError>;
}

/// Receives control frames.
pub trait ControlReceiver: Send {
    /// Waits for the next frame, at most `timeout` (`None`: until the link ends). After
    /// [`TransportError::TimedOut`] the call may be repeated and no byte is lost.
    /// [`TransportError::Closed`] says that the other side dropped its half in order.
    ///
    /// Where what comes is no frame ([`TransportError::Malformed`], [`TransportError::Violation`]) the sender
    /// still sends: this side's last word says why it goes no further.
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError>;
}

/// What both ends of a link have.
///
/// # Resource cleanup
///
/// Dropping it closes the link and revokes the registration. The engine drops all data channels
/// and the control channel first.
pub trait Link: Send {
    /// Short name: "tcp".
    fn name(&self) -> &'static str;

    /// What this end can do.
    fn capabilities(&self) -> Capabilities;

    /// Takes the control channel; the second call fails with [`TransportError::OutOfOrder`].
    fn control(&mut self) -> Result<ControlChannel, TransportError>;

    /// Registers guest memory: at the source for reading, at the destination for writing by the
    /// source. A transport may leave some of it to the data channels
    /// ([`ChannelCounters::registered`]), and keep it for the next link of the migration, with what makes the links.
    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError>;

    /// A handle that ends all operations of this end.
    fn interrupter(&self) -> Arc<dyn Interrupt>;
}

/// The source's end of a link.
pub trait SourceLink: Link {
    /// Opens `channels` data channels; the destination calls
    /// [`DestinationLink::open_receivers`] with the same number meanwhile. Channel `i` here is
    /// channel `i` there.
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError>;

    /// Opens so many lanes by which the destination reads registered memory; it calls
    /// [`DestinationLink::open_readers`] with the same number meanwhile. Lane `i` here is lane `i` there. Once for a link,
    /// with data channels or without. Dropping a server ends its lane.
    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError>;
}

/// The destination's end of a link.
pub trait DestinationLink: Link {
    /// Accepts `channels` data channels, in order of their index; gives up after `timeout`.
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError>;

    /// From now on a source that comes back ([`Returning`]) displaces this link, which may seem to live while its
    /// source has lost it. Nothing to do where nobody can come before this link is gone.
    fn expect_return(&mut self, returning: Returning) {
        let _ = returning;
    }

    /// Accepts so many lanes for reads, in order of their index; gives up after `timeout`. What is read lands in `into`,
    /// which is laid out as the memory that is registered, and may be that; a one-sided transport registers it where it is
    /// not.
    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError>;
}

/// Number of a batch on its channel, from 1.
pub type Ticket = u64;

/// How far a channel has come. Both only grow; `released ≤ sent`, `landed ≤ sent`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// Batches up to this ticket will not be read from guest memory any more.
    pub released: Ticket,
    /// All bytes of batches up to this ticket are in the destination's memory.
    pub landed: Ticket,
}

/// What a channel's end has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChannelCounters {
    /// Bytes given to or taken from the wire: pages, headers, acknowledgements of this end's
    /// data channel. Without what lies below the transport (TCP/IP headers).
    pub wire_bytes: u64,
    /// Page bytes that user space copied. 0 on the raw path.
    pub user_copied_bytes: u64,
    /// System calls made to move data.
    pub system_calls: u64,
    /// What became of zero-copy sends.
    pub zero_copy: ZeroCopyCounts,
    /// What was asked of a NIC; 0 where there are only sockets.
    pub work_requests: WorkRequestCounts,
    /// Guest memory that was registered while pages flowed, and so is not in what
    /// [`Link::register`] returned; the time is this channel's thread's.
    pub registered: Registration,
}

/// What became of sends that asked the kernel not to copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroCopyCounts {
    /// Sends that asked for it and are complete.
    pub sent: u64,
    /// Those of them that the kernel copied after all, as it says itself.
    pub copied_by_kernel: u64,
    /// Bytes of the sends in `sent`.
    pub sent_bytes: u64,
    /// Bytes of the sends in `copied_by_kernel`.
    pub copied_bytes: u64,
}

/// What was asked of a NIC that takes work requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkRequestCounts {
    /// Work requests posted to a send queue.
    pub posted: u64,
    /// Those of them that end in a completion if all goes well.
    pub signalled: u64,
    /// Calls that posted them: rings of the doorbell.
    pub doorbells: u64,
    /// Looks for completions. A thread that waits by looking again and again has very many.
    pub polls: u64,
}

impl WorkRequestCounts {
    /// Adds another channel's.
    pub fn add(&mut self, other: &Self) {
        self.posted += other.posted;
        self.signalled += other.signalled;
        self.doorbells += other.doorbells;
        self.polls += other.polls;
    }
}

impl ZeroCopyCounts {
    /// Adds another channel's.
    pub fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.copied_by_kernel += other.copied_by_kernel;
        self.sent_bytes += other.sent_bytes;
        self.copied_bytes += other.copied_bytes;
    }
}

impl ChannelCounters {
    /// Adds another channel's.
    pub fn add(&mut self, other: &Self) {
        self.wire_bytes += other.wire_bytes;
        self.user_copied_bytes += other.user_copied_bytes;
        self.system_calls += other.system_calls;
        self.zero_copy.add(&other.zero_copy);
        self.work_requests.add(&other.work_requests);
        self.registered.add(&other.registered);
    }
}

/// The source's end of a data channel; used by one thread at a time.
pub trait PageSender: Send {
    /// Sends a batch: data runs straight from registered guest memory, zero runs as a mention.
    /// May wait for room. Batches land in order, and the newest bytes win.
    ///
    /// The guest may write to the pages until they are released; whatever mix of bytes is sent,
    /// a later batch repairs, since the page was re-armed before.
    ///
    /// `runs` is not empty, at most [`Capabilities::max_batch_runs`] long and holds at most
    /// [`Capabilities::max_batch_bytes`] of page bytes and [`MAX_BATCH_ZERO_PAGES`] zero pages. No
    /// run is empty, no page is in two.
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError>;

    /// Asks for the watermarks. With `wait`, waits until `landed` has grown since the last call
    /// or the time is over, and makes sure that everything sent is under way and will be
    /// acknowledged; returns at once when everything has landed. Without, only takes what is
    /// there. Time over is no error.
    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError>;

    /// What this channel has done.
    fn counters(&self) -> ChannelCounters;

    /// Ends the channel in order: the receiver sees [`Received::End`] after the last batch.
    fn finish(&mut self) -> Result<(), TransportError>;

    /// A handle that ends all operations of this channel at this end, and of no other. The other
    /// end sees it [lost](TransportError::Lost), at the latest when this one is dropped.
    fn interrupter(&self) -> Arc<dyn Interrupt>;
}

/// What a receiver got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A batch that is in guest memory now.
    Batch(PageCounts),
    /// The source ended the channel in order.
    End,
}

/// The destination's end of a data channel; used by one thread at a time.
pub trait PageReceiver: Send {
    /// Waits for the next batch, places it and acknowledges it when due. A one-sided transport
    /// only returns what needs a CPU here (zero runs) and the end.
    ///
    /// Every run is checked against the registered memory before a byte is written. Zero runs are
    /// written a piece at a time ([`GuestMemory::fill_zero_while`]), so that an interrupt is heeded
    /// in the middle of a batch too.
    fn receive(&mut self) -> Result<Received, TransportError>;

    /// From now on each batch is told of, once its bytes are in guest memory and before it is acknowledged. For
    /// transports with [`Capabilities::tells_landings`].
    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        let _ = watch;
        Err(TransportError::Unsupported("word of what has landed"))
    }

    /// What this channel has done.
    fn counters(&self) -> ChannelCounters;

    /// As [`PageSender::interrupter`].
    fn interrupter(&self) -> Arc<dyn Interrupt>;
}
