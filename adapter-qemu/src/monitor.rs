//! What is asked of QEMU, in its own words.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// How long QEMU may take to stop: it finishes what its disks have under way.
const STOPS_WITHIN: Duration = Duration::from_secs(60);

/// Between two questions how a migration of QEMU's stands, where no event says it.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Whether the guest runs, and if not, why: `RunState` of QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunState {
    /// "running", "paused", "postmigrate", "shutdown" …
    pub status: String,
    /// Whether its vCPUs run.
    pub running: bool,
}

/// How a migration of QEMU's stands.
#[derive(Debug, Clone, Deserialize)]
struct MigrationInfo {
    #[serde(default)]
    status: Option<String>,
    #[serde(default, rename = "error-desc")]
    error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Property {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Vcpu {
    #[serde(rename = "thread-id")]
    thread: u32,
}

/// The monitor of one QEMU, in the words of its commands.
impl Qmp {
    /// `query-status`.
    pub fn run_state(&self) -> Result<RunState, QmpError> {
        self.query("query-status", Value::Null)
    }

    /// `stop`: vCPUs stand, and nothing that disks had under way is under way any more.
    pub fn stop(&self) -> Result<(), QmpError> {
        self.execute_within(STOPS_WITHIN, "stop", Value::Null, None).map(drop)
    }

    /// `cont`: the guest runs.
    pub fn cont(&self) -> Result<(), QmpError> {
        self.execute_within(STOPS_WITHIN, "cont", Value::Null, None).map(drop)
    }

    /// `quit`: QEMU ends.
    pub fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null) {
            // It may be gone before it has answered.
            Ok(_) | Err(QmpError::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A property of an object: `qom-get`.
    pub fn property(&self, path: &str, property: &str) -> Result<Value, QmpError> {
        self.execute("qom-get", json!({ "path": path, "property": property }))
    }

    /// The machine's type, with its version: "pc-q35-7.2".
    pub fn machine_type(&self) -> Result<String, QmpError> {
        let kind = self.property("/machine", "type")?;
        let kind = kind.as_str().ok_or_else(|| QmpError::Unexpected {
            command: "qom-get".into(),
            why: format!("the machine's type is {kind}"),
        })?;
        Ok(kind.strip_suffix("-machine").unwrap_or(kind).to_owned())
    }

    /// The kernel's numbers of the threads that are its vCPUs: `query-cpus-fast`. One for all of them under
    /// single-threaded TCG.
    pub fn vcpu_threads(&self) -> Result<Vec<u32>, QmpError> {
        let vcpus: Vec<Vcpu> = self.query("query-cpus-fast", Value::Null)?;
        Ok(vcpus.into_iter().map(|vcpu| vcpu.thread).collect())
    }

    /// Names of the objects that the user made, of a type: `qom-list`.
    pub(crate) fn objects(&self, kind: &str) -> Result<Vec<String>, QmpError> {
        let objects: Vec<Property> = self.query("qom-list", json!({ "path": "/objects" }))?;
        let wanted = format!("child<{kind}>");
        let of_kind = objects.into_iter().filter(|object| object.kind == wanted);
        Ok(of_kind.map(|object| object.name).collect())
    }

    /// What a migration of QEMU's own is to be like: device state alone, by events told.
    pub(crate) fn set_capabilities(&self, capabilities: &[&str]) -> Result<(), QmpError> {
        let on = |name: &&str| json!({ "capability": name, "state": true });
        let capabilities: Vec<_> = capabilities.iter().map(on).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).map(drop)
    }

    /// Gives QEMU a descriptor by that name: `getfd`.
    pub(crate) fn give(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.execute_within(STOPS_WITHIN, "getfd", arguments, Some(descriptor)).map(drop)
    }

    /// Waits until QEMU's migration, of either direction, is over.
    pub(crate) fn await_migrated(&self, time: Duration, command: &str) -> Result<(), QmpError> {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.wait_event(left.min(ASK_AGAIN), |event| event.name == "MIGRATION")?;
            let told = event.as_ref().and_then(|event| event.data["status"].as_str());
            let info: MigrationInfo = match told {
                Some("completed") => return Ok(()),
                Some("setup" | "active" | "device" | "pre-switchover") => continue,
                // It says why.
                _ => self.query("query-migrate", Value::Null)?,
            };
            match info.status.as_deref() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(QmpError::Refused {
                        command: command.into(),
                        class: "GenericError".into(),
                        description: info.error.unwrap_or_else(|| "it failed".into()),
                    });
                }
                _ if left.is_zero() => {
                    return Err(QmpError::TimedOut { command: command.into(), waited: time });
                }
                _ => {}
            }
        }
    }
}
