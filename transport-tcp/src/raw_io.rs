//! The only unsafe code of this crate: `sendmsg` and `recvmsg` with iovecs over guest memory, and
//! what of zero-copy sends no library offers.
//!
//! Guest memory may not be borrowed as a slice (vCPUs write to it meanwhile), so the safe
//! vectored calls of the standard library cannot be used. [`GuestVectors`] keeps the memory
//! alive and only ever holds addresses that the memory itself vouched for, which makes its
//! methods safe to call.
#![expect(unsafe_code, reason = "the kernel gets raw iovecs over guest memory")]

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::Arc;

use libc::{c_int, iovec};
use pageferry::memory::{GuestMemory, OutOfRange};
use pageferry::transport::{Run, RunKind};

use crate::outstanding::Completion;

const NO_VECTOR: iovec = iovec { iov_base: ptr::null_mut(), iov_len: 0 };

/// How many bytes one call moved, of either sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Of the small buffer: the head of a batch sent, or the head of the next one received.
    pub(crate) head_bytes: usize,
    /// Of guest memory.
    pub(crate) guest_bytes: usize,
}

/// The data runs of one batch as iovecs, and how far they have been moved.
pub(crate) struct GuestVectors {
    memory: Arc<GuestMemory>,
    /// `vectors[first..]` is what is left to move, all of it inside `memory`. What lies before
    /// is spare: slot `first - 1` takes the head of a batch, so that head and pages are one array.
    vectors: Vec<iovec>,
    first: usize,
    left_bytes: usize,
}

// SAFETY: the iovecs hold addresses of guest memory, which any thread may use (GuestMemory is
// Send and Sync); what a spare slot holds is never read.
unsafe impl Send for GuestVectors {}

impl fmt::Debug for GuestVectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestVectors").field("left_bytes", &self.left_bytes).finish_non_exhaustive()
    }
}

impl GuestVectors {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, vectors: vec![NO_VECTOR], first: 1, left_bytes: 0 }
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Forgets what was there.
    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.vectors.push(NO_VECTOR);
        self.first = 1;
        self.left_bytes = 0;
    }

    /// Takes the data runs of a batch. All runs, zero runs too, are checked to be inside guest
    /// memory and not empty.
    pub(crate) fn load(&mut self, runs: &[Run]) -> Result<(), OutOfRange> {
        self.clear();
        for run in runs {
            let loaded = self.memory.span(run.range).and_then(|span| {
                if span.len_bytes == 0 { Err(OutOfRange { range: run.range }) } else { Ok(span) }
            });
            let span = match loaded {
                Ok(span) => span,
                Err(error) => {
                    self.clear();
                    return Err(error);
                }
            };
            if run.kind == RunKind::Data {
                self.vectors.push(iovec { iov_base: span.addr.cast(), iov_len: span.len_bytes });
                self.left_bytes += span.len_bytes;
            }
        }
        Ok(())
    }

    /// Guest bytes not yet moved.
    pub(crate) fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    /// Sends `head`, then what is left, with one system call. May send less than all of it.
    pub(crate) fn send(&mut self, socket: impl AsFd, head: &[u8]) -> io::Result<Moved> {
        let start = self.first - 1;
        self.vectors[start] =
            iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        // SAFETY: the first iovec is `head`, which is borrowed for the call and only read; the
        // others are spans inside guest memory, which `self.memory` keeps mapped. The kernel
        // copies all of it during the call.
        let sent = unsafe { send_vectors(socket, &mut self.vectors[start..], 0)? };
        let head_bytes = sent.min(head.len());
        let guest_bytes = sent - head_bytes;
        self.advance(guest_bytes);
        Ok(Moved { head_bytes, guest_bytes })
    }

    /// Sends what is left with one system call that asks the kernel not to copy. May send less
    /// than all of it; each call that sends something has a [`Completion`].
    ///
    /// The kernel goes on reading guest memory until then. It holds a reference to every page it
    /// will read, so nothing that happens to the mapping makes it read anything else: an unmapped
    /// page is not reused before. What the caller owes is only that the *bytes* are meaningful:
    /// that nobody puts the memory to another use before the completion.
    pub(crate) fn send_zero_copy(&mut self, socket: impl AsFd) -> io::Result<usize> {
        // SAFETY: spans inside guest memory, which `self.memory` keeps mapped during the call.
        // After it the kernel reads the pages by the references it took, not by address.
        let sent =
            unsafe { send_vectors(socket, &mut self.vectors[self.first..], libc::MSG_ZEROCOPY)? };
        self.advance(sent);
        Ok(sent)
    }

    /// Receives what is left, then into `head`, with one system call that waits for all of it.
    /// Gets less only when the connection ends or a signal comes, and from a vsock.
    pub(crate) fn receive_with_head(
        &mut self,
        socket: impl AsFd,
        head: &mut [u8],
    ) -> io::Result<Moved> {
        let left_bytes = self.left_bytes;
        self.vectors.push(iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() });
        // SAFETY: the last iovec is `head`, which is borrowed mutably for the call; the others
        // are spans inside guest memory, see `receive_vectors`.
        let received = unsafe { receive_vectors(&socket, &mut self.vectors[self.first..]) };
        self.vectors.pop();
        let received = received?;
        let guest_bytes = received.min(left_bytes);
        self.advance(guest_bytes);
        Ok(Moved { head_bytes: received - guest_bytes, guest_bytes })
    }

    /// Drops the first `bytes` of what is left.
    fn advance(&mut self, mut bytes: usize) {
        self.left_bytes -= bytes;
        while bytes > 0 {
            let vector = &mut self.vectors[self.first];
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.first += 1;
        }
    }
}

/// Sends iovecs.
///
/// # Safety
///
/// Every iovec must be readable memory that stays mapped during the call.
unsafe fn send_vectors(
    socket: impl AsFd,
    vectors: &mut [iovec],
    flags: c_int,
) -> io::Result<usize> {
    let message = message_of(vectors);
    let flags = flags | libc::MSG_NOSIGNAL;
    // SAFETY: the caller vouches for the iovecs; the message outlives the call.
    let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into iovecs until they are full, or as much as a socket of another kind gives at a time.
///
/// # Safety
///
/// Every iovec must be writable memory that stays mapped during the call, and no Rust reference
/// to it may be in use meanwhile.
unsafe fn receive_vectors(socket: impl AsFd, vectors: &mut [iovec]) -> io::Result<usize> {
    let mut message = message_of(vectors);
    let mut flags = libc::MSG_WAITALL;
    loop {
        let socket = socket.as_fd().as_raw_fd();
        // SAFETY: the caller vouches for the iovecs; the message outlives the call.
        let received = unsafe { libc::recvmsg(socket, &raw mut message, flags) };
        if let Ok(received) = usize::try_from(received) {
            return Ok(received);
        }
        let error = io::Error::last_os_error();
        // A vsock waits for no more than its own buffer holds, and takes nothing then (net/vmw_vsock/af_vsock.c):
        // what there is will do.
        if flags == 0 || error.raw_os_error() != Some(libc::ENOMEM) {
            return Err(error);
        }
        flags = 0;
    }
}

/// Lets a socket take zero-copy sends (`SO_ZEROCOPY`).
pub(crate) fn enable_zero_copy(socket: impl AsFd) -> io::Result<()> {
    let on: c_int = 1;
    let len = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: the option takes an int, which outlives the call, and its length is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Of `linux/errqueue.h`; libc has the struct and not these.
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

/// Room for one control message with an extended error and the address behind it (which is
/// empty for zero-copy), aligned as control messages are.
#[repr(C, align(8))]
struct ErrorRoom([u8; 128]);

/// Takes one notification of zero-copy sends off a socket's error queue. `None` when there is
/// none. Never waits.
pub(crate) fn next_completion(socket: impl AsFd) -> io::Result<Option<Completion>> {
    let socket = socket.as_fd().as_raw_fd();
    loop {
        let mut room = ErrorRoom([0; 128]);
        let mut message = message_of(&mut []);
        message.msg_control = room.0.as_mut_ptr().cast();
        message.msg_controllen = room.0.len() as _;
        // SAFETY: there are no iovecs, and the control buffer is writable and as long as said;
        // both outlive the call.
        let received = unsafe {
            libc::recvmsg(socket, &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
        };
        if received < 0 {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            }
        }
        // SAFETY: the kernel has filled in the control buffer and its length.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        if header.is_null() {
            continue;
        }
        // SAFETY: not null, so a whole header inside `room`, which is aligned for it.
        let libc::cmsghdr { cmsg_level: level, cmsg_type: kind, .. } = unsafe { *header };
        let is_error = matches!(
            (level, kind),
            (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
        );
        if !is_error {
            continue;
        }
        // SAFETY: the message is inside `room`.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: a message of this level and type begins with the struct, and `room` has space
        // for it, whatever the message's length claims.
        let error = unsafe { ptr::read_unaligned(data.cast::<libc::sock_extended_err>()) };
        // Anything else is an error of the network, which the next call on the socket tells.
        if error.ee_origin == SO_EE_ORIGIN_ZEROCOPY {
            return Ok(Some(Completion {
                first: error.ee_info,
                last: error.ee_data,
                copied: error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0,
            }));
        }
    }
}

fn message_of(vectors: &mut [iovec]) -> libc::msghdr {
    // SAFETY: msghdr is a C struct of integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    // Its type differs between C libraries; MAX_BATCH_RUNS + 1 fits in every one.
    message.msg_iovlen = vectors.len() as _;
    message
}
