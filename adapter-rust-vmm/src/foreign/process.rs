//! Another process, and where it has guest memory mapped.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pageferry::memory::{GuestMemory, PAGE_BYTES, RawRegion};
use procfs::process::{MMPermissions, MemoryMap, Process, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{major, minor};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::error::ForeignError;
use crate::addresses::Mapped;

/// Another process, held so that its number cannot come to mean another one.
///
/// # Thread safety
///
/// `Send` and `Sync`; it only reads.
#[derive(Debug)]
pub struct ForeignProcess {
    pid: u32,
    pidfd: OwnedFd,
}

impl ForeignProcess {
    /// The process with that number now.
    pub fn open(pid: u32) -> Result<Self, ForeignError> {
        let found = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let opened = found.ok_or(rustix::io::Errno::SRCH);
        let pidfd = opened
            .and_then(|found| pidfd_open(found, PidfdFlags::empty()))
            .map_err(|cause| ForeignError::Open { pid, cause: cause.into() })?;
        Ok(Self { pid, pidfd })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// That it has not ended. A process that has ended writes nothing, and its page tables, which are gone,
    /// say so.
    pub fn check_alive(&self) -> Result<(), ForeignError> {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ended = loop {
            match poll(&mut polled, Some(&Timespec::default())) {
                Ok(events) => break events != 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(cause) => {
                    return Err(ForeignError::Open { pid: self.pid, cause: cause.into() });
                }
            }
        };
        if ended { Err(ForeignError::Ended { pid: self.pid }) } else { Ok(()) }
    }

    /// Whether it has mapped a file so that it can write to it for all who have.
    pub fn can_write(&self, file: &Metadata) -> Result<bool, ForeignError> {
        let failed = |cause| ForeignError::Proc { pid: self.pid, file: "maps", cause };
        let maps = self.procfs().and_then(|process| process.maps()).map_err(failed)?;
        self.check_alive()?;
        let wanted = MMPermissions::WRITE | MMPermissions::SHARED;
        Ok(maps.into_iter().any(|map| map.perms.contains(wanted) && is_of(&map, file)))
    }

    /// A file of /proc of it. It is its own as long as the process lives, which is to be checked afterwards.
    pub(super) fn proc_path(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.pid)
    }

    pub(super) fn pagemap(&self) -> Result<File, ForeignError> {
        let opened = File::open(self.proc_path("pagemap"))
            .map_err(|cause| self.not_permitted_or(cause, "open the page map"))?;
        self.check_alive()?;
        Ok(opened)
    }

    /// What of `memory` the process can write to, which must be all of it.
    pub(crate) fn mapped(&self, memory: &GuestMemory) -> Result<Vec<Mapped>, ForeignError> {
        let failed = |cause| ForeignError::Proc { pid: self.pid, file: "maps", cause };
        let process = self.procfs().map_err(failed)?;
        let maps = process.maps().map_err(failed)?.0;
        self.check_alive()?;
        let mut mapped = Vec::new();
        for (index, region) in (0..).zip(memory.regions()) {
            mapped.extend(self.mapped_region(index, region, &maps)?);
        }
        Ok(mapped)
    }

    fn mapped_region(
        &self,
        index: u16,
        region: &RawRegion,
        maps: &[MemoryMap],
    ) -> Result<Vec<Mapped>, ForeignError> {
        let guest_addr = region.layout.guest_addr;
        let backing = region.file.ok_or(ForeignError::NoFile { guest_addr })?;
        // By its link in /proc, for the descriptor belongs to the memory.
        let file = std::fs::metadata(format!("/proc/self/fd/{}", backing.fd))
            .map_err(|cause| ForeignError::File { guest_addr, cause })?;
        let wanted = backing.offset_bytes..backing.offset_bytes + region.layout.len_bytes;
        let mut mapped = Vec::new();
        for map in maps.iter().filter(|map| is_of(map, &file)) {
            let (start, end) = map.address;
            let from = map.offset.max(wanted.start);
            let to = (map.offset + (end - start)).min(wanted.end);
            if from >= to || !map.perms.contains(MMPermissions::WRITE) {
                continue;
            }
            if !map.perms.contains(MMPermissions::SHARED) {
                return Err(ForeignError::Private { pid: self.pid, guest_addr });
            }
            mapped.push(Mapped {
                region: index,
                first_page: (from - wanted.start) / PAGE_BYTES,
                addresses: start + (from - map.offset)..start + (to - map.offset),
                backing_page_bytes: region.layout.backing_page_bytes,
                guest_addr,
            });
        }
        match first_gap(&mapped, region.layout.pages()) {
            None => Ok(mapped),
            Some(missing) => Err(ForeignError::NotMapped { pid: self.pid, guest_addr, missing }),
        }
    }

    pub(super) fn procfs(&self) -> Result<Process, procfs::ProcError> {
        // It was made from an i32.
        Process::new(i32::try_from(self.pid).unwrap_or(i32::MAX))
    }

    /// An error with what would help against it, if that is a lack of permission.
    pub(super) fn not_permitted_or(
        &self,
        cause: io::Error,
        operation: &'static str,
    ) -> ForeignError {
        let pid = self.pid;
        if let Err(ended) = self.check_alive() {
            return ended;
        }
        if cause.kind() != io::ErrorKind::PermissionDenied {
            return ForeignError::Trace { pid, operation, cause };
        }
        ForeignError::NotPermitted { pid, needed: self.needed(), cause }
    }

    /// What it takes to trace the process, by what stands in the way.
    fn needed(&self) -> String {
        let status = self.procfs().and_then(|process| process.status());
        if let Ok(status) = &status
            && status.tracerpid != 0
        {
            return format!("process {} traces it already (a debugger?)", status.tracerpid);
        }
        let mut needed = String::from("it takes CAP_SYS_PTRACE");
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let scope = scope.map_or_else(|_| String::from("0"), |scope| scope.trim().to_owned());
        match (&*scope, status) {
            ("3", _) => {
                "kernel.yama.ptrace_scope is 3: nobody may trace until this host boots again"
                    .clone_into(&mut needed);
            }
            ("2", _) => {}
            ("0", Ok(status)) if is_own(&status) => needed.push_str(
                ", since it has privileges that this process lacks, or a security module forbids it",
            ),
            (scope, Ok(status)) if is_own(&status) => {
                needed.push_str(", or kernel.yama.ptrace_scope 0 (it is ");
                needed.push_str(scope);
                needed.push(')');
            }
            (_, Ok(status)) => {
                needed.push_str(", or to be its user, number ");
                needed.push_str(&status.ruid.to_string());
            }
            (_, Err(_)) => {}
        }
        needed
    }
}

impl AsFd for ForeignProcess {
    /// Its pidfd.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Whether a process is of the same user as this one.
fn is_own(status: &Status) -> bool {
    status.ruid == rustix::process::getuid().as_raw()
}

fn is_of(map: &MemoryMap, file: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = (i64::from(major(file.dev())), i64::from(minor(file.dev())));
    let (map_major, map_minor) = map.dev;
    map.inode == file.ino() && device == (map_major.into(), map_minor.into())
}

/// The first pages of a region that are nowhere in what is mapped.
fn first_gap(mapped: &[Mapped], pages: u64) -> Option<Range<u64>> {
    let mut ranges: Vec<_> = mapped
        .iter()
        .map(|part| {
            let len = part.addresses.end - part.addresses.start;
            part.first_page..part.first_page + len / PAGE_BYTES
        })
        .collect();
    ranges.sort_by_key(|range| range.start);
    let mut covered = 0;
    for range in ranges {
        if range.start > covered {
            return Some(covered..range.start);
        }
        covered = covered.max(range.end);
    }
    (covered < pages).then_some(covered..pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(pages: &[(u64, u64)]) -> Vec<Mapped> {
        let part = |(start, end): &(u64, u64)| Mapped {
            region: 0,
            first_page: *start,
            addresses: start * PAGE_BYTES..end * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
            guest_addr: 0,
        };
        pages.iter().map(part).collect()
    }

    #[test]
    fn the_first_gap_is_found() {
        assert_eq!(first_gap(&[], 8), Some(0..8));
        assert_eq!(first_gap(&mapped(&[(0, 8)]), 8), None);
        assert_eq!(first_gap(&mapped(&[(4, 8), (0, 4)]), 8), None);
        assert_eq!(first_gap(&mapped(&[(0, 6), (2, 8), (1, 3)]), 8), None);
        assert_eq!(first_gap(&mapped(&[(0, 2), (3, 8)]), 8), Some(2..3));
        assert_eq!(first_gap(&mapped(&[(1, 8)]), 8), Some(0..1));
        assert_eq!(first_gap(&mapped(&[(0, 7)]), 8), Some(7..8));
    }

    #[test]
    fn who_is_not_there_is_not_opened() {
        for pid in [0, u32::MAX, i32::MAX.unsigned_abs()] {
            let refused = ForeignProcess::open(pid).unwrap_err();
            assert!(matches!(refused, ForeignError::Open { .. }), "{refused}");
        }
    }
}
