//! What this host can do.

use std::fs;
use std::sync::OnceLock;

use pageferry_rust_vmm::PagemapScan;
use pageferry_vmm::guest::kvm_available;

/// "kvm" where that works, else "process", having said why.
pub(crate) fn guest_kind() -> &'static str {
    static KIND: OnceLock<&str> = OnceLock::new();
    KIND.get_or_init(|| match kvm_available() {
        Ok(()) => "kvm",
        Err(reason) => {
            eprintln!("guests here are threads of a process, because {reason}");
            "process"
        }
    })
}

/// Whether process guests can be migrated here, having said why not.
pub(crate) fn process_guests_work() -> bool {
    match PagemapScan::supported() {
        Ok(()) => true,
        Err(reason) => {
            eprintln!("skipped, because {reason}");
            false
        }
    }
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB added to the pool, and given back when dropped.
pub(crate) struct HugePages {
    added: u64,
}

impl HugePages {
    /// Sees to it that so many are free. `None` when that can't be had, having said why.
    pub(crate) fn reserve(pages: u64) -> Option<Self> {
        let skipped = |reason: String| {
            eprintln!("skipped, because {reason}");
            None
        };
        let available_mib = meminfo("MemAvailable:") / 1024;
        if available_mib < 1024 + 2 * pages {
            return skipped(format!("only {available_mib} MiB of memory are available"));
        }
        let before = pool();
        if let Err(error) = fs::write(POOL, (before + pages).to_string()) {
            return skipped(format!("{POOL} can't be written: {error}"));
        }
        let reserved = Self { added: pool().saturating_sub(before) };
        if reserved.added < pages {
            return skipped(format!("{POOL} grew by {} of {pages} pages", reserved.added));
        }
        Some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // What stays is only memory that the system could use otherwise.
        let _ = fs::write(POOL, pool().saturating_sub(self.added).to_string());
    }
}

fn pool() -> u64 {
    fs::read_to_string(POOL).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// A line of /proc/meminfo.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}
