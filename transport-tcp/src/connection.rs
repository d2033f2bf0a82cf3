//! One TCP connection of a link, and what ends all connections of a link at once.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

/// Locks, whatever happened to others: no critical section here leaves a state half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When a wait that starts now is over; `None` also for times beyond what the clock can count.
pub(crate) fn deadline_after(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// Time left until a deadline, as `poll` wants it.
pub(crate) fn until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

/// Shared by everything that belongs to one end of a link.
pub(crate) struct LinkState {
    interrupted: AtomicBool,
    connections: Mutex<Vec<Weak<Connection>>>,
    /// Wakes whoever waits for something else than a connection.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for LinkState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkState").field("interrupted", &self.interrupted).finish_non_exhaustive()
    }
}

impl LinkState {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            interrupted: AtomicBool::new(false),
            connections: Mutex::default(),
            wake: Box::new(wake),
        })
    }

    /// Fails once the link was interrupted.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.interrupted.load(Ordering::Acquire) {
            return Err(TransportError::Interrupted);
        }
        Ok(())
    }

    /// Makes a connection part of the link, so that an interrupt reaches it.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        socket: Socket,
        peer: SocketAddr,
    ) -> Result<Arc<Connection>, TransportError> {
        let connection =
            Arc::new(Connection { socket, peer, link: Arc::clone(self), linger: false.into() });
        let mut connections = lock(&self.connections);
        connections.retain(|other| other.strong_count() > 0);
        connections.push(Arc::downgrade(&connection));
        // Asked with the lock held: an interrupt either sees the connection in the list, or had
        // set the flag before.
        self.check()?;
        Ok(connection)
    }
}

impl Interrupt for LinkState {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        for connection in lock(&self.connections).iter().filter_map(Weak::upgrade) {
            connection.shutdown(Shutdown::Both);
        }
        (self.wake)();
    }
}

/// A connection whose preambles are done; in blocking mode.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    peer: SocketAddr,
    link: Arc<LinkState>,
    /// Whether bytes that the other side must still get may be under way when the link is
    /// dropped.
    linger: AtomicBool,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Fails once the link was interrupted.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.link.check()
    }

    /// What a failed system call means.
    pub(crate) fn failed(&self, operation: &'static str, cause: io::Error) -> TransportError {
        if let Err(interrupted) = self.check() {
            return interrupted;
        }
        let errno = cause.raw_os_error().map(Errno::from_raw_os_error);
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
        if lost {
            TransportError::Lost { operation, cause }
        } else {
            TransportError::Io { operation, cause }
        }
    }

    /// What the end of the stream means where more was due.
    pub(crate) fn ended(&self, operation: &'static str) -> TransportError {
        match self.check() {
            Err(interrupted) => interrupted,
            Ok(()) => {
                TransportError::Lost { operation, cause: io::ErrorKind::UnexpectedEof.into() }
            }
        }
    }

    /// Waits until one of `events`, an error or the end is there; empty when the time is over.
    pub(crate) fn wait(
        &self,
        events: PollFlags,
        deadline: Option<Instant>,
    ) -> Result<PollFlags, TransportError> {
        loop {
            let mut polled = [PollFd::new(self, events)];
            let timeout = deadline.map(until);
            match poll(&mut polled, timeout.as_ref()) {
                Ok(_) => return Ok(polled[0].revents()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("wait for the other side", errno.into())),
            }
        }
    }

    /// One `recv`; repeated only when a signal came before anything else did.
    pub(crate) fn receive(&self, into: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
        rustix::io::retry_on_intr(|| rustix::net::recv(self, &mut *into, flags))
            .map(|(_, received)| received)
    }

    /// One `send`; repeated only when a signal came before anything else did.
    pub(crate) fn send(&self, bytes: &[u8], flags: SendFlags) -> Result<usize, Errno> {
        rustix::io::retry_on_intr(|| rustix::net::send(self, bytes, flags | SendFlags::NOSIGNAL))
    }

    /// Fails only when the other side did the same before, or is gone.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let _ = self.socket.shutdown(how);
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
        self.shutdown(Shutdown::Write);
        let mut discarded = [0; 16 * 1024];
        for _ in 0..MOST_READS {
            match self.receive(&mut discarded, RecvFlags::DONTWAIT) {
                Ok(1..) => {}
                Err(Errno::AGAIN) if linger => match self.wait(PollFlags::IN, Some(deadline)) {
                    Ok(ready) if !ready.is_empty() => {}
                    _ => break,
                },
                Ok(0) | Err(_) => break,
            }
        }
        self.shutdown(Shutdown::Both);
    }
}

/// Most time a dropped link spends on channels that were finished, but not all acknowledged.
const LINGER: Duration = Duration::from_secs(2);

/// Closes all connections of a link that is dropped.
pub(crate) fn close_all(connections: &[Arc<Connection>]) {
    let deadline = Instant::now() + LINGER;
    for connection in connections {
        connection.close(deadline);
    }
}
