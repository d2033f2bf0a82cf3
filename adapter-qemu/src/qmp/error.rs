//! Why QEMU was not reached, or did not do what it was asked.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

/// Why QEMU was not reached, or did not do what it was asked.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The monitor's socket could not be connected to.
    #[error("failed to connect to QEMU's monitor at {}", .path.display())]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: Arc<io::Error>,
    },
    /// Nobody greeted.
    #[error(
        "no greeting from QEMU's monitor within {} s: a monitor talks to one client at a time, and this one may \
         have another (give QEMU a -qmp of its own for this)",
        .waited.as_secs_f32()
    )]
    NoGreeting {
        /// For so long.
        waited: Duration,
    },
    /// The other end is no monitor.
    #[error("this is no QEMU monitor: it said {said:?}")]
    NoMonitor {
        /// The beginning of what it said.
        said: String,
    },
    /// The connection is over: QEMU has ended, or closed it.
    #[error(
        "QEMU's monitor has closed the connection: QEMU has ended, or its host took the monitor away"
    )]
    Closed,
    /// The connection failed.
    #[error("the connection to QEMU's monitor failed")]
    Io(#[source] Arc<io::Error>),
    /// It said something that cannot be understood.
    #[error("QEMU's monitor said what is no message: {said:?}")]
    Malformed {
        /// The beginning of what it said.
        said: String,
    },
    /// A message was longer than any that is asked for.
    #[error("QEMU's monitor sent a message of more than {limit_bytes} bytes")]
    TooLong {
        /// As long as it may be.
        limit_bytes: u64,
    },
    /// A command was not answered in time.
    #[error("QEMU did not answer {command} within {} s", .waited.as_secs_f32())]
    TimedOut {
        /// Its name.
        command: String,
        /// For so long.
        waited: Duration,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// Its name.
        command: String,
        /// QEMU's class of the error: "GenericError", "CommandNotFound".
        class: String,
        /// What QEMU said.
        description: String,
    },
    /// The answer to a command is not as documented.
    #[error("QEMU's answer to {command} is not understood: {why}")]
    Unexpected {
        /// Its name.
        command: String,
        /// What is missing or wrong.
        why: String,
    },
}

impl QmpError {
    /// Whether QEMU refused since it does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }
}
