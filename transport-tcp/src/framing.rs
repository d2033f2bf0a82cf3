//! What a source that was let in hears when it is turned away: the header of a control frame
//! ([`FrameHeader`]) with a length of 0, which no frame has, and an answer as to a preamble behind it, which says why.
//! Nothing more follows.

use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader};

use crate::preamble::{ANSWER_BYTES, Answer};

pub(crate) fn refusal(answer: &Answer) -> [u8; FRAME_HEADER_BYTES + ANSWER_BYTES] {
    let answer = answer.encode();
    let mut bytes = [0; FRAME_HEADER_BYTES + ANSWER_BYTES];
    bytes[..FRAME_HEADER_BYTES].copy_from_slice(&FrameHeader::with_length(0, &answer).encode());
    bytes[FRAME_HEADER_BYTES..].copy_from_slice(&answer);
    bytes
}
