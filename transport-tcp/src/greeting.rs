//! The first control frame of a source, as it arrives: what makes it one.

use pageferry::transport::check_greeting;
use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader};
use rustix::io::Errno;

use crate::incoming::Incoming;

/// Most bytes that are read at once: what a stranger only announces costs nothing.
const PIECE_BYTES: usize = 16 << 10;

/// What has come of it: header and frame.
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
            let header = self.header()?;
            let missing = match header {
                None => FRAME_HEADER_BYTES - self.0.len(),
                Some(header) => FRAME_HEADER_BYTES + length(header) - self.0.len(),
            };
            let (had, mut piece) = (self.0.len(), [0; PIECE_BYTES]);
            match from.receive(&mut piece[..missing.min(PIECE_BYTES)]) {
                Ok(0) => return Err(format!("it ended after {had} bytes of its greeting")),
                Ok(received) => self.0.extend_from_slice(&piece[..received]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.to_string()),
            }
            let Some(header) = self.header()? else { continue };
            let frame = &self.0[FRAME_HEADER_BYTES..];
            check_greeting(frame, length(header))
                .map_err(|error| format!("no greeting: {error}"))?;
            if frame.len() == length(header) {
                header.check(frame).map_err(|error| error.to_string())?;
                return Ok(Some(self.0.split_off(FRAME_HEADER_BYTES)));
            }
        }
    }

    fn header(&self) -> Result<Option<FrameHeader>, String> {
        let header = self.0.first_chunk().map(FrameHeader::decode).transpose();
        header.map_err(|error| format!("no greeting: {error}"))
    }
}

/// As announced.
fn length(header: FrameHeader) -> usize {
    usize::try_from(header.length).unwrap_or(usize::MAX)
}
