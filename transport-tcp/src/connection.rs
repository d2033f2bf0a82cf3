//! One TCP connection of a link, and what ends all connections of a link at once.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::reception::{Served, TurnedAway};
use pageferry::transport::{Ending, Fate, Interrupt, Place, TransportError, ZeroCopyCounts};
use pageferry_identity::words;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

use crate::framing::refusal;
use crate::options;
use crate::outstanding::{Outstanding, Unreleased};
use crate::preamble::{Answer, Status};
use crate::raw_io;
use crate::tls::{Broken, Stage};
use crate::waiting::lock;
use crate::wire::{Seal, Wire};

/// Shared by everything that belongs to one end of a link.
pub(crate) struct LinkState {
    pub(crate) fate: Fate,
    connections: Mutex<Vec<Weak<Connection>>>,
    /// The one among them that has room for words of why the link is over.
    control: OnceLock<Weak<Connection>>,
    /// Wakes whoever waits for something else than a connection.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for LinkState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkState").field("fate", &self.fate).finish_non_exhaustive()
    }
}

impl LinkState {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            fate: Fate::default(),
            connections: Mutex::default(),
            control: OnceLock::new(),
            wake: Box::new(wake),
        })
    }

    /// Fails once the link was interrupted, or it is known why it is over.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.fate.check()
    }

    /// Wakes everyone up, for whom [`Self::check`] fails from now on.
    fn shut_down(&self) {
        for connection in lock(&self.connections).iter().filter_map(Weak::upgrade) {
            connection.shutdown(Shutdown::Both);
        }
        (self.wake)();
    }

    /// Makes the control connection part of a destination's link.
    pub(crate) fn adopt_control(
        self: &Arc<Self>,
        wire: Wire,
        peer: SocketAddr,
    ) -> Result<Arc<Connection>, TransportError> {
        let connection = self.adopt(wire, peer)?;
        self.control.get_or_init(|| Arc::downgrade(&connection));
        Ok(connection)
    }

    /// Makes a connection part of the link, so that an interrupt reaches it.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        wire: Wire,
        peer: SocketAddr,
    ) -> Result<Arc<Connection>, TransportError> {
        let connection = Arc::new(Connection {
            wire,
            peer,
            link: Arc::clone(self),
            interrupted: false.into(),
            end: OnceLock::new(),
            linger: false.into(),
            unreleased: Mutex::default(),
        });
        let mut connections = lock(&self.connections);
        connections.retain(|other| other.strong_count() > 0);
        connections.push(Arc::downgrade(&connection));
        // Asked with the lock held: an interrupt either sees the connection in the list, or had
        // set the flag before.
        self.check()?;
        Ok(connection)
    }
}

impl Served for LinkState {
    fn place(&self) -> Place {
        self.fate.place()
    }

    /// Says so to the source, on the control connection: on others it would be taken for what they are for.
    fn displace(&self) {
        let reason = TurnedAway::Displaced.to_string();
        let told = refusal(&Answer { status: Status::Busy, reason });
        let connections = lock(&self.connections);
        if let Some(control) = self.control.get().and_then(Weak::upgrade) {
            // Should a frame be half out it is cut short, for somebody who does not read either.
            let _ = control.send(&told, SendFlags::DONTWAIT);
        }
        // Not before: whoever hears of it here may drop the link, and nothing more would go out. With the lock
        // held nobody here learns first that the source is gone; see [`Connection::why_over`].
        self.fate.end(Ending::Displaced);
        drop(connections);
        self.shut_down();
    }
}

impl Interrupt for LinkState {
    fn interrupt(&self) {
        self.fate.interrupt();
        self.shut_down();
    }
}

/// Does not keep the connection, nor the guest memory that it may still hold.
struct ConnectionInterrupter(Weak<Connection>);

impl Interrupt for ConnectionInterrupter {
    fn interrupt(&self) {
        if let Some(connection) = self.0.upgrade() {
            connection.interrupted.store(true, Ordering::Release);
            connection.shutdown(Shutdown::Both);
        }
    }
}

/// A connection whose preambles are done; in blocking mode.
#[derive(Debug)]
pub(crate) struct Connection {
    wire: Wire,
    peer: SocketAddr,
    link: Arc<LinkState>,
    /// Alone, whatever became of the link.
    interrupted: AtomicBool,
    /// How it was lost. The kernel says so once, to whoever asks first, and from then on that the
    /// stream has ended, or that the pipe is broken.
    end: OnceLock<Errno>,
    /// Whether bytes that the other side must still get may be under way when the link is
    /// dropped.
    linger: AtomicBool,
    /// Zero-copy sends that were under way when their sender was dropped.
    unreleased: Mutex<Option<Unreleased>>,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

impl Connection {
    pub(crate) fn socket(&self) -> &Socket {
        self.wire.socket()
    }

    /// Who encrypts.
    pub(crate) fn seal(&self) -> Seal {
        self.wire.seal()
    }

    pub(crate) fn is_within_host(&self) -> bool {
        // Who has lost its addresses has lost the connection.
        options::is_within_host(self.socket()).unwrap_or(false)
    }

    /// Whether nobody outside this host is on the way.
    pub(crate) fn stays_within_host(&self) -> bool {
        options::stays_within_host(self.socket()).unwrap_or(false)
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Fails once the link or this connection was interrupted, or it is known why the link is over.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.interrupted.load(Ordering::Acquire) {
            return Err(TransportError::Interrupted);
        }
        self.link.check()
    }

    /// The same, once something has failed: a link that is just being ended for another source is over for that,
    /// and not for what its source made of it.
    fn why_over(&self) -> Result<(), TransportError> {
        drop(lock(&self.link.connections));
        self.check()
    }

    /// Of the whole link.
    pub(crate) fn fate(&self) -> &Fate {
        &self.link.fate
    }

    /// A handle that ends this connection alone.
    pub(crate) fn interrupter(self: &Arc<Self>) -> Arc<dyn Interrupt> {
        Arc::new(ConnectionInterrupter(Arc::downgrade(self)))
    }

    /// What a failed system call means.
    pub(crate) fn failed(&self, operation: &'static str, cause: io::Error) -> TransportError {
        if let Err(over) = self.why_over() {
            return over;
        }
        let errno = cause.raw_os_error().map(Errno::from_raw_os_error);
        if let Some(why) = self.wire.failure() {
            let cause = io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {why}"));
            return TransportError::Lost { operation, cause };
        }
        // What the kernel says of a record that it cannot decrypt, that is none, or that carries no data
        // (tls_rx_msg_size and tls_rx_one_record in net/tls/tls_sw.c).
        let of_a_record = [Errno::BADMSG, Errno::IO, Errno::MSGSIZE, Errno::INVAL];
        if self.seal() == Seal::Kernel && errno.is_some_and(|errno| of_a_record.contains(&errno)) {
            let why =
                "TLS: what came was changed on the way, or made up, or the other side ends it";
            let cause = io::Error::new(io::ErrorKind::InvalidData, why);
            return TransportError::Lost { operation, cause };
        }
        let lost = matches!(
            errno,
            Some(
                Errno::CONNRESET
                    | Errno::CONNABORTED
                    | Errno::PIPE
                    | Errno::TIMEDOUT
                    | Errno::NOTCONN
                    | Errno::HOSTUNREACH
                    | Errno::HOSTDOWN
                    | Errno::NETUNREACH
                    | Errno::NETDOWN
                    | Errno::NETRESET
            )
        );
        let Some(errno) = errno.filter(|_| lost) else {
            return TransportError::Io { operation, cause };
        };
        if matches!(errno, Errno::PIPE | Errno::NOTCONN) {
            return self.lost(operation, cause);
        }
        let cause = io::Error::from(*self.end.get_or_init(|| errno));
        TransportError::Lost { operation, cause }
    }

    /// Whether the kernel has said that the connection broke, and so did not end in order.
    pub(crate) fn is_lost(&self) -> bool {
        self.end.get().is_some()
    }

    fn lost(&self, operation: &'static str, cause: io::Error) -> TransportError {
        let cause = self.end.get().map_or(cause, |errno| io::Error::from(*errno));
        TransportError::Lost { operation, cause }
    }

    /// What the end of the stream means where more was due.
    pub(crate) fn ended(&self, operation: &'static str) -> TransportError {
        match self.why_over() {
            Err(over) => over,
            Ok(()) => self.lost(operation, io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Waits until one of `events`, an error or the end is there; empty when the time is over.
    pub(crate) fn wait(
        &self,
        events: PollFlags,
        deadline: Option<Instant>,
    ) -> Result<PollFlags, TransportError> {
        self.wire
            .wait(events, deadline)
            .map_err(|errno| self.failed("wait for the other side", errno.into()))
    }

    /// Waits until zero-copy sends may have been completed, at most until `deadline`.
    pub(crate) fn wait_for_completion(
        &self,
        deadline: Option<Instant>,
    ) -> Result<PollFlags, TransportError> {
        /// How often to look where `poll` cannot wait.
        const GLANCE: Duration = Duration::from_millis(1);
        // Errors are always waited for: a notification is one.
        let ready = self.wait(PollFlags::empty(), deadline)?;
        if ready.contains(PollFlags::HUP) {
            // Both directions are over, and from now on `poll` returns at once.
            std::thread::sleep(GLANCE);
        }
        Ok(ready)
    }

    /// Takes the completions of zero-copy sends that are there; what became complete. Does not
    /// look for more than are outstanding.
    pub(crate) fn take_completions(
        &self,
        outstanding: &mut Outstanding,
        system_calls: &mut u64,
    ) -> Result<ZeroCopyCounts, TransportError> {
        let mut new = ZeroCopyCounts::default();
        while !outstanding.is_empty() {
            *system_calls += 1;
            match raw_io::next_completion(self) {
                Ok(Some(completion)) => new.add(&outstanding.complete(completion)),
                Ok(None) => break,
                Err(cause) => return Err(self.failed("read zero-copy completions", cause)),
            }
        }
        Ok(new)
    }

    /// Leaves what zero-copy sends still read to [`Connection::close`].
    pub(crate) fn leave_unreleased(&self, unreleased: Unreleased) {
        *lock(&self.unreleased) = Some(unreleased);
    }

    /// Waits until the kernel reads no guest memory any more, if it still does. Until `deadline`
    /// it may send what it has; then the connection is reset, which throws that away.
    ///
    /// After the reset the kernel has dropped its write queue. What is left then are packets that
    /// a queue of the network stack or a NIC holds, each for as long as a packet takes to leave.
    /// Should that be longer than is waited for here, they still hold references to their pages:
    /// the memory is not reused, whoever unmaps it, and what they send is refused by the other
    /// side. So giving up here is safe for memory, and only leaves pages pinned a while longer.
    fn release(&self, deadline: Instant) {
        const RESET: Duration = Duration::from_millis(200);
        let Some(mut unreleased) = lock(&self.unreleased).take() else { return };
        if self.await_completions(&mut unreleased, deadline) {
            return;
        }
        // Where disconnecting fails, closing the socket does the same a moment later.
        let lingers = self.socket().set_linger(Some(Duration::ZERO));
        let reset = rustix::net::connect_unspec(self.socket());
        if self.await_completions(&mut unreleased, Instant::now() + RESET) {
            return;
        }
        tracing::warn!(
            peer = %self.peer,
            ?lingers,
            ?reset,
            "{} zero-copy sends are not complete on a connection that was reset; their pages stay \
             pinned until they are",
            unreleased.outstanding.len()
        );
    }

    /// Waits for all completions; whether they came.
    fn await_completions(&self, unreleased: &mut Unreleased, deadline: Instant) -> bool {
        loop {
            let taken = self.take_completions(&mut unreleased.outstanding, &mut 0);
            if unreleased.outstanding.is_empty() {
                return true;
            }
            if taken.is_err() || Instant::now() >= deadline {
                return false;
            }
            if self.wait_for_completion(Some(deadline)).is_err() {
                return false;
            }
        }
    }

    /// See [`Wire::receive`].
    pub(crate) fn receive(&self, into: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
        self.wire.receive(into, flags)
    }

    /// See [`Wire::send`].
    pub(crate) fn send(&self, bytes: &[u8], flags: SendFlags) -> Result<usize, Errno> {
        self.wire.send(bytes, flags)
    }

    /// The same, of several pieces.
    pub(crate) fn send_pieces(
        &self,
        pieces: &[IoSlice<'_>],
        flags: SendFlags,
    ) -> Result<usize, Errno> {
        self.wire.send_pieces(pieces, flags)
    }

    /// See [`Wire::flush`].
    pub(crate) fn flush(&self, deadline: Option<Instant>) -> Result<bool, Errno> {
        self.wire.flush(deadline)
    }

    /// Shakes hands, if there is TLS; false if the other side has not by `deadline`.
    pub(crate) fn secure(
        &self,
        operation: &'static str,
        deadline: Option<Instant>,
    ) -> Result<bool, TransportError> {
        loop {
            let awaited = match self.wire.shake_hands() {
                Ok(Stage::Done) => return Ok(true),
                Ok(Stage::Hears) => PollFlags::IN,
                Ok(Stage::Says) => PollFlags::OUT,
                Err(Broken::Ended) => return Err(self.ended(operation)),
                Err(Broken::Socket(errno)) => return Err(self.failed(operation, errno.into())),
                Err(Broken::Tls { error, plainly }) => {
                    self.check()?;
                    let address = self.peer.to_string();
                    let reason = plainly.map_or_else(
                        || words(&error),
                        |said| format!("it answers in plain text: {said}"),
                    );
                    return Err(TransportError::Security { address, reason });
                }
            };
            if self.wait(awaited, deadline)?.is_empty() {
                self.check()?;
                return Ok(false);
            }
        }
    }

    /// What TLS says of an answer that did not come.
    pub(crate) fn distrust(&self) -> Option<TransportError> {
        let reason = self.wire.failure()?;
        Some(TransportError::Security { address: self.peer.to_string(), reason })
    }

    /// Whether data channels of its link are encrypted in this process: only this transport can move bytes then.
    pub(crate) fn is_for_copies(&self) -> bool {
        self.wire.stays_in_process()
    }

    /// Has the kernel encrypt from here on, if it is to.
    pub(crate) fn leave_to_kernel(&self) -> Result<(), TransportError> {
        const LEAVING: &str = "have the kernel encrypt (--kernel-tls off does without)";
        self.wire.leave_to_kernel().map_err(|cause| match cause.kind() {
            // Not an error of a system call: somebody on the way, or a peer that is none.
            io::ErrorKind::ConnectionAborted => self.lost(LEAVING, cause),
            _ => self.failed(LEAVING, cause),
        })
    }

    /// Fails where a key of the kernel's has protected as much as it may: it cannot be changed under way.
    pub(crate) fn check_key(&self, operation: &'static str) -> Result<(), TransportError> {
        if !self.wire.has_used_up_its_key() {
            return Ok(());
        }
        let cause = io::Error::other("its TLS key has protected as much as one may");
        Err(TransportError::Lost { operation, cause })
    }

    /// So much went out past this by one call, to the socket itself.
    pub(crate) fn note_sent(&self, bytes: usize) {
        self.wire.note_sent(bytes);
    }

    /// Fails only when the other side did the same before, or is gone.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let _ = self.socket().shutdown(how);
    }

    /// Ends a data connection whose stream cannot go on. Closing it resets it: this side may have
    /// shut its window, and to a peer that waits for room an end in order would say nothing, until
    /// its kernel gives up ([`TcpOptions::user_timeout`](crate::TcpOptions::user_timeout)).
    pub(crate) fn break_off(&self) {
        let _ = self.socket().set_linger(Some(Duration::ZERO));
        self.shutdown(Shutdown::Both);
    }

    /// See [`Connection::close`].
    pub(crate) fn ask_to_linger(&self) {
        self.linger.store(true, Ordering::Relaxed);
    }

    /// Ends the connection for good, also for whoever still holds it.
    ///
    /// A socket that is closed while bytes from the other side are unread, or that gets some
    /// afterwards, answers with a reset, and a reset throws away what this side has sent and the
    /// other side's kernel has not got yet. So what was received is read first; and where it
    /// matters ([`Connection::ask_to_linger`]) until the other side has seen the end, at most
    /// until `deadline`.
    pub(crate) fn close(&self, deadline: Instant) {
        const MOST_READS: usize = 256;
        let linger = self.linger.load(Ordering::Relaxed) && self.check().is_ok();
        let _ = self.flush(Some(if linger { deadline } else { Instant::now() }));
        self.shutdown(Shutdown::Write);
        let mut discarded = [0; 16 * 1024];
        for _ in 0..MOST_READS {
            match self.receive(&mut discarded, RecvFlags::DONTWAIT) {
                Ok(1..) => {}
                Err(Errno::AGAIN) if linger => match self.wait(PollFlags::IN, Some(deadline)) {
                    Ok(ready) if !ready.is_empty() => {
                        // Completions wake `poll` too, as long as they are not taken.
                        if let Some(unreleased) = &mut *lock(&self.unreleased) {
                            let _ = self.take_completions(&mut unreleased.outstanding, &mut 0);
                        }
                    }
                    _ => break,
                },
                Ok(0) | Err(_) => break,
            }
        }
        self.release(if linger { deadline } else { Instant::now() });
        self.shutdown(Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Only where a channel outlived its link: else the link has closed the connection.
        self.release(Instant::now());
    }
}

/// Most time that a channel's end and a dropped link spend on what was finished, and is not all
/// with the other side.
pub(crate) const LINGER: Duration = Duration::from_secs(2);
