//! What would write to a guest's RAM and is not seen from outside: found before anything moves.
//!
//! QEMU's own page tables show what its threads, its vCPUs and the kernel's buffered reads write. Devices that were
//! given the RAM (VFIO, vDPA), kernel threads with tables of their own (vhost) and other processes that have mapped it
//! (vhost-user) do not show there, and devices that take RAM from the guest or give it (balloon, virtio-mem) change
//! what is to be moved. Reads that go past the page cache (`cache.direct`) show once they are over; so the guest has
//! to stand still while it is looked at.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use pageferry_rust_vmm::ForeignProcess;
use procfs::Current;
use procfs::process::{FDTarget, MountInfo, Process, all_processes};
use rustix::fs::{major, minor};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::monitor::Property;
use crate::qmp::{Qmp, QmpError};
use crate::ram::Backend;
use crate::tracking::Tracking;

/// Beginnings of names of devices, and what they do.
const DEVICES: [(&str, &str); 6] = [
    ("vfio-", "it writes RAM by itself"),
    ("vhost-", "the kernel or another process writes RAM for it"),
    ("virtio-balloon", "it gives RAM back"),
    ("virtio-mem", "it adds RAM and takes it away"),
    ("virtio-pmem", "its memory is in a file of its own"),
    ("nvdimm", "its memory is in a file of its own"),
];

/// Beginnings of files that QEMU has open for who writes its RAM.
const FILES: [&str; 4] = ["/dev/vhost-", "/dev/vfio/", "/dev/iommu", "/dev/infiniband/"];

/// Something that stands in the way of moving a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// A device of the guest.
    Device {
        /// Where it is in QEMU.
        path: String,
        /// Its type.
        kind: String,
        /// What it does.
        does: &'static str,
    },
    /// A file that QEMU has open.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// This host may take the RAM's pages out of QEMU's page tables, and their bits with them.
    Swap,
    /// The RAM's file may be gathered into huge pages, which takes its bits.
    HugePages {
        /// The file.
        path: PathBuf,
    },
    /// Another process that has mapped the RAM.
    Mapper {
        /// Its number.
        pid: i32,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { path, kind, does } => write!(f, "device {path} ({kind}): {does}"),
            Self::File { path } => {
                write!(f, "QEMU has {} open: RAM is written by it unseen", path.display())
            }
            Self::Swap => f.write_str(
                "this kernel has soft-dirty bits alone, which RAM that is swapped out loses: start QEMU with \
                 -overcommit mem-lock=on, or do without swap (swapoff -a)",
            ),
            Self::HugePages { path } => write!(
                f,
                "this kernel has soft-dirty bits alone, which huge pages lose: the file system of {} is mounted \
                 with huge=, or /sys/kernel/mm/transparent_hugepage/shmem_enabled is force",
                path.display()
            ),
            Self::Mapper { pid, name } => {
                write!(
                    f,
                    "process {pid} ({name}) has mapped the RAM too: what it writes is not seen"
                )
            }
        }
    }
}

/// Why a guest is not moved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PreflightError {
    /// There is what is not seen.
    #[error("this guest cannot be moved: {}", list(.0))]
    Obstacles(Vec<Obstacle>),
    /// QEMU did not tell.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The kernel did not tell.
    #[error("failed to look at the processes that may write the guest's RAM")]
    Proc(#[from] procfs::ProcError),
    /// A file of RAM is not what it was.
    #[error("failed to look at the guest's RAM")]
    Ram(#[source] std::io::Error),
}

fn list(obstacles: &[Obstacle]) -> String {
    let list: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
    list.join("; ")
}

#[derive(Deserialize)]
struct Node {
    #[serde(default, rename = "node-name")]
    name: String,
    cache: Cache,
}

#[derive(Deserialize)]
struct Cache {
    direct: bool,
}

/// Looks at a QEMU, its process and its RAM for what stands in the way of tracking it so. Names of disks that are
/// read past the page cache, which is to be heeded.
pub fn check(
    qmp: &Qmp,
    pid: u32,
    ram: &[(Backend, PathBuf)],
    tracking: Tracking,
) -> Result<Vec<String>, PreflightError> {
    let mut obstacles = devices(qmp)?;
    // Its number came from an i32.
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    let process = Process::new(pid)?;
    obstacles.extend(open_files(&process)?);
    let files: Result<Vec<_>, _> = ram.iter().map(|(_, path)| std::fs::metadata(path)).collect();
    let files = files.map_err(PreflightError::Ram)?;
    obstacles.extend(mappers(pid, &files)?);
    if tracking == Tracking::SoftDirty {
        obstacles.extend(bits_at_risk(&process, ram, &files)?);
    }
    let nodes: Vec<Node> = qmp.query("query-named-block-nodes", Value::Null)?;
    let direct = nodes.into_iter().filter(|node| node.cache.direct);
    if obstacles.is_empty() {
        Ok(direct.map(|node| node.name).collect())
    } else {
        Err(PreflightError::Obstacles(obstacles))
    }
}

/// What would lose soft-dirty bits of RAM.
fn bits_at_risk(
    process: &Process,
    ram: &[(Backend, PathBuf)],
    files: &[Metadata],
) -> Result<Vec<Obstacle>, procfs::ProcError> {
    let mut obstacles = Vec::new();
    let ram_kib = ram.iter().map(|(backend, _)| backend.len_bytes).sum::<u64>() / 1024;
    let locked_kib = process.status()?.vmlck.unwrap_or_default();
    if locked_kib < ram_kib && procfs::Meminfo::current()?.swap_total > 0 {
        obstacles.push(Obstacle::Swap);
    }
    let forced = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .is_ok_and(|modes| modes.contains("[force]"));
    let mounts = Process::myself()?.mountinfo()?;
    for ((_, path), file) in ram.iter().zip(files) {
        let device = format!("{}:{}", major(file.dev()), minor(file.dev()));
        let is_huge = |mount: &MountInfo| match mount.super_options.get("huge") {
            Some(huge) => mount.majmin == device && huge.as_deref() != Some("never"),
            None => false,
        };
        if forced || mounts.0.iter().any(is_huge) {
            obstacles.push(Obstacle::HugePages { path: path.clone() });
        }
    }
    Ok(obstacles)
}

fn devices(qmp: &Qmp) -> Result<Vec<Obstacle>, QmpError> {
    let mut obstacles = Vec::new();
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let devices: Vec<Property> = qmp.query("qom-list", json!({ "path": folder }))?;
        for Property { name, kind } in devices {
            let Some(kind) = kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>'))
            else {
                continue;
            };
            if let Some((_, does)) = DEVICES.iter().find(|(device, _)| kind.starts_with(device)) {
                let path = format!("{folder}/{name}");
                obstacles.push(Obstacle::Device { path, kind: kind.to_owned(), does });
            }
        }
    }
    Ok(obstacles)
}

fn open_files(process: &Process) -> Result<Vec<Obstacle>, procfs::ProcError> {
    let mut obstacles = Vec::new();
    for open in process.fd()? {
        if let FDTarget::Path(path) = open?.target
            && FILES.iter().any(|file| path.to_string_lossy().starts_with(file))
        {
            obstacles.push(Obstacle::File { path });
        }
    }
    Ok(obstacles)
}

/// Processes beside that one and this one that may write these files' mappings.
fn mappers(pid: i32, ram: &[Metadata]) -> Result<Vec<Obstacle>, procfs::ProcError> {
    let this = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
    let mut obstacles = Vec::new();
    for process in all_processes()? {
        // They come and go, and some do not let themselves be looked at.
        let Ok(process) = process else { continue };
        if process.pid == pid || process.pid == this {
            continue;
        }
        let Ok(foreign) = ForeignProcess::open(process.pid.unsigned_abs()) else { continue };
        if ram.iter().any(|file| foreign.can_write(file).unwrap_or(false)) {
            let name = process.stat().map(|stat| stat.comm).unwrap_or_default();
            obstacles.push(Obstacle::Mapper { pid: process.pid, name });
        }
    }
    Ok(obstacles)
}
