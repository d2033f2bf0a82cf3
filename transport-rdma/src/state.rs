//! What the connections of one end of a link share: whether it was interrupted, whether it broke; and
//! what each has of its own.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::reception::{Bell, Served};
use pageferry::transport::{Ending, Fate, Interrupt, Place, TransportError};

use crate::port::PortHealth;
use crate::verbs::{Context, Watch};

/// The device that a link goes through.
#[derive(Debug)]
struct Watched {
    device: Watch,
    health: Mutex<PortHealth>,
}

impl Watched {
    fn health(&self) -> MutexGuard<'_, PortHealth> {
        // No critical section leaves it half changed.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shared by everything that belongs to one end of a link.
pub(crate) struct LinkState {
    pub(crate) fate: Fate,
    /// Tells what happens to the device, once that is known.
    watched: OnceLock<Watched>,
    bell: Bell,
    /// Wakes those who wait for something else than the bell.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl LinkState {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            fate: Fate::default(),
            watched: OnceLock::new(),
            bell: Bell::new()?,
            wake: Box::new(wake),
        }))
    }

    /// From here on the end of the device, or of a port for longer than `patience`, is noticed.
    pub(crate) fn watch(&self, context: Context, port: u8, patience: Duration) -> io::Result<()> {
        if self.watched.get().is_none() {
            let health = Mutex::new(PortHealth::new(port, patience));
            // Of two that are made at once one goes away again.
            let _ = self.watched.set(Watched { device: Watch::new(context)?, health });
        }
        Ok(())
    }

    /// The destination has turned this source away, which ends the link.
    pub(crate) fn refuse(&self, by: SocketAddr, reason: String) -> TransportError {
        let refused = self.fate.end(Ending::Refused { by, reason });
        self.ring();
        refused
    }

    /// Fails once the link was interrupted, its source was turned away, or its device failed.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.fate.check()
    }

    /// Readable when [`Self::check`] fails.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Readable when [`Self::look`] should be called.
    pub(crate) fn device(&self) -> Option<BorrowedFd<'_>> {
        self.watched.get().map(|watched| watched.device.fd())
    }

    /// When [`Self::look`] should be called, if nothing else happens before.
    pub(crate) fn look_at(&self) -> Option<Instant> {
        self.watched.get()?.health().deadline()
    }

    /// Looks what the device has to say.
    pub(crate) fn look(&self) {
        let Some(watched) = self.watched.get() else { return };
        let mut health = watched.health();
        let now = Instant::now();
        let mut fatal = None;
        while let Some(event) = watched.device.take() {
            tracing::info!("the RDMA device says {event:?}");
            fatal = fatal.or(health.note(event, now));
        }
        if let Some(what) = fatal.or_else(|| health.check(now, |port| watched.device.is_up(port))) {
            tracing::warn!("the RDMA device failed: {what}");
            let (operation, kind) = ("use the RDMA device", io::ErrorKind::NetworkDown);
            self.fate.end(Ending::Lost { operation, kind, what });
            self.ring();
        }
    }

    fn ring(&self) {
        self.bell.ring();
        (self.wake)();
    }
}

impl fmt::Debug for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkState").field("fate", &self.fate).finish_non_exhaustive()
    }
}

impl Served for LinkState {
    fn place(&self) -> Place {
        self.fate.place()
    }

    fn displace(&self) {
        self.fate.end(Ending::Displaced);
        self.ring();
    }
}

impl Interrupt for LinkState {
    fn interrupt(&self) {
        self.fate.interrupt();
        self.ring();
    }
}

/// What one connection of a link has of its own: it may be interrupted while the others go on.
#[derive(Debug)]
pub(crate) struct ChannelState {
    pub(crate) link: Arc<LinkState>,
    interrupted: AtomicBool,
    bell: Bell,
}

impl ChannelState {
    pub(crate) fn new(link: &Arc<LinkState>) -> io::Result<Self> {
        Ok(Self { link: Arc::clone(link), interrupted: AtomicBool::new(false), bell: Bell::new()? })
    }

    /// Fails once the connection was interrupted, or the link is over.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.interrupted.load(Ordering::Acquire) {
            return Err(TransportError::Interrupted);
        }
        self.link.check()
    }

    /// Readable once this connection was interrupted.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(crate) fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        self.bell.ring();
    }
}
