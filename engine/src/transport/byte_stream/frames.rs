//! Control frames, each behind its length.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use super::ByteStream;
use super::half::Half;
use crate::transport::stream::StreamError;
use crate::transport::{
    ControlReceiver, ControlSender, MAX_FRAME_BYTES, TransportError, check_frame,
};

/// Bytes of a control frame's length.
const LENGTH_BYTES: usize = 4;

pub(super) struct FrameSender<S> {
    half: Half<S>,
    /// Part of a frame may be out.
    broken: bool,
}

impl<S> FrameSender<S> {
    pub(super) fn new(half: Half<S>) -> Self {
        Self { half, broken: false }
    }
}

impl<S: ByteStream> ControlSender for FrameSender<S> {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let operation = "send a frame";
        check_frame(frame)?;
        if self.broken {
            return self.half.check(operation, Err(ErrorKind::NotConnected.into()));
        }
        self.broken = true;
        let deadline = Instant::now().checked_add(timeout);
        // Cannot fail: the length was checked.
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_le_bytes();
        let half = &mut self.half;
        if !(half.write_until(&length, deadline)? && half.write_until(frame, deadline)?) {
            return Err(TransportError::TimedOut { operation, after: timeout });
        }
        self.broken = false;
        Ok(())
    }
}

pub(super) struct FrameReceiver<S>(Half<S>);

impl<S> FrameReceiver<S> {
    pub(super) fn new(half: Half<S>) -> Self {
        Self(half)
    }
}

impl<S: ByteStream> ControlReceiver for FrameReceiver<S> {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        // What was read stays in the buffer until the frame is whole, so a timeout loses nothing.
        let mut whole = match self.0.fill(LENGTH_BYTES, deadline) {
            Err(TransportError::Lost { .. }) if self.0.held().is_empty() => {
                return Err(TransportError::Closed);
            }
            filled => filled?,
        };
        if whole {
            let mut length = [0; LENGTH_BYTES];
            length.copy_from_slice(&self.0.held()[..LENGTH_BYTES]);
            let length = u32::from_le_bytes(length);
            let size = usize::try_from(length).unwrap_or(usize::MAX);
            if size == 0 || size > MAX_FRAME_BYTES {
                return Err(StreamError::FrameLength(length).into());
            }
            whole = self.0.fill(LENGTH_BYTES + size, deadline)?;
        }
        if !whole {
            let (operation, after) = ("receive a frame", timeout.unwrap_or_default());
            return Err(TransportError::TimedOut { operation, after });
        }
        let frame = self.0.held()[LENGTH_BYTES..].to_vec();
        self.0.clear();
        Ok(frame)
    }
}
