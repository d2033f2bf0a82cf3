//! What a monitor says.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::QmpError;

/// How much of what was not understood is shown.
const SHOWN: usize = 120;

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Its name: "STOP", "SHUTDOWN".
    #[serde(rename = "event")]
    pub name: String,
    /// What else is told of it.
    #[serde(default)]
    pub data: Value,
}

/// QEMU's version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The numbers.
    pub qemu: VersionNumbers,
    /// What the distribution adds: "Debian 1:7.2+dfsg-7+deb12u18".
    #[serde(default)]
    pub package: String,
}

/// Numbers of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "their names say it")]
pub struct VersionNumbers {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

impl Version {
    /// Whether device state that `other` saved may be loaded by it, as far as versions tell: machine types are kept
    /// for later versions, not for earlier ones.
    pub fn is_at_least(&self, other: &Self) -> bool {
        let order = |version: &Self| (version.qemu.major, version.qemu.minor);
        order(self) >= order(other)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VersionNumbers { major, minor, micro } = self.qemu;
        write!(f, "{major}.{minor}.{micro}")?;
        if self.package.is_empty() { Ok(()) } else { write!(f, " ({})", self.package) }
    }
}

/// Why QEMU did not do a command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) desc: String,
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Banner,
}

#[derive(Deserialize)]
struct Banner {
    version: Version,
}

/// The version that a monitor greets with.
pub(super) fn greeting(line: &[u8]) -> Result<Version, QmpError> {
    let greeting: Greeting =
        serde_json::from_slice(line).map_err(|_| QmpError::NoMonitor { said: beginning(line) })?;
    Ok(greeting.qmp.version)
}

/// A line, after the greeting.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// The answer to a command.
    Answer {
        id: u64,
        answer: Result<Value, Refusal>,
    },
    Event(Event),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Done { id: u64, r#return: Value },
    Refused { id: u64, error: Refusal },
    Event(Event),
}

impl Message {
    pub(super) fn parse(line: &[u8]) -> Result<Self, QmpError> {
        let parsed = serde_json::from_slice(line)
            .map_err(|_| QmpError::Malformed { said: beginning(line) })?;
        Ok(match parsed {
            Line::Done { id, r#return } => Self::Answer { id, answer: Ok(r#return) },
            Line::Refused { id, error } => Self::Answer { id, answer: Err(error) },
            Line::Event(event) => Self::Event(event),
        })
    }
}

/// The beginning of a line, for messages.
fn beginning(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(&line[..line.len().min(SHOWN)]);
    text.trim_end().to_owned()
}
