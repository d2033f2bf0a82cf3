//! Device state in and out of QEMU: by a migration of its own that leaves RAM alone.
//!
//! With the capability `x-ignore-shared` QEMU passes over RAM that is a shared mapping of a file, and what is
//! left of its stream is the state of devices, and of memory of theirs that is in no file: ROMs, video memory.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use thiserror::Error;

use crate::qmp::{Qmp, QmpError};

/// What QEMU's migration has to be like. Without RAM, and told by events.
const CAPABILITIES: [&str; 2] = ["x-ignore-shared", "events"];
/// At the destination disks are taken when the guest is let run, and not before: the source may still have them.
const TAKES_DISKS_LATE: &str = "late-block-activate";

/// By which name QEMU has its end of the socket.
const NAME: &str = "pageferry-state";

/// How long QEMU may do nothing with its end.
const STALL: Duration = Duration::from_secs(30);
/// How long a migration of QEMU's may take that has all it needs.
const TIME: Duration = Duration::from_secs(60);

/// The most device state that is taken: large video memory travels with it.
const MOST_BYTES: u64 = 1 << 30;

/// Why device state did not come out of QEMU, or did not go in.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum DeviceStateError {
    /// QEMU did not do it.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The socket to QEMU failed.
    #[error("failed to {operation} device state")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        cause: Arc<io::Error>,
    },
    /// It was more than is taken.
    #[error(
        "QEMU's device state is more than {limit_bytes} bytes: is all of its RAM in shared files? (-object \
         memory-backend-file,share=on)"
    )]
    TooMuch {
        /// The most that is taken.
        limit_bytes: u64,
    },
}

/// Prepares QEMU at either side; once, before anything else.
pub(crate) fn prepare(qmp: &Qmp, incoming: bool) -> Result<(), QmpError> {
    let capabilities = CAPABILITIES.into_iter().chain(incoming.then_some(TAKES_DISKS_LATE));
    qmp.set_capabilities(&capabilities.collect::<Vec<_>>())?;
    // As fast as it can, for the guest stands still.
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": i64::MAX })).map(drop)
}

/// Appends the device state of a guest that stands still. Its QEMU is in the state "postmigrate" afterwards, with
/// its disks given up, and can go on by `cont`.
pub(crate) fn save(qmp: &Qmp, state: &mut Vec<u8>) -> Result<(), DeviceStateError> {
    let failed =
        |operation| move |cause| DeviceStateError::Socket { operation, cause: Arc::new(cause) };
    let (ours, theirs) = pair().map_err(failed("make a socket for"))?;
    qmp.forget_events();
    qmp.give(NAME, theirs.as_fd())?;
    // So that the end of QEMU's is the end.
    drop(theirs);
    qmp.execute("migrate", json!({ "uri": format!("fd:{NAME}") }))?;
    let before = state.len();
    let read = ours.take(MOST_BYTES + 1).read_to_end(state);
    let saved = (state.len() - before) as u64;
    if saved > MOST_BYTES {
        return Err(DeviceStateError::TooMuch { limit_bytes: MOST_BYTES });
    }
    read.map_err(failed("read"))?;
    qmp.await_migrated(TIME, "migrate")?;
    tracing::debug!(bytes = saved, "QEMU's device state");
    Ok(())
}

/// Gives device state to a QEMU that waits for it (`-incoming defer -S`). The guest stands still in it afterwards.
pub(crate) fn load(qmp: &Qmp, state: &[u8]) -> Result<(), DeviceStateError> {
    let failed =
        |operation| move |cause| DeviceStateError::Socket { operation, cause: Arc::new(cause) };
    let (mut ours, theirs) = pair().map_err(failed("make a socket for"))?;
    qmp.forget_events();
    qmp.give(NAME, theirs.as_fd())?;
    drop(theirs);
    qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{NAME}") }))?;
    let written = ours.write_all(state).and_then(|()| ours.shutdown(Shutdown::Write));
    match written {
        // It does not take more than it wants, and says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.map_err(failed("write"))?,
    }
    Ok(qmp.await_migrated(TIME, "migrate-incoming")?)
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(STALL))?;
    ours.set_write_timeout(Some(STALL))?;
    Ok((ours, theirs))
}
