//! The machine that something was measured on.

use std::fs;
use std::thread;

use serde::{Deserialize, Serialize};

/// What a transport can do here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportFacts {
    /// Its name.
    pub name: String,
    /// What it says of itself, in words, or why it is not available.
    pub can: String,
    /// Whether it is available.
    pub available: bool,
    /// Whether it is not since something failed; else this machine does not have it, or forbids it.
    #[serde(default)]
    pub failed: bool,
}

/// The machine. What it does not tell is an empty text or 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Version of the program.
    pub version: String,
    /// Model of the CPU.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Memory.
    pub memory_bytes: u64,
    /// When anonymous memory gets huge pages: "always", "madvise" or "never".
    pub thp: String,
    /// The same of shared memory.
    pub thp_shmem: String,
    /// Huge pages of 2 MiB that are reserved.
    pub huge_pages: u64,
    /// Tasks that ran or wanted to, the mean of the minute before.
    pub load_average: String,
    /// Transports.
    pub transports: Vec<TransportFacts>,
}

impl Facts {
    /// Of this machine. What transports can do, who calls knows.
    pub fn here(transports: Vec<TransportFacts>) -> Self {
        let huge = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        let thp = "/sys/kernel/mm/transparent_hugepage";
        let load = read("/proc/loadavg");
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease"),
            memory_bytes: meminfo("MemTotal").unwrap_or(0),
            thp: chosen(&read(&format!("{thp}/enabled"))),
            thp_shmem: chosen(&read(&format!("{thp}/shmem_enabled"))),
            huge_pages: read(huge).parse().unwrap_or(0),
            load_average: load.split_whitespace().next().unwrap_or_default().to_owned(),
            transports,
        }
    }
}

/// All memory and swap of this machine, used or not. `None` where it does not tell.
pub fn memory_and_swap_bytes() -> Option<u64> {
    Some(meminfo("MemTotal")?.saturating_add(meminfo("SwapTotal").unwrap_or(0)))
}

/// Swap that nobody uses. `None` where the machine does not tell.
pub fn free_swap_bytes() -> Option<u64> {
    meminfo("SwapFree")
}

/// Memory that can be had without swapping. `None` where the machine does not tell.
pub fn available_bytes() -> Option<u64> {
    meminfo("MemAvailable")
}

fn meminfo(name: &str) -> Option<u64> {
    kib_bytes(&field(&read("/proc/meminfo"), name))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The first "name : value".
fn field(text: &str, name: &str) -> String {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

/// "  1024 kB", as the kernel writes sizes, in bytes.
pub fn kib_bytes(value: &str) -> Option<u64> {
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The word in brackets of `always [madvise] never`.
fn chosen(text: &str) -> String {
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or_else(String::new, |(word, _)| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        assert_eq!(
            field("processor\t: 0\nmodel name\t: A CPU: fast\n", "model name"),
            "A CPU: fast"
        );
        assert_eq!(field("", "model name"), "");
        assert_eq!(kib_bytes("  2048 kB"), Some(2 << 20));
        assert_eq!(kib_bytes("many"), None);
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen(""), "");
        let here = Facts::here(Vec::new());
        assert!(memory_and_swap_bytes() >= Some(here.memory_bytes));
        assert!(here.cpus > 0 && here.memory_bytes > 0 && !here.kernel.is_empty(), "{here:?}");
    }
}
