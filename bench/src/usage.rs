//! What a transfer costs this process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry_cli::cpu;
use pageferry_report::facts::kib_bytes;

/// CPU time of all threads of this process so far, user and system, in nanoseconds.
pub(crate) fn process_cpu_nanoseconds() -> u64 {
    nanoseconds(cpu::time_of_process())
}

/// The same of the calling thread alone.
pub(crate) fn thread_cpu_nanoseconds() -> u64 {
    nanoseconds(cpu::time_of_thread())
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// CPU time between two moments that different pieces of code see. The first mark of each counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct CpuWindow(Arc<[OnceLock<u64>; 2]>);

impl CpuWindow {
    pub(crate) fn begin(&self) {
        self.0[0].get_or_init(process_cpu_nanoseconds);
    }

    pub(crate) fn end(&self) {
        self.0[1].get_or_init(process_cpu_nanoseconds);
    }

    pub(crate) fn nanoseconds(&self) -> u64 {
        let begin = self.0[0].get().copied().unwrap_or(0);
        self.0[1].get().map_or(0, |end| end.saturating_sub(begin))
    }
}

/// How far the resident set grows from its making on, apart from guest memory.
#[derive(Debug)]
pub(crate) struct Growth {
    guest: Vec<Range<u64>>,
    /// What was resident at the beginning and is not guest memory.
    before: Option<u64>,
}

impl Growth {
    pub(crate) fn watch(memory: &GuestMemory) -> Self {
        let guest = memory
            .regions()
            .iter()
            .map(|region| {
                let start = region.host_addr.addr() as u64;
                start..start + region.layout.len_bytes
            })
            .collect();
        let mut growth = Self { guest, before: None };
        // See proc_pid_clear_refs(5): resets the peak to what is resident now.
        if fs::write("/proc/self/clear_refs", "5").is_ok() {
            growth.before = growth.apart_from_guest("VmRSS:");
        }
        growth
    }

    /// In bytes; `None` where the kernel does not tell.
    pub(crate) fn peak_bytes(&self) -> Option<u64> {
        Some(self.apart_from_guest("VmHWM:")?.saturating_sub(self.before?))
    }

    fn apart_from_guest(&self, name: &str) -> Option<u64> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let resident = status.lines().find_map(|line| kib_bytes(line.strip_prefix(name)?))?;
        let smaps = BufReader::new(File::open("/proc/self/smaps").ok()?);
        Some(resident.saturating_sub(resident_in(smaps, &self.guest)?))
    }
}

/// Resident bytes of the mappings inside `ranges`. Huge pages of hugetlb are not resident, here
/// as in /proc/self/status.
fn resident_in(smaps: impl BufRead, ranges: &[Range<u64>]) -> Option<u64> {
    let mut inside = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        let line = line.ok()?;
        if let Some(start) = mapping_start(&line) {
            inside = ranges.iter().any(|range| range.contains(&start));
        } else if inside && let Some(value) = line.strip_prefix("Rss:") {
            bytes += kib_bytes(value)?;
        }
    }
    Some(bytes)
}

/// If the line is the first one of a mapping.
fn mapping_start(line: &str) -> Option<u64> {
    let (start, _) = line.split_ascii_whitespace().next()?.split_once('-')?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_guest_mappings_are_counted() {
        let smaps = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Rss:                 100 kB
7f0000200000-7f0000600000 rw-s 00000000 00:0f 1234   /memfd:x (deleted)
Size:               4096 kB
Rss:                   8 kB
VmFlags: rd wr sh
7f0000600000-7f0000700000 rw-p 00000000 00:00 0
Rss:                   4 kB
";
        let guest = 0x7f00_0020_0000..0x7f00_0060_0000;
        assert_eq!(resident_in(smaps.as_bytes(), &[guest]), Some(8 * 1024));
    }

    #[test]
    fn marks_are_set_once() {
        let window = CpuWindow::default();
        window.begin();
        window.end();
        let once = window.nanoseconds();
        window.end();
        assert_eq!(window.nanoseconds(), once);
    }
}
