//! What would write to a guest's RAM and is not seen from outside: found before anything moves.
//!
//! QEMU's own page tables show what its threads, its vCPUs and the kernel's buffered reads write. Devices that were
//! given the RAM (VFIO, vDPA), kernel threads with tables of their own (vhost), other processes that have mapped it
//! (vhost-user) and reads that go past the page cache (`cache.direct`) do not show there, and devices that take
//! RAM from the guest or give it (balloon, virtio-mem) change what is to be moved.

use std::fmt;
use std::fs::Metadata;
use std::path::PathBuf;

use pageferry_rust_vmm::ForeignProcess;
use procfs::process::{FDTarget, Process, all_processes};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::monitor::Property;
use crate::qmp::{Qmp, QmpError};
use crate::ram::Backend;

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
    /// A disk that is read past the page cache.
    DirectDisk {
        /// Its node in QEMU.
        node: String,
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
            Self::DirectDisk { node } => write!(
                f,
                "disk {node} has cache.direct=on: what is read while dirty pages are looked for is not \
                 seen (without it the page cache is used)"
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

/// Looks at a QEMU, its process and its RAM for what stands in the way.
pub fn check(qmp: &Qmp, pid: u32, ram: &[(Backend, PathBuf)]) -> Result<(), PreflightError> {
    let mut obstacles = devices(qmp)?;
    let nodes: Vec<Node> = qmp.query("query-named-block-nodes", Value::Null)?;
    let direct = nodes.into_iter().filter(|node| node.cache.direct);
    obstacles.extend(direct.map(|node| Obstacle::DirectDisk { node: node.name }));
    // Its number came from an i32.
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    obstacles.extend(open_files(&Process::new(pid)?)?);
    let files: Result<Vec<_>, _> = ram.iter().map(|(_, path)| std::fs::metadata(path)).collect();
    obstacles.extend(mappers(pid, &files.map_err(PreflightError::Ram)?)?);
    if obstacles.is_empty() { Ok(()) } else { Err(PreflightError::Obstacles(obstacles)) }
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
