//! Control frames, each behind its header.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use super::ByteStream;
use super::half::Half;
use crate::transport::stream::{FRAME_HEADER_BYTES, FrameHeader};
use crate::transport::{ControlReceiver, ControlSender, TransportError, check_frame};

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
        let header = FrameHeader::of(frame).encode();
        let half = &mut self.half;
        if !(half.write_until(&header, deadline)? && half.write_until(frame, deadline)?) {
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
        let mut whole = match self.0.fill(FRAME_HEADER_BYTES, deadline) {
            Err(TransportError::Lost { .. }) if self.0.held().is_empty() => {
                return Err(TransportError::Closed);
            }
            filled => filled?,
        };
        let header = self.0.held().first_chunk().map(FrameHeader::decode).transpose()?;
        if let Some(header) = header {
            whole = self.0.fill(FRAME_HEADER_BYTES + header.frame_bytes()?, deadline)?;
        }
        if !whole {
            let (operation, after) = ("receive a frame", timeout.unwrap_or_default());
            return Err(TransportError::TimedOut { operation, after });
        }
        let frame = self.0.held()[FRAME_HEADER_BYTES..].to_vec();
        header.map_or(Ok(()), |header| header.check(&frame))?;
        self.0.clear();
        Ok(frame)
    }
}
