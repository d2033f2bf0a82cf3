//! How the writes of a running QEMU are seen.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::dirty::DirtySource;
use pageferry::memory::GuestMemory;
use pageferry_rust_vmm::foreign::{ForeignError, Pulsed, SoftDirtyError, Standstill};
use pageferry_rust_vmm::pagemap::PagemapError;
use pageferry_rust_vmm::{
    ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd, PagemapScan, SoftDirty,
};
use thiserror::Error;

use crate::qmp::Qmp;
use crate::userfaultfd::handed_over;

/// Why a QEMU's writes cannot be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrackingError {
    /// This kernel's `PAGEMAP_SCAN` cannot be used.
    #[error(transparent)]
    PagemapScan(#[from] PagemapError),
    /// This kernel has neither.
    #[error("{scan}, and what older kernels have is not there either")]
    Neither {
        /// Why not by `PAGEMAP_SCAN`.
        scan: PagemapError,
        /// Why not by soft-dirty bits.
        #[source]
        soft_dirty: SoftDirtyError,
    },
    /// Soft-dirty bits could not be used.
    #[error(transparent)]
    SoftDirty(#[from] SoftDirtyError),
    /// QEMU did not hand a userfaultfd over.
    #[error(
        "QEMU hands no userfaultfd over at {} (libpageferry_qemu_preload.so is preloaded into it, with this path in \
         PAGEFERRY_USERFAULTFD)",
        .path.display()
    )]
    NotHandedOver {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// QEMU's process, or its RAM, is not what it has to be.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
}

/// How this kernel tells what another process writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// Linux 6.7 and newer.
    PagemapScan,
    /// Before that. The guest stands still for a moment whenever it is looked at, and its RAM must stay in memory.
    SoftDirty,
}

impl Tracking {
    /// The better of those that this kernel has.
    pub fn of_this_kernel() -> Result<Self, TrackingError> {
        let scan = match PagemapScan::supported() {
            Ok(()) => return Ok(Self::PagemapScan),
            Err(missing @ (PagemapError::FeatureMissing { .. } | PagemapError::NoScan(_))) => {
                missing
            }
            Err(error) => return Err(error.into()),
        };
        match SoftDirty::supported() {
            Ok(()) => Ok(Self::SoftDirty),
            Err(soft_dirty) => Err(TrackingError::Neither { scan, soft_dirty }),
        }
    }

    /// Whether the guest has to stand still while it is looked at, `with_direct_io` of its disks or without.
    pub fn needs_pulses(self, with_direct_io: bool) -> bool {
        with_direct_io || self == Self::SoftDirty
    }

    /// What sees the writes of that QEMU. A userfaultfd that it takes is handed over by QEMU at that socket, by the
    /// library that was preloaded into it; or a thread of QEMU is borrowed to make one.
    pub fn source(
        self,
        process: ForeignProcess,
        userfaultfd: Option<&Path>,
        memory: &GuestMemory,
        pulses: &Arc<QemuPulses>,
        with_direct_io: bool,
    ) -> Result<Box<dyn DirtySource>, TrackingError> {
        let pulses = Arc::clone(pulses);
        Ok(match self {
            Self::SoftDirty => Box::new(SoftDirty::new(process, memory, pulses)?),
            Self::PagemapScan => {
                let handed = userfaultfd.map(|path| {
                    handed_over(path, process.pid()).map_err(|cause| TrackingError::NotHandedOver {
                        path: path.to_owned(),
                        cause,
                    })
                });
                let handed = handed.transpose()?;
                let scan = ForeignPagemapScan::new(process, memory, |process| match handed {
                    Some(handed) => ForeignUserfaultfd::given(handed),
                    None => ForeignUserfaultfd::made_in(process),
                })?;
                if with_direct_io { Box::new(Pulsed::by(scan, pulses)) } else { Box::new(scan) }
            }
        })
    }
}

/// How often a guest stood still to be looked at, and for how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PulseStatistics {
    /// How often.
    pub count: u64,
    /// All together, from before QEMU's `stop` to after its `cont`.
    pub total: Duration,
    /// The longest.
    pub longest: Duration,
}

/// Has a guest stand still for a moment: QEMU's `stop`, which also finishes what disks have under way, and its
/// `cont`. A guest that is paused stays so.
#[derive(Debug)]
pub struct QemuPulses {
    qmp: Arc<Qmp>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Since when it stands still, if it does for this.
    since: Option<Instant>,
    statistics: PulseStatistics,
}

impl QemuPulses {
    /// Of the guest of that monitor.
    pub fn new(qmp: Arc<Qmp>) -> Self {
        Self { qmp, state: Mutex::default() }
    }

    /// What it cost so far.
    pub fn statistics(&self) -> PulseStatistics {
        self.state().statistics
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standstill for QemuPulses {
    fn hold(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        if self.qmp.run_state()?.running {
            self.state().since = Some(Instant::now());
            self.qmp.stop()?;
        }
        Ok(())
    }

    fn let_go(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut state = self.state();
        let Some(since) = state.since.take() else { return Ok(()) };
        self.qmp.cont()?;
        let took = since.elapsed();
        state.statistics.count += 1;
        state.statistics.total += took;
        state.statistics.longest = state.statistics.longest.max(took);
        Ok(())
    }
}
