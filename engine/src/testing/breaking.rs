//! A data channel that breaks when it is told to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::transport::{
    ChannelCounters, Interrupt, PageSender, Run, Ticket, TransportError, Watermarks,
};

/// Breaks from the moment on that `broken` is set: what is sent or asked then is *lost*.
pub struct BreakingSender {
    inner: Box<dyn PageSender>,
    broken: Arc<AtomicBool>,
}

impl std::fmt::Debug for BreakingSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BreakingSender").field("broken", &self.broken).finish_non_exhaustive()
    }
}

impl BreakingSender {
    /// As good as `inner` until then.
    pub fn new(inner: Box<dyn PageSender>, broken: Arc<AtomicBool>) -> Self {
        Self { inner, broken }
    }

    fn check(&self) -> Result<(), TransportError> {
        if self.broken.load(Ordering::SeqCst) {
            let cause = io::ErrorKind::ConnectionReset.into();
            return Err(TransportError::Lost { operation: "keep a channel", cause });
        }
        Ok(())
    }
}

impl PageSender for BreakingSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.check()?;
        self.inner.send(runs)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.check()?;
        self.inner.watermarks(wait)
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.inner.finish()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}
