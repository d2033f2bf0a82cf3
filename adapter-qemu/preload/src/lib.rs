//! A library to preload into QEMU, by which it hands a userfaultfd over to who moves its guest. Without it,
//! `pageferry-qemu` borrows a thread of QEMU for two system calls, and needs the right to trace QEMU for that.
//!
//! ```sh
//! PAGEFERRY_USERFAULTFD=/run/vm1.uffd LD_PRELOAD=/usr/lib/libpageferry_qemu_preload.so qemu-system-x86_64 …
//! pageferry-qemu migrate --userfaultfd /run/vm1.uffd …
//! ```
//!
//! As QEMU starts, this binds a Unix socket at that path, and has a thread wait there. Each time that QEMU's own user
//! or root connects, the thread makes a userfaultfd (userfaultfd(2), of user-mode faults, which takes no privilege)
//! and sends it (`SCM_RIGHTS` of unix(7)) with one byte; nobody else gets anything. It keeps none, and changes nothing
//! else of QEMU: signals go to other threads, and programs that QEMU starts do not know of it. The socket's file stays
//! when QEMU ends; the next QEMU with that path takes its place.
//!
//! Threads do not outlive the fork of `-daemonize`: with that, nobody answers.
#![expect(
    unsafe_code,
    reason = "what the dynamic linker calls, the environment before main, and a system call"
)]

use std::ffi::OsString;
use std::fs::Permissions;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use rustix::process::geteuid;

/// The variable that says where.
const VARIABLE: &str = "PAGEFERRY_USERFAULTFD";

/// `UFFD_USER_MODE_ONLY` of linux/userfaultfd.h.
const USER_MODE_ONLY: u32 = 1;

/// What the dynamic linker calls before `main`.
#[used]
// SAFETY: a section of pointers to functions of the C ABI, of which this is one; glibc passes arguments that it does
// not take.
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

extern "C" fn at_load() {
    let Some(path) = std::env::var_os(VARIABLE) else { return };
    // Not for the programs that QEMU starts.
    // SAFETY: `main` has not begun: there is no other thread.
    unsafe { std::env::remove_var(VARIABLE) };
    if let Err(error) = begin(&path) {
        // QEMU runs without it.
        eprintln!("pageferry: no userfaultfd will be handed over at {}: {error}", path.display());
    }
}

fn begin(path: &OsString) -> io::Result<()> {
    let path = Path::new(path);
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let of_another = is_socket && nobody_listens(path)?;
    if of_another {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    // What is sent to QEMU is for threads that know of it.
    let mut before = SigSet::empty();
    nix::sys::signal::pthread_sigmask(
        SigmaskHow::SIG_BLOCK,
        Some(&SigSet::all()),
        Some(&mut before),
    )?;
    let thread =
        std::thread::Builder::new().name("pageferry".into()).spawn(move || serve(&listener));
    before.thread_set_mask()?;
    thread.map(drop)
}

/// Whether a socket is what another QEMU has left. Does not wait for one that has too much to do.
fn nobody_listens(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(connect(&socket, &SocketAddrUnix::new(path)?) == Err(Errno::CONNREFUSED))
}

fn serve(listener: &UnixListener) {
    loop {
        let accepted = listener.accept();
        // Not all the time, where QEMU has no descriptor left. Who leaves again holds nobody up.
        let wait = accepted.is_err();
        if let Err(error) = accepted.and_then(|(stream, _)| answer(&stream)) {
            eprintln!("pageferry: a userfaultfd was not handed over: {error}");
        }
        if wait {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

/// One for who may have it.
fn answer(stream: &UnixStream) -> io::Result<()> {
    let peer = socket_peercred(stream)?.uid;
    if !peer.is_root() && peer != geteuid() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("user {} may not have it", peer.as_raw()),
        ));
    }
    send(stream, &made()?)
}

fn made() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let flags = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    // SAFETY: without a range registered it does nothing; who gets it is of QEMU's user, and may do to its memory
    // what that may.
    Ok(unsafe { userfaultfd(flags) }?)
}

fn send(stream: &UnixStream, descriptor: &OwnedFd) -> io::Result<()> {
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(stream, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
