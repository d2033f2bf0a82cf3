//! What the guest tests share.

use std::fs;
use std::time::{Duration, Instant};

use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind, kvm_available, workload_available};
use pageferry_vmm::layout::{PAGE_BYTES, WORKING_SET};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::workload::{WorkloadConfig, WorkloadError, WorkloadKind};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub(crate) const MIB: u64 = 1 << 20;
const PAGE_LEN: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(60);

/// The kinds of guest that can run here, having said why one can't.
pub(crate) fn kinds() -> Vec<GuestKind> {
    match kvm_available() {
        Ok(()) => vec![GuestKind::Kvm, GuestKind::Process],
        Err(reason) => {
            eprintln!("KVM guests skipped, because {reason}");
            vec![GuestKind::Process]
        }
    }
}

/// The workloads that such guests can do here, having said why they can't do one.
pub(crate) fn workloads(kind: GuestKind) -> Vec<WorkloadKind> {
    let can = |workload: &WorkloadKind| match workload_available(kind, *workload) {
        Ok(()) => true,
        // That it needs virtual CPUs is no lack of this host.
        Err(WorkloadError::NeedsVirtualCpus(_)) => false,
        Err(error) => {
            eprintln!("{kind} guests with the {workload} workload skipped, because {error}");
            false
        }
    };
    WorkloadKind::ALL.into_iter().filter(can).collect()
}

pub(crate) fn config(kind: GuestKind, workload: WorkloadKind, vcpus: u8) -> GuestConfig {
    GuestConfig {
        kind,
        regions: Ram::pc_regions(16 * MIB),
        backing: Backing::Anonymous,
        vcpus,
        cpu: None,
        workload: WorkloadConfig {
            kind: workload,
            working_set_bytes: 4 * MIB,
            dirty_rate_pages_per_second: None,
            seed: 0x5eed,
        },
    }
}

pub(crate) fn booted(config: GuestConfig) -> Guest {
    let mut guest = Guest::create(config).expect("create");
    guest.boot().expect("boot");
    guest
}

/// Waits until the running guest has beaten that often more.
pub(crate) fn wait_for_beats(guest: &Guest, beats: u64) {
    let wanted = guest.heartbeat().beats + beats;
    let start = Instant::now();
    while guest.heartbeat().beats < wanted {
        assert_eq!(guest.failure(), None);
        assert!(start.elapsed() < DEADLINE, "{:?} of {wanted} beats", guest.heartbeat());
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Runs until it has beaten that often more, and pauses.
pub(crate) fn run_for_beats(guest: &mut Guest, beats: u64) {
    guest.resume().expect("resume");
    wait_for_beats(guest, beats);
    guest.pause().expect("pause");
}

pub(crate) fn assert_ok(guest: &Guest) {
    let report = guest.check_oracle();
    assert!(report.ok && report.fpu_intact, "{:?}: {report:?}", guest.config());
    assert!(guest.fpu_intact().expect("fpu"));
}

/// Copies all memory, as a migration would.
pub(crate) fn copy_memory(from: &Guest, to: &Guest) {
    let mut page = vec![0; PAGE_LEN];
    for region in from.ram().memory().iter() {
        for offset in (0..region.len()).step_by(PAGE_LEN) {
            let address = GuestAddress(region.start_addr().0 + offset);
            from.ram().memory().read_slice(&mut page, address).expect("read");
            if page.iter().any(|byte| *byte != 0) {
                to.ram().memory().write_slice(&page, address).expect("write");
            }
        }
    }
}

/// A page of the working set of a guest that is smaller than 3 GiB.
pub(crate) fn read_page(guest: &Guest, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_LEN];
    guest.ram().memory().read_slice(&mut bytes, page_address(page)).expect("read");
    bytes
}

pub(crate) fn write_page(guest: &Guest, page: u64, bytes: &[u8]) {
    guest.ram().memory().write_slice(bytes, page_address(page)).expect("write");
}

fn page_address(page: u64) -> GuestAddress {
    GuestAddress(WORKING_SET + page * PAGE_BYTES)
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages added to the pool for a test, if that is allowed and there is room.
pub(crate) struct HugePages(u64);

impl HugePages {
    pub(crate) fn reserve(pages: u64) -> Self {
        let before = Self::pool();
        if let Err(error) = fs::write(HUGE_PAGES, (before + pages).to_string()) {
            eprintln!("no huge pages were added, because {HUGE_PAGES} can't be written: {error}");
        }
        Self(Self::pool().saturating_sub(before))
    }

    fn pool() -> u64 {
        fs::read_to_string(HUGE_PAGES).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.0 > 0 {
            // What stays is only memory the system could use otherwise.
            let _ = fs::write(HUGE_PAGES, Self::pool().saturating_sub(self.0).to_string());
        }
    }
}
