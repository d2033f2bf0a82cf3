//! Zero-copy sends of one data connection (`MSG_ZEROCOPY`): which batches go that way, what came
//! of it, and when to stop.
//!
//! Completions are read in bulk: when the engine waits, when the kernel has no room for another
//! send, when [`LOOK_EVERY`] sends have been made since the last look, and at the end. The kernel
//! joins neighbours in the error queue, so a look mostly finds one entry.

use std::io;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{Ticket, TransportError, ZeroCopyCounts};

use crate::connection::Connection;
use crate::options::{TcpOptions, ZeroCopy};
use crate::outstanding::{Outstanding, Unreleased};
use crate::raw_io;
use crate::wire::Seal;

/// Page bytes from which a batch is sent zero-copy. It costs one more `sendmsg` (the head may not
/// be part of it, since its buffer is used again at once), a share of a look at completions, and
/// pinning each page; copying 64 KiB costs some 6 µs, about as much as all of that.
const MIN_BYTES: usize = 64 << 10;

/// Zero-copy sends between two looks at completions. The engine lets 32 MiB be under way, so with
/// full batches it waits, and looks, about as often.
const LOOK_EVERY: usize = 8;

/// What must be complete before it is judged whether zero-copy pays: either.
const JUDGED_SENDS: u64 = 8;
const JUDGED_BYTES: u64 = 8 << 20;

const ENABLING: &str = "turn on zero-copy sends (SO_ZEROCOPY)";
const SENDING: &str = "send pages zero-copy";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    /// Until it turns out that it does not pay.
    Trying,
    /// Whatever comes of it.
    On,
}

#[derive(Debug)]
pub(crate) struct ZeroCopier {
    mode: Mode,
    outstanding: Outstanding,
    counts: ZeroCopyCounts,
    /// `counts` when they were judged last.
    judged: ZeroCopyCounts,
    unlooked: usize,
}

impl ZeroCopier {
    pub(crate) fn new(
        options: &TcpOptions,
        connection: &Connection,
    ) -> Result<Self, TransportError> {
        let choice = options.zero_copy;
        // A send that waits for room many times over is no faster for what it did not copy; and
        // packets full of pages of which they use little shrink a small receive window for good.
        let buffer_is_small = options.send_buffer_bytes.is_some_and(|bytes| bytes < MIN_BYTES);
        let is_sealed = connection.seal() != Seal::Plain;
        let enabled = match choice {
            ZeroCopy::Off => Ok(Mode::Off),
            ZeroCopy::Auto if is_sealed => Ok(Mode::Off),
            // What is encrypted is a copy.
            ZeroCopy::On if is_sealed => {
                return Err(TransportError::Unsupported("zero-copy sends where TLS encrypts them"));
            }
            ZeroCopy::Auto if buffer_is_small || connection.is_within_host() => Ok(Mode::Off),
            ZeroCopy::Auto => raw_io::enable_zero_copy(connection).map(|()| Mode::Trying),
            ZeroCopy::On => raw_io::enable_zero_copy(connection).map(|()| Mode::On),
        };
        let mode = match enabled {
            Ok(mode) => mode,
            Err(error) if choice == ZeroCopy::Auto => {
                tracing::debug!(peer = %connection.peer(), "sends without zero-copy: {error}");
                Mode::Off
            }
            Err(cause) => return Err(connection.failed(ENABLING, cause)),
        };
        Ok(Self {
            mode,
            outstanding: Outstanding::default(),
            counts: ZeroCopyCounts::default(),
            judged: ZeroCopyCounts::default(),
            unlooked: 0,
        })
    }

    /// Whether a batch with so many page bytes is sent zero-copy. Until it is known what comes of
    /// it one at a time is, and those behind it are not: where it does not pay a few megabytes
    /// show it as well as a hundred.
    pub(crate) fn takes(&self, payload_bytes: usize) -> bool {
        let ready = match self.mode {
            Mode::Off => false,
            Mode::Trying => self.judged.sent > 0 || self.is_done(),
            Mode::On => true,
        };
        ready && payload_bytes >= MIN_BYTES
    }

    /// A zero-copy send for this batch went out.
    pub(crate) fn sent(&mut self, ticket: Ticket, bytes: usize) {
        self.outstanding.push(ticket, bytes as u64);
        self.unlooked += 1;
    }

    pub(crate) fn counts(&self) -> ZeroCopyCounts {
        self.counts
    }

    /// Whether the kernel is done with all that was sent.
    pub(crate) fn is_done(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Up to which batch memory is not read any more, if all up to `sent` were sent.
    pub(crate) fn released(&self, sent: Ticket) -> Ticket {
        self.outstanding.oldest().map_or(sent, |oldest| oldest - 1)
    }

    /// Whether enough was sent since the last look. At first after every send: if it does not
    /// pay, that is to be known soon.
    pub(crate) fn look_is_due(&self) -> bool {
        let never_judged = self.mode == Mode::Trying && self.judged.sent == 0;
        !self.is_done() && (never_judged || self.unlooked >= LOOK_EVERY)
    }

    /// Takes the completions that are there; whether there were any.
    pub(crate) fn look(
        &mut self,
        connection: &Connection,
        system_calls: &mut u64,
    ) -> Result<bool, TransportError> {
        self.unlooked = 0;
        let new = connection.take_completions(&mut self.outstanding, system_calls)?;
        self.counts.add(&new);
        self.judge(connection);
        Ok(new.sent > 0)
    }

    /// Stops if the kernel copies most of it anyway: then zero-copy costs more than it saves.
    fn judge(&mut self, connection: &Connection) {
        let sends = self.counts.sent - self.judged.sent;
        let bytes = self.counts.sent_bytes - self.judged.sent_bytes;
        if self.mode != Mode::Trying || (sends < JUDGED_SENDS && bytes < JUDGED_BYTES) {
            return;
        }
        let copied_bytes = self.counts.copied_bytes - self.judged.copied_bytes;
        self.judged = self.counts;
        if copied_bytes > bytes / 2 {
            self.mode = Mode::Off;
            tracing::info!(
                peer = %connection.peer(),
                "sends without zero-copy from here on: the kernel copied {copied_bytes} of {bytes} \
                 bytes anyway"
            );
        }
    }

    /// The kernel has no room for a send of so many bytes, though nothing is under way. Fails if
    /// it must be zero-copy; else nothing is from here on.
    pub(crate) fn give_up(
        &mut self,
        connection: &Connection,
        bytes: usize,
        cause: &io::Error,
    ) -> Result<(), TransportError> {
        let advice = format!(
            "no room to pin {bytes} bytes ({cause}): locked memory or socket option memory is used \
             up; raise RLIMIT_MEMLOCK (ulimit -l) or grant CAP_IPC_LOCK, and raise \
             net.core.optmem_max if that does not help"
        );
        if self.mode == Mode::On {
            let cause = io::Error::new(io::ErrorKind::QuotaExceeded, advice);
            return Err(connection.failed(SENDING, cause));
        }
        self.mode = Mode::Off;
        tracing::warn!(
            peer = %connection.peer(),
            "sends without zero-copy from here on: {advice}"
        );
        Ok(())
    }

    /// What the kernel may still read, if anything, for whoever closes the connection.
    pub(crate) fn take_unreleased(&mut self, memory: &Arc<GuestMemory>) -> Option<Unreleased> {
        let outstanding = std::mem::take(&mut self.outstanding);
        let unreleased = Unreleased { outstanding, _memory: Arc::clone(memory) };
        (!unreleased.outstanding.is_empty()).then_some(unreleased)
    }
}
