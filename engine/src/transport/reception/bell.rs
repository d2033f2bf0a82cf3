//! Wakes a thread out of `poll`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Readable for good once it was rung: an eventfd, or a pipe where there are none.
#[derive(Debug)]
pub struct Bell {
    heard: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    rung: OwnedFd,
}

impl Bell {
    /// One that is silent.
    #[cfg(target_os = "linux")]
    pub fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};

        Ok(Self { heard: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// One that is silent.
    #[cfg(not(target_os = "linux"))]
    pub fn new() -> io::Result<Self> {
        let (heard, rung) = io::pipe()?;
        rustix::io::ioctl_fionbio(&rung, true)?;
        Ok(Self { heard: heard.into(), rung: rung.into() })
    }

    /// Rings, for whoever waits now or later.
    pub fn ring(&self) {
        #[cfg(target_os = "linux")]
        let rung = &self.heard;
        #[cfg(not(target_os = "linux"))]
        let rung = &self.rung;
        // Fails only where it was rung more often than it counts, and then it rings anyway.
        let _ = rustix::io::write(rung, &1_u64.to_ne_bytes());
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.heard.as_fd()
    }
}
