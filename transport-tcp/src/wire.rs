//! A connected socket, and TLS between it and its bytes where there is any.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use pageferry_identity::{KernelTls, words};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use socket2::{Protocol, Socket};

use crate::tls::kernel::{self, Records};
use crate::tls::{Broken, Session, Stage};
use crate::waiting::{lock, until};

/// Who encrypts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seal {
    /// Nobody.
    Plain,
    /// This process. Whatever else moves bytes over the socket would send them in plain text.
    Process,
    /// The kernel: the socket takes and gives plain bytes.
    Kernel,
}

const SEALS: [Seal; 3] = [Seal::Plain, Seal::Process, Seal::Kernel];

#[derive(Debug)]
pub(crate) struct Wire {
    socket: Socket,
    seal: AtomicU8,
    /// As long as it is the process that encrypts.
    session: Mutex<Option<Box<Session>>>,
    kernel: KernelTls,
    /// Sent by the kernel.
    records: Records,
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Wire {
    pub(crate) fn plain(socket: Socket) -> Self {
        let (session, kernel) = (Mutex::default(), KernelTls::Off);
        let (seal, records) = (AtomicU8::new(Seal::Plain as u8), Records::default());
        Self { socket, seal, session, kernel, records }
    }

    /// With a session whose handshake is still to come.
    pub(crate) fn sealed(socket: Socket, session: Session, kernel: KernelTls) -> Self {
        let session = Mutex::new(Some(Box::new(session)));
        let (seal, records) = (AtomicU8::new(Seal::Process as u8), Records::default());
        Self { socket, seal, session, kernel, records }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn seal(&self) -> Seal {
        SEALS[usize::from(self.seal.load(Ordering::Acquire)) % SEALS.len()]
    }

    /// Goes on with the handshake, if there is one.
    pub(crate) fn shake_hands(&self) -> Result<Stage, Broken> {
        match &mut *lock(&self.session) {
            None => Ok(Stage::Done),
            Some(session) => session.shake_hands(self.as_fd()),
        }
    }

    /// Whether it is the process that goes on encrypting, also data channels.
    pub(crate) fn stays_in_process(&self) -> bool {
        self.seal() == Seal::Process
            && match self.kernel {
                KernelTls::Off => true,
                KernelTls::Auto => self.kernel_cannot().is_some(),
                KernelTls::On => false,
            }
    }

    /// Why the kernel does not encrypt what goes over this socket; `None` if it can.
    fn kernel_cannot(&self) -> Option<&'static str> {
        let is_tcp = matches!(self.socket.protocol(), Ok(Some(Protocol::TCP)));
        if is_tcp { kernel::unavailable() } else { Some("the socket is none of TCP") }
    }

    /// Leaves what follows to the kernel, if it is to. From here on the session is gone, whatever comes of it.
    pub(crate) fn leave_to_kernel(&self) -> io::Result<()> {
        if self.seal() != Seal::Process || self.stays_in_process() {
            return Ok(());
        }
        if let Some(why) = self.kernel_cannot() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let session = lock(&self.session).take().ok_or(io::ErrorKind::NotConnected)?;
        let secrets = session.into_secrets();
        let secrets =
            secrets.map_err(|error| io::Error::new(io::ErrorKind::ConnectionAborted, error))?;
        kernel::take_over(self.as_fd(), secrets)?;
        self.seal.store(Seal::Kernel as u8, Ordering::Release);
        Ok(())
    }

    /// Takes some of what has come; 0 is the end. In plain text as the flags say; else those that matter are
    /// whether it waits.
    pub(crate) fn receive(&self, into: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
        if self.seal() != Seal::Process {
            return rustix::io::retry_on_intr(|| rustix::net::recv(self, &mut *into, flags))
                .map(|(_, received)| received);
        }
        loop {
            let received = self.with_session(|session| session.receive(self.as_fd(), into));
            match received {
                Err(Errno::AGAIN) if !flags.contains(RecvFlags::DONTWAIT) => {
                    self.wait(PollFlags::IN, None)?;
                }
                received => return received,
            }
        }
    }

    /// So much went out past this by one call, to the socket itself.
    pub(crate) fn note_sent(&self, bytes: usize) {
        if self.seal() == Seal::Kernel {
            self.records.note(bytes);
        }
    }

    /// Whether the kernel's key has protected as much as one may.
    pub(crate) fn has_used_up_its_key(&self) -> bool {
        self.records.are_too_many()
    }

    /// Sends some; how many bytes were taken. What was taken may still be here: [`Self::flush`].
    pub(crate) fn send(&self, bytes: &[u8], flags: SendFlags) -> Result<usize, Errno> {
        if self.seal() == Seal::Process {
            return self.send_pieces(&[IoSlice::new(bytes)], flags);
        }
        let flags = flags | SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(self, bytes, flags))?;
        self.note_sent(sent);
        Ok(sent)
    }

    /// The same, of several pieces.
    pub(crate) fn send_pieces(
        &self,
        pieces: &[IoSlice<'_>],
        flags: SendFlags,
    ) -> Result<usize, Errno> {
        if self.seal() != Seal::Process {
            let (flags, mut nothing) =
                (flags | SendFlags::NOSIGNAL, SendAncillaryBuffer::default());
            let sent = rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(self, pieces, &mut nothing, flags)
            })?;
            self.note_sent(sent);
            return Ok(sent);
        }
        loop {
            let sent = self.with_session(|session| session.send(self.as_fd(), pieces));
            match sent {
                Err(Errno::AGAIN) if !flags.contains(SendFlags::DONTWAIT) => {
                    self.wait(PollFlags::OUT, None)?;
                }
                sent => return sent,
            }
        }
    }

    /// Waits until all that was taken is with the kernel, at most until `deadline`; whether it is.
    pub(crate) fn flush(&self, deadline: Option<Instant>) -> Result<bool, Errno> {
        while self.seal() == Seal::Process {
            match self.with_session(|session| session.flush(self.as_fd())) {
                Ok(()) => break,
                Err(Errno::AGAIN) => {
                    if self.poll(PollFlags::OUT, deadline)?.is_empty() {
                        return Ok(false);
                    }
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(true)
    }

    /// Waits until one of `events`, an error or the end is there; empty when the time is over. Sends meanwhile
    /// what was taken and is still here.
    pub(crate) fn wait(
        &self,
        events: PollFlags,
        deadline: Option<Instant>,
    ) -> Result<PollFlags, Errno> {
        loop {
            let mut unsent = false;
            if self.seal() == Seal::Process
                && let Some(session) = &mut *lock(&self.session)
            {
                if events.contains(PollFlags::IN) && session.has_more() {
                    return Ok(PollFlags::IN);
                }
                unsent = session.is_unsent();
            }
            let also = if unsent { PollFlags::OUT } else { PollFlags::empty() };
            let ready = self.poll(events | also, deadline)?;
            if !unsent || !ready.contains(PollFlags::OUT) {
                return Ok(ready);
            }
            match self.with_session(|session| session.flush(self.as_fd())) {
                // Room was waited for, and there may be more.
                Ok(()) | Err(Errno::AGAIN) if ready.intersects(events) => return Ok(ready),
                Ok(()) | Err(Errno::AGAIN) => {}
                // What comes in may be why.
                Err(_) if events.contains(PollFlags::IN) => self.mute(),
                Err(errno) => return Err(errno),
            }
        }
    }

    fn mute(&self) {
        if let Some(session) = &mut *lock(&self.session) {
            session.mute();
        }
    }

    fn poll(&self, events: PollFlags, deadline: Option<Instant>) -> Result<PollFlags, Errno> {
        loop {
            let mut polled = [PollFd::new(self, events)];
            match poll(&mut polled, deadline.map(until).as_ref()) {
                Ok(_) => return Ok(polled[0].revents()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn with_session<T>(
        &self,
        act: impl FnOnce(&mut Session) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match &mut *lock(&self.session) {
            Some(session) => act(session),
            // Lost on its way to the kernel.
            None => Err(Errno::NOTCONN),
        }
    }

    /// What TLS has to say of a connection that failed.
    pub(crate) fn failure(&self) -> Option<String> {
        lock(&self.session).as_ref().and_then(|session| session.failure().map(words))
    }
}
