//! QEMU's own migration.

use std::time::Duration;

use pageferry_cli::outcome::Failure;
use pageferry_qemu::Qmp;
use pageferry_qemu::testing::Running;
use serde_json::{Value, json};

use super::stage::{Moved, Mover, Stage};
use crate::qemu::{BANDWIDTH_BYTES, await_end, listen, migrate_to};

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
        let port = listen(&qmp)?;
        let cpu = stage.cpu(&qmp)?;
        migrate_to(&stage.qmp, &port)?;
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
