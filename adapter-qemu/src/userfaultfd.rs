//! A userfaultfd that QEMU hands over, by the library that was preloaded into it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// How long it may take. A thread of QEMU does nothing else.
const PATIENCE: Duration = Duration::from_secs(10);

/// That of the process with this number, whose socket is at `path`.
pub(crate) fn handed_over(path: &Path, pid: u32) -> io::Result<OwnedFd> {
    let stream = UnixStream::connect(path)?;
    let of = socket_peercred(&stream)?.pid.as_raw_pid().cast_unsigned();
    if of != pid {
        return Err(io::Error::other(format!(
            "process {of} listens there, and QEMU is process {pid}"
        )));
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = recvmsg(
        &stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    );
    match received {
        Err(rustix::io::Errno::AGAIN) => {
            return Err(io::Error::other(
                "nobody answers there: was QEMU started with -daemonize?",
            ));
        }
        received => received?,
    };
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptors.next().ok_or_else(|| io::Error::other("it sent none; QEMU's messages say why"))
}
