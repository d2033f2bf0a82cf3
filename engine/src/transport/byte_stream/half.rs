//! One stream of an end: reads and writes that end in time, and that an interrupt ends.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::ByteStream;
use crate::transport::{ChannelCounters, Interrupt, TransportError};

/// Whether this end, or one channel of it, was interrupted, and the streams to shut down then.
#[derive(Debug)]
pub(super) struct Stop<S> {
    stopped: AtomicBool,
    streams: Vec<Weak<S>>,
}

impl<S> Stop<S> {
    pub(super) fn of<'a>(streams: impl Iterator<Item = &'a Arc<S>>) -> Arc<Self>
    where
        S: 'a,
    {
        let streams = streams.map(Arc::downgrade).collect();
        Arc::new(Self { stopped: AtomicBool::new(false), streams })
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

impl<S: ByteStream> Interrupt for Stop<S> {
    fn interrupt(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.streams.iter().filter_map(Weak::upgrade).for_each(|stream| stream.shut_down());
    }
}

/// Most bytes of a write that must end in time.
const TIMED_WRITE_BYTES: usize = 64 << 10;

/// Whether a call is to be made again, if there is time.
fn is_passing(error: &io::Error) -> bool {
    let passing = [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted];
    passing.contains(&error.kind())
}

/// A stream, and what was read from it and not used yet.
#[derive(Debug)]
pub(super) struct Half<S> {
    stream: Arc<S>,
    /// Of the whole end, and of this stream alone.
    link_stop: Arc<Stop<S>>,
    pub(super) stop: Arc<Stop<S>>,
    /// Cleared once, where it grows; the first `filled` bytes are what was read.
    buffer: Vec<u8>,
    filled: usize,
    pub(super) counters: ChannelCounters,
}

impl<S> Clone for Half<S> {
    fn clone(&self) -> Self {
        Self {
            stream: Arc::clone(&self.stream),
            link_stop: Arc::clone(&self.link_stop),
            stop: Arc::clone(&self.stop),
            buffer: Vec::new(),
            filled: 0,
            counters: ChannelCounters::default(),
        }
    }
}

impl<S: ByteStream> Half<S> {
    pub(super) fn new(stream: Arc<S>, link_stop: &Arc<Stop<S>>) -> Self {
        let (link_stop, stop) = (Arc::clone(link_stop), Stop::of([&stream].into_iter()));
        let (buffer, counters) = (Vec::new(), ChannelCounters::default());
        Self { stream, link_stop, stop, buffer, filled: 0, counters }
    }

    /// Once interrupted every operation says so, whatever came of it.
    pub(super) fn check<T>(
        &self,
        operation: &'static str,
        result: io::Result<T>,
    ) -> Result<T, TransportError> {
        if self.link_stop.is_stopped() || self.stop.is_stopped() {
            return Err(TransportError::Interrupted);
        }
        result.map_err(|cause| TransportError::Lost { operation, cause })
    }

    /// Writes all bytes; false if the deadline comes first.
    pub(super) fn write_until(
        &mut self,
        mut bytes: &[u8],
        deadline: Option<Instant>,
    ) -> Result<bool, TransportError> {
        while !bytes.is_empty() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return self.check("", Ok(false));
            }
            // A kernel may count the time anew for each buffer that it fills.
            let most = if left.is_some() { TIMED_WRITE_BYTES } else { usize::MAX };
            self.counters.system_calls += 1;
            let written = match self.stream.write(&bytes[..bytes.len().min(most)], left) {
                Ok(0) => Err(ErrorKind::WriteZero.into()),
                Err(error) if is_passing(&error) => Ok(0),
                written => written,
            };
            let written = self.check("write to a byte stream", written)?;
            self.counters.wire_bytes += written as u64;
            bytes = &bytes[written..];
        }
        Ok(true)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        self.write_until(bytes, None).map(drop)
    }

    /// Reads until `buffer` holds `len` bytes; false if the deadline comes first.
    pub(super) fn fill(
        &mut self,
        len: usize,
        deadline: Option<Instant>,
    ) -> Result<bool, TransportError> {
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        while self.filled < len {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return self.check("", Ok(false));
            }
            let read = self.stream.read(&mut self.buffer[self.filled..len], left);
            let more = *read.as_ref().unwrap_or(&0);
            self.filled += more;
            self.counters.wire_bytes += more as u64;
            self.counters.system_calls += 1;
            let result = match read {
                Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => Ok(()),
                Err(error) if is_passing(&error) => Ok(()),
                Err(error) => Err(error),
            };
            self.check("read from a byte stream", result)?;
        }
        Ok(true)
    }

    /// Takes the first `N` bytes that were read.
    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.buffer[..N]);
        self.buffer.copy_within(N..self.filled, 0);
        self.filled -= N;
        bytes
    }

    /// What was read and not used.
    pub(super) fn held(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    /// All that was read is used.
    pub(super) fn clear(&mut self) {
        self.filled = 0;
    }
}
