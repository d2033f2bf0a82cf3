//! Batches as vectors over guest memory, and how far they have gone.
//!
//! Guest memory may not be borrowed as a slice (vCPUs write to it meanwhile). Both types keep the
//! memory alive and only ever hold addresses that the memory itself vouched for, which makes
//! their methods safe to call.
#![expect(unsafe_code, reason = "the kernel gets raw iovecs over guest memory")]

use std::ptr;
use std::sync::Arc;

use libc::iovec;
use pageferry::memory::{GuestMemory, OutOfRange};
use pageferry::transport::{Run, RunKind};

use crate::chain::{Chain, Sends, Until, ZeroCopySend};
use crate::table::{Piece, Table};

/// One request of the way out.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// So many vectors, copied by the kernel.
    Vectors { end: usize, len_bytes: usize },
    /// Not copied, if the kernel can.
    ZeroCopy { piece: Piece, ticket: u64 },
    /// Was to be zero-copy, and there was no room.
    Copied { piece: Piece },
}

impl Part {
    fn len_bytes(&self) -> usize {
        match self {
            Self::Vectors { len_bytes, .. } => *len_bytes,
            Self::ZeroCopy { piece, .. } | Self::Copied { piece } => piece.len_bytes,
        }
    }
}

/// Which runs are sent zero-copy.
#[derive(Debug)]
pub(crate) struct ZeroCopyRuns<'a> {
    /// Without: memory is not registered, and the kernel pins for each send.
    pub(crate) table: Option<&'a Table>,
    /// Only runs of at least this length.
    pub(crate) least_bytes: usize,
    /// Only so much of a run, and only so many sends.
    pub(crate) most_bytes: usize,
    pub(crate) most_sends: usize,
}

/// Longest zero-copy send from memory that is not registered. What is under way counts against
/// `RLIMIT_MEMLOCK`, and is refused as a whole where it does not fit: a part may.
const UNREGISTERED_BYTES: usize = 1 << 20;

impl ZeroCopyRuns<'_> {
    /// The sends of a run, or of its beginning, if it is sent zero-copy.
    fn pieces(&mut self, addr: usize, len_bytes: usize) -> Vec<Piece> {
        if len_bytes < self.least_bytes {
            return Vec::new();
        }
        let len_bytes = len_bytes.min(self.most_bytes);
        let pieces: Vec<Piece> = match self.table {
            Some(table) => table.pieces(addr, len_bytes).take(self.most_sends).collect(),
            None => (0..len_bytes)
                .step_by(UNREGISTERED_BYTES)
                .map(|offset| Piece {
                    addr: addr + offset,
                    len_bytes: UNREGISTERED_BYTES.min(len_bytes - offset),
                    buffer: None,
                })
                .take(self.most_sends)
                .collect(),
        };
        self.most_sends -= pieces.len();
        pieces
    }
}

/// Batches and other records on their way out.
///
/// First all [`record`](Self::record)s are added, then it is sent piece by piece.
pub(crate) struct Outgoing {
    memory: Arc<GuestMemory>,
    /// Headers and tables, one after another. Not touched once `vectors` point into it.
    heads: Vec<u8>,
    records: Vec<Record>,
    vectors: Vec<iovec>,
    parts: Vec<Part>,
    /// `parts[next_part..]` is left to send; if it is vectors, from `next_vector` on.
    next_part: usize,
    next_vector: usize,
}

struct Record {
    head_end: usize,
    ticket: u64,
    runs: Vec<Run>,
}

// SAFETY: the vectors hold addresses of `heads` and of guest memory, which any thread may use
// (GuestMemory is Send and Sync).
unsafe impl Send for Outgoing {}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing").field("parts", &self.parts.len()).finish_non_exhaustive()
    }
}

impl Outgoing {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            heads: Vec::new(),
            records: Vec::new(),
            vectors: Vec::new(),
            parts: Vec::new(),
            next_part: 0,
            next_vector: 0,
        }
    }

    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.parts.clear();
        self.records.clear();
        self.heads.clear();
        (self.next_part, self.next_vector) = (0, 0);
    }

    /// Adds a header with its table, if it is a batch, and the runs whose pages follow.
    pub(crate) fn record(&mut self, ticket: u64, head: &[u8], runs: Vec<Run>) {
        self.heads.extend_from_slice(head);
        self.records.push(Record { head_end: self.heads.len(), ticket, runs });
    }

    /// Makes requests of the records.
    pub(crate) fn prepare(
        &mut self,
        mut zero_copy: Option<&mut ZeroCopyRuns<'_>>,
    ) -> Result<(), OutOfRange> {
        let mut head_start = 0;
        for Record { head_end, ticket, runs } in std::mem::take(&mut self.records) {
            let head = &self.heads[head_start..head_end];
            head_start = head_end;
            let mut vectored_bytes = head.len();
            self.vectors
                .push(iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
            for run in runs.iter().filter(|run| run.kind == RunKind::Data) {
                let span = self.memory.span(run.range)?;
                let mut addr = span.addr.expose_provenance();
                let end = addr + span.len_bytes;
                let pieces = zero_copy.as_deref_mut().map(|runs| runs.pieces(addr, span.len_bytes));
                for piece in pieces.into_iter().flatten() {
                    if vectored_bytes > 0 {
                        let end = self.vectors.len();
                        self.parts.push(Part::Vectors { end, len_bytes: vectored_bytes });
                        vectored_bytes = 0;
                    }
                    self.parts.push(Part::ZeroCopy { piece, ticket });
                    addr = piece.addr + piece.len_bytes;
                }
                if addr < end {
                    let iov_base = ptr::with_exposed_provenance_mut(addr);
                    self.vectors.push(iovec { iov_base, iov_len: end - addr });
                    vectored_bytes += end - addr;
                }
            }
            if vectored_bytes > 0 {
                let end = self.vectors.len();
                self.parts.push(Part::Vectors { end, len_bytes: vectored_bytes });
            }
        }
        Ok(())
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next_part == self.parts.len()
    }

    /// Adds requests for what is left, at most `most` of them, each after the one before; one where that may send a
    /// part.
    pub(crate) fn request<'a>(&'a self, chain: &mut Chain<'a>, most: usize, sends: Sends) {
        let mut start = self.next_vector;
        let most = if sends == Sends::Whole { most } else { 1 };
        for part in self.parts[self.next_part..].iter().take(most) {
            chain.then();
            match *part {
                Part::Vectors { end, .. } => {
                    // SAFETY: the vectors name `heads`, to which nobody has a mutable reference
                    // while `self` is borrowed, and spans of guest memory, to which no reference
                    // exists at all.
                    unsafe { chain.send_vectors(&self.vectors[start..end], sends) };
                    start = end;
                }
                Part::ZeroCopy { piece, ticket } => {
                    let (bytes, len) = piece.raw();
                    let send = ZeroCopySend { ticket, buffer: piece.buffer };
                    // SAFETY: the piece is a part of a span of guest memory, which `self` keeps
                    // mapped. If it has a buffer it is what the table says, and the ring has the
                    // buffers of that table.
                    unsafe { chain.send_zero_copy(bytes, len, send) };
                }
                Part::Copied { piece } => {
                    let (bytes, len) = piece.raw();
                    // SAFETY: a part of a span of guest memory, as above; no reference to that
                    // exists at all.
                    unsafe { chain.send(bytes, len) };
                }
            }
        }
    }

    /// The next request has sent so many bytes. Returns whether that was all of it.
    pub(crate) fn advance(&mut self, bytes: usize) -> bool {
        let Some(part) = self.parts.get_mut(self.next_part) else {
            return true;
        };
        let complete = bytes >= part.len_bytes();
        match part {
            Part::Vectors { end, .. } if complete => self.next_vector = *end,
            Part::Vectors { len_bytes, .. } => {
                *len_bytes -= bytes;
                self.next_vector = skip(&mut self.vectors, self.next_vector, bytes);
            }
            Part::ZeroCopy { piece, .. } | Part::Copied { piece } => {
                piece.addr += bytes;
                piece.len_bytes -= bytes.min(piece.len_bytes);
            }
        }
        if complete {
            self.next_part += 1;
        }
        complete
    }

    /// Has the kernel copy what follows from a request on, counted from the next one, if it is a
    /// send from memory that is not registered; else does nothing. Returns whether it was one.
    pub(crate) fn copy_from(&mut self, request: usize) -> bool {
        let rest = &mut self.parts[self.next_part + request..];
        if !matches!(rest.first(), Some(Part::ZeroCopy { piece, .. }) if piece.buffer.is_none()) {
            return false;
        }
        for part in rest {
            if let Part::ZeroCopy { piece, .. } = *part {
                *part = Part::Copied { piece };
            }
        }
        true
    }
}

/// The pages of one batch on their way in, and the lead of the record after it.
pub(crate) struct Incoming {
    memory: Arc<GuestMemory>,
    /// `vectors[first..]` is what is left of the pages.
    vectors: Vec<iovec>,
    first: usize,
    left_bytes: usize,
}

// SAFETY: the vectors hold addresses of guest memory, which any thread may use (GuestMemory is
// Send and Sync); one of something else is only there while `request` has it borrowed, and
// `load` removes it.
unsafe impl Send for Incoming {}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("left_bytes", &self.left_bytes).finish_non_exhaustive()
    }
}

impl Incoming {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, vectors: Vec::new(), first: 0, left_bytes: 0 }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Takes the data runs of a batch; all are checked to be inside guest memory.
    pub(crate) fn load(&mut self, runs: &[Run]) -> Result<(), OutOfRange> {
        self.vectors.clear();
        (self.first, self.left_bytes) = (0, 0);
        for run in runs.iter().filter(|run| run.kind == RunKind::Data) {
            let span = self.memory.span(run.range)?;
            self.vectors.push(iovec { iov_base: span.addr.cast(), iov_len: span.len_bytes });
            self.left_bytes += span.len_bytes;
        }
        Ok(())
    }

    pub(crate) fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    /// Adds a request for what is left, and then for `lead`, waiting for all of both.
    pub(crate) fn request<'a>(&'a mut self, lead: &'a mut [u8], chain: &mut Chain<'a>) {
        let lead = iovec { iov_base: lead.as_mut_ptr().cast(), iov_len: lead.len() };
        self.vectors.push(lead);
        // SAFETY: the last vector is `lead`, which is borrowed mutably; the others are spans of
        // guest memory, which `self` keeps mapped and to which no reference exists.
        unsafe { chain.receive_vectors(&self.vectors[self.first..], Until::All) };
    }

    /// So many bytes came. Returns how many of them belong to the lead.
    pub(crate) fn advance(&mut self, bytes: usize) -> usize {
        // The lead of the last request.
        self.vectors.pop();
        let guest_bytes = bytes.min(self.left_bytes);
        self.left_bytes -= guest_bytes;
        self.first = skip(&mut self.vectors, self.first, guest_bytes);
        bytes - guest_bytes
    }
}

/// Cuts `bytes` off the vectors from `first` on. Returns where the rest begins.
fn skip(vectors: &mut [iovec], mut first: usize, mut bytes: usize) -> usize {
    while bytes > 0 {
        let vector = &mut vectors[first];
        if bytes < vector.iov_len {
            vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
            vector.iov_len -= bytes;
            break;
        }
        bytes -= vector.iov_len;
        first += 1;
    }
    first
}
