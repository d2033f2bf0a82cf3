//! QEMU's own migration.

use std::thread;
use std::time::{Duration, Instant};

use pageferry_cli::outcome::Failure;
use pageferry_qemu::Qmp;
use pageferry_qemu::testing::Running;
use serde_json::{Value, json};

use super::stage::{Moved, Mover, Stage};

/// For a migration over loopback.
const PATIENCE: Duration = Duration::from_secs(120);
/// Without a limit QEMU takes its default, which is a fraction of what loopback can do.
const BANDWIDTH_BYTES: u64 = 1 << 40;

/// As it is, or by several connections.
pub(super) struct Qemu {
    pub(super) multifd: Option<u16>,
    pub(super) downtime_limit: Duration,
}

impl Mover for Qemu {
    fn name(&self) -> String {
        if self.multifd.is_some() { "QEMU, multifd" } else { "QEMU" }.to_owned()
    }

    fn go(&self, stage: &Stage) -> Result<Moved, Failure> {
        let mut arguments = stage.guests.arguments(&stage.there);
        arguments.extend(["-incoming".into(), "defer".into()]);
        let there = Running::with(stage.guests, &stage.there, &arguments)?;
        let qmp = there.connect()?;
        self.set_up(&qmp)?;
        self.set_up(&stage.qmp)?;
        qmp.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}))?;
        let listening = qmp.execute("query-migrate", Value::Null)?;
        let port = listening.pointer("/socket-address/0/port").and_then(Value::as_str);
        let port = port.ok_or("QEMU did not say where it listens")?;
        let cpu = stage.cpu(&qmp)?;
        stage.qmp.execute("migrate", json!({"uri": format!("tcp:127.0.0.1:{port}")}))?;
        let ended = await_end(&stage.qmp)?;
        let cpu_ms = cpu.end(&[&stage.qmp, &qmp])?;
        let figure = |path: &str| {
            ended
                .pointer(path)
                .and_then(Value::as_f64)
                .ok_or_else(|| format!("QEMU did not say {path}: {ended}"))
        };
        Ok(Moved {
            total_ms: figure("/total-time")?,
            downtime_ms: figure("/downtime")?,
            wire_bytes: ended.pointer("/ram/transferred").and_then(Value::as_u64).unwrap_or(0),
            cpu_ms,
            _there: there,
        })
    }
}

impl Qemu {
    fn set_up(&self, qmp: &Qmp) -> Result<(), Failure> {
        let mut parameters = json!({
            "max-bandwidth": BANDWIDTH_BYTES,
            "downtime-limit": u64::try_from(self.downtime_limit.as_millis())?,
        });
        if let Some(channels) = self.multifd {
            let multifd = json!([{"capability": "multifd", "state": true}]);
            qmp.execute("migrate-set-capabilities", json!({"capabilities": multifd}))?;
            parameters["multifd-channels"] = channels.into();
        }
        qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }
}

fn await_end(qmp: &Qmp) -> Result<Value, Failure> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let state = qmp.execute("query-migrate", Value::Null)?;
        match state.get("status").and_then(Value::as_str) {
            // It is completed a moment before its thread has calculated how long it took
            // (migration/migration.c, migration_iteration_finish).
            Some("completed") if state["total-time"] != 0 => return Ok(state),
            Some("failed" | "cancelled") => {
                let why = state.get("error-desc").unwrap_or(&Value::Null);
                return Err(format!("QEMU's migration failed: {why}").into());
            }
            // As often as it does not matter to what is measured.
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
    Err("QEMU's migration does not end".into())
}
