//! Messages one way over a queue pair, with credits the other way.
//!
//! The inlet posts [`RECEIVES`] receives of [`SLOT_BYTES`] each, and the outlet sends no more
//! messages than that before the inlet said that it took some. So a message never meets a receiver
//! that is not ready, and one beyond that ends the pipe. The inlet's words are eight bytes: how many
//! messages it has taken so far, little-endian. They come when half of the room is used up, and at
//! once after a mark. With the highest bit set a word is a question: nothing was heard for
//! [`KEEPALIVE`], and the outlet is to send something, an empty message if there is nothing else. The
//! queue pair finds out meanwhile whether the other side is still there.
//!
//! Nobody may be reading words, so no more of them go out than there is room for: one for each
//! message, and [`QUESTIONS`] after the last one.
//!
//! A **mark** is a message without bytes: a write with immediate data that writes nothing, or an
//! empty send where the provider has no such writes (siw), and where the queue pair is not for pages. It
//! arrives after all that was written before it on the queue pair is in memory, so a mark that was taken
//! says that all of that landed.

mod credits;
mod inlet;
mod outlet;

use std::io;
use std::time::Duration;

use pageferry::transport::TransportError;

use crate::verbs::{Completion, MemoryRegion, Request, Span, Verb};

pub(crate) use inlet::{Inlet, Message};
pub(crate) use outlet::Outlet;

/// Messages under way at most.
pub(crate) const RECEIVES: u32 = 32;

/// Most bytes of a message.
pub(crate) const SLOT_BYTES: usize = 8192;

/// Questions in a row that nobody answers.
const QUESTIONS: u32 = 4;

/// Words that may be under way, or there and not read: one for each message, questions since the
/// last message, and a question that it has met on its way.
pub(crate) const ACKS: u32 = RECEIVES + 2 * QUESTIONS;

const ACK_BYTES: usize = 8;

/// How long an inlet hears nothing before it asks whether anybody is there.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(5);

/// Tells receives from sends among completions.
const RECEIVE: u64 = 1 << 63;

/// A wait that only ends when something happens, taken in turns: what ends it wakes it up.
const TURN: Duration = Duration::from_secs(3600);

/// Bytes here, and where they go or come from on the other side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) span: Span,
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// Why a queue pair failed.
fn lost(operation: &'static str, completion: &Completion) -> TransportError {
    let kind = if completion.is_unanswered() {
        io::ErrorKind::TimedOut
    } else {
        io::ErrorKind::ConnectionReset
    };
    TransportError::Lost { operation, cause: io::Error::new(kind, completion.reason()) }
}

/// The work requests of writes, after so many others.
pub(crate) fn write_requests(
    writes: &[Transfer],
    posted: u64,
    signal_every: u64,
) -> impl Iterator<Item = Request> + '_ {
    let count = writes.len() as u64;
    (1..).zip(writes).map(move |(index, write)| {
        let work = posted + index;
        Request {
            work,
            verb: Verb::Write { address: write.address, key: write.key },
            span: Some(write.span),
            // The last in a full queue, so that its end is heard of.
            signalled: index.is_multiple_of(signal_every) || index == count,
        }
    })
}

fn failed(cause: io::Error) -> TransportError {
    TransportError::Io { operation: "post a work request", cause }
}

fn span(region: &MemoryRegion, slot: usize, slot_bytes: usize, len_bytes: usize) -> Span {
    Span {
        address: region.address() + (slot * slot_bytes) as u64,
        len_bytes: u32::try_from(len_bytes).unwrap_or(0),
        key: region.local_key(),
    }
}
