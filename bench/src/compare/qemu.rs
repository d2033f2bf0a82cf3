//! QEMU: the migration of a machine that never ran, between two processes driven over QMP.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry_cli::outcome::Failure;
use pageferry_vmm::ram::Backing;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::process::{Running, find as find_program};
use super::{CompareArgs, Mover};
use crate::random::Random;

const NAME: &str = "QEMU, multifd";
const ZERO_COPY_NAME: &str = "QEMU, multifd and zero-copy-send";

/// For a migration over loopback.
const PATIENCE: Duration = Duration::from_secs(120);
/// Without a limit QEMU takes its default, which is a fraction of what loopback can do.
const BANDWIDTH_BYTES: u64 = 1 << 40;
/// The machine does not run, so it does not matter; but by default QEMU would go on for longer.
const DOWNTIME_LIMIT_MS: u64 = 2_000_000;

struct Qemu {
    name: &'static str,
    program: PathBuf,
    /// The source's memory, filled once.
    image: Arc<Image>,
    channels: u16,
    backing: Backing,
    zero_copy: bool,
}

/// A file in memory, full of what cannot be compressed.
#[derive(Debug)]
struct Image {
    directory: TempDir,
    bytes: u64,
}

impl Image {
    fn path(&self) -> PathBuf {
        self.directory.path().join("ram")
    }

    fn new(bytes: u64) -> Result<Self, Failure> {
        let directory = tempfile::Builder::new()
            .prefix("pageferry-bench.")
            .tempdir_in("/dev/shm")
            .map_err(|error| format!("failed to make room in /dev/shm: {error}"))?;
        let image = Self { directory, bytes };
        let mut file = BufWriter::new(File::create(image.path())?);
        let mut random = Random::new(1);
        let mut block = vec![0; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            random.fill(&mut block);
            let len = usize::try_from(left)?.min(block.len());
            file.write_all(&block[..len])?;
            left -= len as u64;
        }
        file.flush()?;
        Ok(image)
    }
}

/// With and without zero-copy-send.
pub(super) fn find(args: &CompareArgs) -> Result<[Box<dyn Mover>; 2], Failure> {
    let program = find_program("qemu-system-x86_64", "qemu-system-x86")?;
    let image = Arc::new(Image::new(args.memory)?);
    let (channels, backing) = (args.channels, args.backing);
    Ok([(NAME, false), (ZERO_COPY_NAME, true)].map(|(name, zero_copy)| -> Box<dyn Mover> {
        let (program, image) = (program.clone(), Arc::clone(&image));
        Box::new(Qemu { name, program, image, channels, backing, zero_copy })
    }))
}

impl Mover for Qemu {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn measure(&mut self) -> Result<f64, Failure> {
        let bytes = self.image.bytes;
        let image = self.image.path();
        let from =
            format!("memory-backend-file,id=ram,share=on,size={bytes},mem-path={}", text(&image)?);
        let to = match self.backing {
            Backing::Memfd => format!("memory-backend-memfd,id=ram,share=on,size={bytes}"),
            Backing::Hugetlb => format!(
                "memory-backend-memfd,id=ram,share=on,hugetlb=on,hugetlbsize=2M,size={bytes}"
            ),
            _ => format!("memory-backend-ram,id=ram,size={bytes}"),
        };
        let mut source = self.start(&from, &[])?;
        let mut destination = self.start(&to, &["-incoming", "defer"])?;
        destination.execute("migrate-incoming", &json!({"uri": "tcp:127.0.0.1:0"}))?;
        let listening = destination.execute("query-migrate", &json!({}))?;
        let port = listening.pointer("/socket-address/0/port").and_then(Value::as_str);
        let port = port.ok_or("QEMU did not say where it listens")?;
        source.execute("migrate", &json!({"uri": format!("tcp:127.0.0.1:{port}")}))?;
        gbps(&source.await_end()?)
    }
}

impl Qemu {
    fn start(&self, memory: &str, more: &[&str]) -> Result<Monitor, Failure> {
        let megabytes = (self.image.bytes >> 20).to_string();
        let mut command = Command::new(&self.program);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg"])
            .args(["-machine", "pc,memory-backend=ram", "-m", &megabytes, "-object", memory])
            .args(["-qmp", "stdio"])
            .args(more);
        let mut monitor = Monitor::start(command.stdin(Stdio::piped()))?;
        let mut capabilities = vec![json!({"capability": "multifd", "state": true})];
        if self.zero_copy {
            capabilities.push(json!({"capability": "zero-copy-send", "state": true}));
        }
        monitor.execute("migrate-set-capabilities", &json!({"capabilities": capabilities}))?;
        monitor.execute(
            "migrate-set-parameters",
            &json!({
                "multifd-channels": self.channels,
                "max-bandwidth": BANDWIDTH_BYTES,
                "downtime-limit": DOWNTIME_LIMIT_MS,
            }),
        )?;
        Ok(monitor)
    }
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| "a path that is no text".into())
}

/// Bits of pages over the time that moved them.
fn gbps(ended: &Value) -> Result<f64, Failure> {
    let figure = |path: &str| ended.pointer(path).and_then(Value::as_f64);
    let (Some(bytes), Some(total_ms), Some(setup_ms)) =
        (figure("/ram/normal-bytes"), figure("/total-time"), figure("/setup-time"))
    else {
        return Err(format!("QEMU did not say how long it took: {ended}").into());
    };
    let took_ms = total_ms - setup_ms;
    if took_ms <= 0.0 {
        return Err(format!("QEMU says that {setup_ms} of {total_ms} ms were setup").into());
    }
    Ok(bytes * 8.0 / took_ms / 1e6)
}

/// A QEMU with its monitor.
#[derive(Debug)]
struct Monitor {
    running: Running,
    stdin: ChildStdin,
    lines: BufReader<ChildStdout>,
}

impl Monitor {
    fn start(command: &mut Command) -> Result<Self, Failure> {
        let mut running = Running::start(command)?;
        let lines = running.await_line("\"QMP\"")?;
        let stdin = running.child.stdin.take().ok_or("QEMU takes no orders")?;
        let mut monitor = Self { running, stdin, lines };
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Has it do something, and returns its answer. Events that come before are not for us.
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        let order = json!({"execute": command, "arguments": arguments});
        if writeln!(self.stdin, "{order}").is_err() {
            return Err(self.running.complaint("it takes no more orders"));
        }
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line)? == 0 {
                return Err(self.running.complaint("it ended"));
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.pointer("/error/desc") {
                return Err(format!("QEMU refused {command}: {error}").into());
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    /// Waits for the end of its migration.
    fn await_end(&mut self) -> Result<Value, Failure> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let state = self.execute("query-migrate", &json!({}))?;
            match state.get("status").and_then(Value::as_str) {
                // It is completed a moment before its thread has calculated how long it took
                // (migration/migration.c, migration_iteration_finish).
                Some("completed") if state["total-time"] != 0 => return Ok(state),
                Some("failed" | "cancelled") => {
                    let why = state.get("error-desc").unwrap_or(&Value::Null);
                    return Err(format!("QEMU's migration failed: {why}").into());
                }
                // As often as it does not matter to what is measured.
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        Err("QEMU's migration does not end".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_no_time_is_no_figure() {
        let ended = |total, setup| json!({"ram": {"normal-bytes": 1_000_000_000}, "total-time": total, "setup-time": setup});
        assert!((gbps(&ended(1010, 10)).unwrap() - 8.0).abs() < 1e-9);
        let error = gbps(&ended(300, 300)).unwrap_err().to_string();
        assert!(error.contains("300 of 300 ms were setup"), "{error}");
        assert!(gbps(&json!({})).is_err());
    }
}
