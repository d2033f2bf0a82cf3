//! What this host can do.

use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::OnceLock;

use pageferry_rust_vmm::PagemapScan;
use pageferry_vmm::guest::kvm_available;

/// "kvm" where that works, else "process", having said why.
pub(crate) fn guest_kind() -> &'static str {
    static KIND: OnceLock<&str> = OnceLock::new();
    KIND.get_or_init(|| match kvm_available() {
        Ok(()) => "kvm",
        Err(reason) => {
            loudly(&format!("guests here are threads of a process, because {reason}"));
            "process"
        }
    })
}

/// Whether process guests can be migrated here, having said why not.
pub(crate) fn process_guests_work() -> bool {
    match PagemapScan::supported() {
        Ok(()) => true,
        Err(reason) => {
            skipped(&reason.to_string());
            false
        }
    }
}

/// Whether system calls can be looked at here, having said why not.
pub(crate) fn can_trace() -> bool {
    let traces = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).status();
    let traces = traces.is_ok_and(|status| status.success());
    if !traces {
        skipped("there is no strace, or it may not trace");
    }
    traces
}

/// Says that the test that runs shows nothing here, and why.
pub(crate) fn skipped(why: &str) {
    let thread = std::thread::current();
    loudly(&format!("{} skipped, because {why}", thread.name().unwrap_or("a test")));
}

/// The harness keeps what tests print by macros to itself when they pass.
fn loudly(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).expect("write to stderr");
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB added to the pool, and given back when dropped.
pub(crate) struct HugePages {
    added: u64,
}

impl HugePages {
    /// Sees to it that so many are free. `None` when that can't be had, having said why.
    pub(crate) fn reserve(pages: u64) -> Option<Self> {
        let available_mib = meminfo("MemAvailable:") / 1024;
        if available_mib < 1024 + 2 * pages {
            skipped(&format!("only {available_mib} MiB of memory are available"));
            return None;
        }
        let before = pool();
        if let Err(error) = fs::write(POOL, (before + pages).to_string()) {
            skipped(&format!("{POOL} can't be written: {error}"));
            return None;
        }
        let reserved = Self { added: pool().saturating_sub(before) };
        if reserved.added < pages {
            skipped(&format!("{POOL} grew by {} of {pages} pages", reserved.added));
            return None;
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
