//! The first control frame of a source, as it arrives: what makes it one.

use pageferry::transport::check_greeting;
use rustix::io::Errno;

use crate::framing::LENGTH_BYTES;
use crate::incoming::Incoming;

/// Most bytes that are read at once: what a stranger only announces costs nothing.
const PIECE_BYTES: usize = 16 << 10;

/// What has come of it: length and frame.
#[derive(Debug, Default)]
pub(crate) struct Greeting(Vec<u8>);

impl Greeting {
    /// How much has come.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes what is there of it, and nothing of what comes behind. The frame, once it is whole; or why
    /// it is none, and will not be.
    pub(crate) fn receive(&mut self, from: &Incoming) -> Result<Option<Vec<u8>>, String> {
        loop {
            let missing = match self.frame_bytes() {
                None => LENGTH_BYTES - self.0.len(),
                Some(frame_bytes) => LENGTH_BYTES + frame_bytes - self.0.len(),
            };
            let (had, mut piece) = (self.0.len(), [0; PIECE_BYTES]);
            match from.receive(&mut piece[..missing.min(PIECE_BYTES)]) {
                Ok(0) => return Err(format!("it ended after {had} bytes of its greeting")),
                Ok(received) => self.0.extend_from_slice(&piece[..received]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.to_string()),
            }
            let Some(frame_bytes) = self.frame_bytes() else { continue };
            let frame = &self.0[LENGTH_BYTES..];
            check_greeting(frame, frame_bytes).map_err(|error| format!("no greeting: {error}"))?;
            if frame.len() == frame_bytes {
                return Ok(Some(self.0.split_off(LENGTH_BYTES)));
            }
        }
    }

    /// As announced.
    fn frame_bytes(&self) -> Option<usize> {
        let length = self.0.first_chunk::<LENGTH_BYTES>()?;
        Some(usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX))
    }
}
