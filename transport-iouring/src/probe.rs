//! Asks the kernel what its io_uring can do.
#![expect(unsafe_code, reason = "one request is made to see how the kernel takes it")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use io_uring::types::Fd;
use io_uring::{IoUring, Probe, opcode};

use crate::chain::REPORT_USAGE;
use crate::features::{Feature, Features, Unavailable};

/// What there is, or why there is nothing. Rings made for it are gone when it returns.
pub(crate) fn probe() -> Result<Features, Unavailable> {
    let mut ring = IoUring::new(2).map_err(Unavailable::of_setup)?;
    let parameters = ring.params();
    if !parameters.is_feature_nodrop() {
        return Err(Unavailable::TooOld { missing: "IORING_FEAT_NODROP" });
    }
    if !parameters.is_feature_ext_arg() {
        return Err(Unavailable::TooOld { missing: "IORING_FEAT_EXT_ARG" });
    }
    let mut operations = Probe::new();
    let asked = ring.submitter().register_probe(&mut operations);
    asked.map_err(|cause| match cause.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Unavailable::Refused { cause },
        _ => Unavailable::Failed { operation: "ask for the operations of io_uring", cause },
    })?;
    for (code, missing) in [
        (opcode::Send::CODE, "IORING_OP_SEND"),
        (opcode::Recv::CODE, "IORING_OP_RECV"),
        (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
        (opcode::RecvMsg::CODE, "IORING_OP_RECVMSG"),
        (opcode::LinkTimeout::CODE, "IORING_OP_LINK_TIMEOUT"),
    ] {
        if !operations.is_supported(code) {
            return Err(Unavailable::TooOld { missing });
        }
    }
    let can_set_up = |set: fn(&mut io_uring::Builder) -> &mut io_uring::Builder| {
        let mut builder = IoUring::builder();
        set(&mut builder);
        // Any other reason is none of the feature's; the ring that is used will say it.
        let built = builder.build(1);
        !matches!(built, Err(error) if error.raw_os_error() == Some(libc::EINVAL))
    };
    let send_zc = operations.is_supported(opcode::SendZc::CODE);
    let found = [
        (Feature::SubmitAll, can_set_up(|ring| ring.setup_submit_all())),
        (Feature::CoopTaskrun, can_set_up(|ring| ring.setup_coop_taskrun())),
        (Feature::SingleIssuer, can_set_up(|ring| ring.setup_single_issuer())),
        (
            Feature::DeferTaskrun,
            can_set_up(|ring| ring.setup_single_issuer().setup_defer_taskrun()),
        ),
        (Feature::SendZc, send_zc),
        (Feature::ReportUsage, send_zc && reports_usage(&mut ring)?),
        (Feature::CloneBuffers, can_clone(&ring)),
    ];
    let features: Features =
        found.into_iter().filter(|(_, found)| *found).map(|(feature, _)| feature).collect();
    Ok(features.consistent())
}

/// Whether zero-copy sends may be asked to report. Kernels that know no such flag say that it is
/// invalid; others get as far as the socket, which knows no zero-copy.
fn reports_usage(ring: &mut IoUring) -> Result<bool, Unavailable> {
    let failed = |cause| Unavailable::Failed { operation: "try a zero-copy send", cause };
    let (socket, _other) = UnixStream::pair().map_err(failed)?;
    let byte = [0_u8];
    let entry =
        opcode::SendZc::new(Fd(socket.as_raw_fd()), byte.as_ptr(), 1).zc_flags(REPORT_USAGE);
    // SAFETY: the byte and the socket outlive the request, which is waited for below.
    let pushed = unsafe { ring.submission().push(&entry.build()) };
    pushed.map_err(|error| failed(io::Error::other(error)))?;
    let result = loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(failed(error)),
            _ => {}
        }
        if let Some(entry) = ring.completion().next() {
            break entry.result();
        }
    };
    Ok(result != -libc::EINVAL)
}

/// Whether a table can be cloned: an empty one is.
fn can_clone(ring: &IoUring) -> bool {
    let Ok(other) = IoUring::new(1) else { return false };
    ring.submitter().register_buffers_sparse(1).is_ok()
        && other.submitter().register_buffers_clone(ring.as_raw_fd()).is_ok()
}
