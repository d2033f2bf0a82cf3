//! What this host has room for.

use std::fs;
use std::path::Path;

use pageferry_cli::outcome::Failure;
use pageferry_vmm::ram::{Backing, RamError};

const HUGE_PAGE_BYTES: u64 = 2 << 20;
const HUGE_PAGE_COUNTERS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Whether two processes can have so much memory each. Fails with what to do about it, before
/// anything is started. Where the kernel does not say how much there is, they will find out.
pub(crate) fn check_room_for_two(memory_bytes: u64, backing: Backing) -> Result<(), Failure> {
    let needed_bytes = memory_bytes.saturating_mul(2);
    if backing == Backing::Hugetlb {
        let counters = ["free_hugepages", "resv_hugepages", "nr_hugepages"].map(counter);
        let [Some(free), Some(reserved), Some(total_pages)] = counters else { return Ok(()) };
        let needed_pages = needed_bytes / HUGE_PAGE_BYTES;
        let available_pages = free.saturating_sub(reserved);
        if available_pages < needed_pages {
            return Err(Box::new(RamError::NotEnoughHugePages {
                needed_pages,
                available_pages,
                total_pages,
            }));
        }
        return Ok(());
    }
    match available_bytes() {
        Some(available_bytes) if available_bytes < needed_bytes => Err(format!(
            "failed to find room for both sides: they need {needed_bytes} bytes and \
             {available_bytes} are available; give less --memory"
        )
        .into()),
        _ => Ok(()),
    }
}

fn counter(name: &str) -> Option<u64> {
    fs::read_to_string(Path::new(HUGE_PAGE_COUNTERS).join(name)).ok()?.trim().parse().ok()
}

/// Memory that can be had without swapping.
pub(crate) fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    text.lines().find_map(|line| kib_bytes(line.strip_prefix("MemAvailable:")?))
}

/// "  1024 kB" in bytes.
pub(crate) fn kib_bytes(value: &str) -> Option<u64> {
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
