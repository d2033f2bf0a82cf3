//! QEMU's own migration, driven over its monitors.

use std::thread;
use std::time::{Duration, Instant};

use pageferry_cli::outcome::Failure;
use pageferry_qemu::Qmp;
use serde_json::{Value, json};

/// Without a limit QEMU takes its default, which is a fraction of what loopback can do.
pub(crate) const BANDWIDTH_BYTES: u64 = 1 << 40;

/// For a migration over loopback, whoever makes it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Has one that waits for a guest listen, and returns the port.
pub(crate) fn listen(qmp: &Qmp) -> Result<String, Failure> {
    qmp.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}))?;
    let listening = qmp.execute("query-migrate", Value::Null)?;
    let port = listening.pointer("/socket-address/0/port").and_then(Value::as_str);
    Ok(port.ok_or("QEMU did not say where it listens")?.to_owned())
}

/// Begins.
pub(crate) fn migrate_to(qmp: &Qmp, port: &str) -> Result<(), Failure> {
    qmp.execute("migrate", json!({"uri": format!("tcp:127.0.0.1:{port}")}))?;
    Ok(())
}

/// Waits for the end, and returns what QEMU says of it.
pub(crate) fn await_end(qmp: &Qmp) -> Result<Value, Failure> {
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
