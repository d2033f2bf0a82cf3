//! QEMU: the migration of a machine that never ran, between two processes driven over QMP.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageferry_cli::outcome::Failure;
use pageferry_qemu::Qmp;
use pageferry_qemu::testing::Running;
use pageferry_vmm::ram::Backing;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::process::find as find_program;
use super::{CompareArgs, Mover};
use crate::qemu::{BANDWIDTH_BYTES, await_end, listen, migrate_to};
use crate::random::Random;

const NAME: &str = "QEMU, multifd";
const ZERO_COPY_NAME: &str = "QEMU, multifd and zero-copy-send";

/// The machine does not run, so it does not matter; but by default QEMU would go on for longer.
const DOWNTIME_LIMIT_MS: u64 = 2_000_000;

struct Qemu {
    name: &'static str,
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
    find_program("qemu-system-x86_64", "qemu-system-x86")?;
    let image = Arc::new(Image::new(args.memory)?);
    let (channels, backing) = (args.channels, args.backing);
    Ok([(NAME, false), (ZERO_COPY_NAME, true)].map(|(name, zero_copy)| -> Box<dyn Mover> {
        let image = Arc::clone(&image);
        Box::new(Qemu { name, image, channels, backing, zero_copy })
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
        let (_source, from) = self.start("source", &from, &[])?;
        let (_destination, to) = self.start("destination", &to, &["-incoming", "defer"])?;
        let port = listen(&to)?;
        migrate_to(&from, &port)?;
        gbps(&await_end(&from)?)
    }
}

impl Qemu {
    fn start(&self, name: &str, memory: &str, more: &[&str]) -> Result<(Running, Qmp), Failure> {
        let megabytes = (self.image.bytes >> 20).to_string();
        let arguments = [
            &["-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg"][..],
            &["-machine", "pc,memory-backend=ram", "-m", &megabytes, "-object", memory],
            more,
        ];
        let arguments: Vec<OsString> = arguments.concat().iter().map(OsString::from).collect();
        let running = Running::at(self.image.directory.path().join(name), &arguments)?;
        let qmp = running.connect()?;
        let mut capabilities = vec![json!({"capability": "multifd", "state": true})];
        if self.zero_copy {
            capabilities.push(json!({"capability": "zero-copy-send", "state": true}));
        }
        qmp.execute("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        qmp.execute(
            "migrate-set-parameters",
            json!({
                "multifd-channels": self.channels,
                "max-bandwidth": BANDWIDTH_BYTES,
                "downtime-limit": DOWNTIME_LIMIT_MS,
            }),
        )?;
        Ok((running, qmp))
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
