//! What the connections of one end of a link share: whether it was interrupted, whether it broke; and
//! what each has of its own.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, Place, Standing, TransportError};
use rustix::event::{EventfdFlags, eventfd};

use crate::port::PortHealth;
use crate::verbs::{Context, Watch};

/// Readable for good once it was rung.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn ring(&self) {
        // Fails only where it was rung 2⁶⁴ times before.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

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

/// What a source hears that is turned away.
#[derive(Debug)]
struct Refusal {
    by: SocketAddr,
    reason: String,
}

impl From<&Refusal> for TransportError {
    fn from(Refusal { by, reason }: &Refusal) -> Self {
        Self::Refused { address: by.to_string(), reason: reason.clone() }
    }
}

/// Shared by everything that belongs to one end of a link.
pub(crate) struct LinkState {
    interrupted: AtomicBool,
    /// Over for the sake of another source.
    displaced: AtomicBool,
    /// Who has turned this source away, and why, once that is known. What fails then fails for this.
    refused: OnceLock<Refusal>,
    /// What happened to the device.
    broken: OnceLock<&'static str>,
    /// Tells of that, once the device is known.
    watched: OnceLock<Watched>,
    bell: Bell,
    /// Of a source at the destination.
    standing: Mutex<Standing>,
    /// Wakes those who wait for something else than the bell.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl LinkState {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            interrupted: AtomicBool::new(false),
            displaced: AtomicBool::new(false),
            refused: OnceLock::new(),
            broken: OnceLock::new(),
            watched: OnceLock::new(),
            bell: Bell::new()?,
            standing: Mutex::new(Standing::firm()),
            wake: Box::new(wake),
        }))
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        // No critical section leaves it half changed.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the source that this link is of.
    pub(crate) fn take_place(&self, standing: Standing) {
        *self.standing() = standing;
    }

    /// Whether the source keeps its place.
    pub(crate) fn place(&self) -> Place {
        self.standing().place(Instant::now())
    }

    /// Ends the link for the sake of another source.
    pub(crate) fn displace(&self) {
        self.displaced.store(true, Ordering::Release);
        self.ring();
    }

    /// A control frame has come.
    pub(crate) fn note_heard(&self) {
        self.standing().hear();
    }

    /// Whether it is over for the sake of another source.
    pub(crate) fn was_displaced(&self) -> bool {
        self.displaced.load(Ordering::Acquire)
    }

    /// A control frame goes out.
    pub(crate) fn note_told(&self) {
        self.standing().tell(Instant::now());
    }

    /// Guest memory is registered.
    pub(crate) fn settle(&self) {
        self.standing().settle();
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
        let refusal = self.refused.get_or_init(|| Refusal { by, reason });
        self.ring();
        refusal.into()
    }

    /// Fails once the link was interrupted, its source was turned away, or its device failed.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.interrupted.load(Ordering::Acquire) {
            return Err(TransportError::Interrupted);
        }
        if let Some(refusal) = self.refused.get() {
            return Err(refusal.into());
        }
        if self.was_displaced() {
            return Err(TransportError::Displaced);
        }
        match self.broken.get() {
            Some(what) => Err(TransportError::Lost {
                operation: "use the RDMA device",
                cause: io::Error::new(io::ErrorKind::NetworkDown, *what),
            }),
            None => Ok(()),
        }
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
            let _ = self.broken.set(what);
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
        f.debug_struct("LinkState")
            .field("interrupted", &self.interrupted)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Interrupt for LinkState {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
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
