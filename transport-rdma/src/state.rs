//! What all connections of one end of a link share: whether it was interrupted, whether it broke.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use pageferry::transport::{Interrupt, TransportError};
use rustix::event::{EventfdFlags, eventfd};

use crate::verbs::{Context, Watch};

/// Shared by everything that belongs to one end of a link.
#[derive(Debug)]
pub(crate) struct LinkState {
    interrupted: AtomicBool,
    /// What happened to the device.
    broken: OnceLock<String>,
    /// Tells of that, once the device is known.
    watch: OnceLock<Watch>,
    /// Readable for good once one of the two is so.
    bell: OwnedFd,
}

impl LinkState {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            interrupted: AtomicBool::new(false),
            broken: OnceLock::new(),
            watch: OnceLock::new(),
            bell: new_bell()?,
        }))
    }

    /// From here on the end of the device is noticed.
    pub(crate) fn watch(&self, context: Context) -> io::Result<()> {
        if self.watch.get().is_none() {
            // Of two that are made at once one goes away again.
            let _ = self.watch.set(Watch::new(context)?);
        }
        Ok(())
    }

    /// Fails once the link was interrupted, or its device failed.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.interrupted.load(Ordering::Acquire) {
            return Err(TransportError::Interrupted);
        }
        match self.broken.get() {
            Some(what) => Err(TransportError::Lost {
                operation: "use the RDMA device",
                cause: io::Error::new(io::ErrorKind::NetworkDown, what.clone()),
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
        self.watch.get().map(Watch::fd)
    }

    /// Looks what the device has to say.
    pub(crate) fn look(&self) {
        if let Some(what) = self.watch.get().and_then(Watch::take) {
            tracing::warn!("the RDMA device failed: {what}");
            let _ = self.broken.set(what);
            ring(&self.bell);
        }
    }
}

/// Whether one connection was interrupted alone.
#[derive(Debug)]
pub(crate) struct OwnStop {
    interrupted: AtomicBool,
    /// Readable for good once it was.
    bell: OwnedFd,
}

impl OwnStop {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { interrupted: AtomicBool::new(false), bell: new_bell()? }))
    }

    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.interrupted.load(Ordering::Acquire) {
            return Err(TransportError::Interrupted);
        }
        Ok(())
    }

    /// Readable when [`Self::check`] fails.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Interrupt for OwnStop {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        ring(&self.bell);
    }
}

fn new_bell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn ring(bell: &OwnedFd) {
    // Fails only where it was rung 2⁶⁴ times before.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

impl Interrupt for LinkState {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        ring(&self.bell);
    }
}
