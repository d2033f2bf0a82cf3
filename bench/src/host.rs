//! What this host has room for.

use pageferry_cli::outcome::Failure;
use pageferry_report::facts::available_bytes;
use pageferry_vmm::ram::{Backing, HUGE_PAGE_BYTES, RamError, check_huge_pages};

/// Whether two processes can have so much memory each. Fails with what to do about it, before
/// anything is started. Where the kernel does not say how much there is, they will find out.
pub(crate) fn check_room_for_two(memory_bytes: u64, backing: Backing) -> Result<(), Failure> {
    let needed_bytes = memory_bytes.saturating_mul(2);
    if backing == Backing::Hugetlb {
        return match check_huge_pages(needed_bytes / HUGE_PAGE_BYTES) {
            Ok(()) | Err(RamError::HugePageCounters { .. }) => Ok(()),
            Err(too_few) => Err(too_few.into()),
        };
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
