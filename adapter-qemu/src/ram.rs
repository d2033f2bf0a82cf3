//! A guest's RAM: files that QEMU has mapped, and this process too.
//!
//! The engine sees one region for each backend, addressed by where it is in its file; where the guest sees it is
//! QEMU's affair. The guest address of a region is that of the backend among all, one after the other.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry_rust_vmm::memory::MemoryError;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::qmp::{Qmp, QmpError};
use crate::record::unlink;

/// Regions begin at multiples of this, which is more than any page is.
const APART: u64 = 1 << 30;

/// RAM of a guest: an object of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its name: `-object memory-backend-file,id=ram,…`.
    pub id: String,
    /// Its size in bytes.
    pub len_bytes: u64,
}

/// Why a guest's RAM cannot be reached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// QEMU did not tell.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// There is none that can be reached from outside.
    #[error(
        "none of this guest's RAM is in a file: give QEMU -object \
         memory-backend-file,id=ram,mem-path=PATH,size=SIZE,share=on and -machine …,memory-backend=ram"
    )]
    NotInFiles,
    /// A backend is a private mapping.
    #[error(
        "RAM {id} is a private mapping of its file, so that nobody else sees it: it needs share=on"
    )]
    NotShared {
        /// Its name.
        id: String,
    },
    /// Some RAM is elsewhere.
    #[error(
        "this guest has {base_bytes} bytes of RAM, and {in_files_bytes} of them are in shared files: all of it \
         must be"
    )]
    Elsewhere {
        /// RAM of the guest.
        base_bytes: u64,
        /// Of that, in files.
        in_files_bytes: u64,
    },
    /// A file could not be opened or made.
    #[error("failed to {operation} {}", .path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A file is there that might be somebody's.
    #[error("{} is there already: it may be another guest's RAM, so it is not written to; remove it or name another", .path.display())]
    Exists {
        /// Its path.
        path: PathBuf,
    },
    /// A file could not be mapped.
    #[error("failed to map the RAM in {}", .path.display())]
    Map {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: MmapRegionError,
    },
    /// The files together are no memory.
    #[error("RAM in these files is no guest's memory")]
    Regions(#[source] FromRangesError),
    /// It cannot be given to the engine.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The RAM of a guest, by its files: each backend with its path, by their names. QEMU tells them in no order.
pub fn backends_of(qmp: &Qmp) -> Result<Vec<(Backend, PathBuf)>, RamError> {
    let mut backends = Vec::new();
    for id in qmp.objects("memory-backend-file")? {
        let path = format!("/objects/{id}");
        let unexpected = |why: String| QmpError::Unexpected { command: "qom-get".into(), why };
        let shared = qmp.property(&path, "share")?;
        if shared.as_bool() != Some(true) {
            return Err(RamError::NotShared { id });
        }
        let size = qmp.property(&path, "size")?;
        let len_bytes =
            size.as_u64().ok_or_else(|| unexpected(format!("RAM {id} has the size {size}")))?;
        let file = qmp.property(&path, "mem-path")?;
        let file =
            file.as_str().ok_or_else(|| unexpected(format!("RAM {id} has the path {file}")))?;
        backends.push((Backend { id, len_bytes }, PathBuf::from(file)));
    }
    if backends.is_empty() {
        return Err(RamError::NotInFiles);
    }
    let summary = qmp.execute("query-memory-size-summary", serde_json::Value::Null)?;
    let base_bytes = summary["base-memory"].as_u64().unwrap_or_default();
    let in_files_bytes = backends.iter().map(|(backend, _)| backend.len_bytes).sum();
    if base_bytes != in_files_bytes {
        return Err(RamError::Elsewhere { base_bytes, in_files_bytes });
    }
    backends.sort_by(|(one, _), (other, _)| one.id.cmp(&other.id));
    Ok(backends)
}

/// Maps the RAM of a guest that QEMU has.
pub fn map(backends: &[(Backend, PathBuf)]) -> Result<Arc<GuestMemory>, RamError> {
    let mut regions = Vec::new();
    let mut guest_addr = 0_u64;
    for (backend, path) in backends {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|cause| RamError::File { operation: "open", path: path.clone(), cause })?;
        let len_bytes = usize::try_from(backend.len_bytes).unwrap_or(usize::MAX);
        let region: MmapRegion<()> = MmapRegion::from_file(FileOffset::new(file, 0), len_bytes)
            .map_err(|cause| RamError::Map { path: path.clone(), cause })?;
        let region = GuestRegionMmap::new(region, GuestAddress(guest_addr));
        let too_much = RamError::Regions(FromRangesError::InvalidGuestRegion);
        regions.push(region.ok_or(too_much)?);
        guest_addr = guest_addr
            .saturating_add(backend.len_bytes)
            .checked_next_multiple_of(APART)
            .unwrap_or(u64::MAX);
    }
    let memory = GuestMemoryMmap::from_regions(regions);
    let memory = memory.map_err(|cause| RamError::Regions(cause.into()))?;
    Ok(Arc::new(pageferry_rust_vmm::guest_memory(Arc::new(memory))?))
}

/// RAM that was made for a guest that comes. Dropped before the guest is here, its files are removed.
#[derive(Debug, Default)]
pub struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Makes files for a QEMU that is still to be started, which gives them their sizes. One that is there already
    /// is left as it is, and refused.
    pub fn create(paths: &[PathBuf]) -> Result<Self, RamError> {
        let mut made = Self::default();
        for path in paths {
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600);
            options.open(path).map_err(|cause| match cause.kind() {
                io::ErrorKind::AlreadyExists => RamError::Exists { path: path.clone() },
                _ => RamError::File { operation: "make", path: path.clone(), cause },
            })?;
            made.paths.push(path.clone());
        }
        Ok(made)
    }

    /// Has another file removed with the RAM, if it is there: what QEMU makes and may leave.
    pub fn removes_too(&mut self, path: &Path) {
        self.paths.push(path.to_owned());
    }

    /// The guest is here: its RAM stays.
    pub(crate) fn keep(&mut self) {
        self.paths.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = unlink(path) {
                tracing::warn!(%error, path = %path.display(), "RAM that no guest came to is left");
            }
        }
    }
}
