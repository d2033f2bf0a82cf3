//! Slows a guest down by the CPU quota of control groups that its vCPUs are in.
//!
//! QEMU throttles vCPUs for migrations of its own alone. The kernel does it for anybody: a group's threads get so
//! many microseconds of CPU time in each period, and wait for the next one then. See the kernel's
//! `Documentation/admin-guide/cgroup-v2.rst`, *cpu.max*, and `Documentation/scheduler/sched-bwc.rst`.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Of a group of either version.
const FILES: [&str; 2] = ["cpu.max", "cpu.cfs_quota_us"];
/// The kernel takes no less.
const LEAST_US: u64 = 1000;

/// Why a guest cannot be slowed down by a group.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QuotaError {
    /// The folder is none of a group that has a quota.
    #[error(
        "{} is no control group with a CPU quota: neither cpu.max nor cpu.cfs_quota_us is there",
        .group.display()
    )]
    NoQuota {
        /// What was given.
        group: PathBuf,
    },
    /// A file of it could not be used.
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
    /// A file says what it should not.
    #[error("{} says {contents:?}, which is no quota", .path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// What it says.
        contents: String,
    },
    /// Some vCPUs would go on as before.
    #[error(
        "these threads are vCPUs of the guest and in none of the control groups given: {}",
        .threads.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Elsewhere {
        /// The kernel's numbers of them.
        threads: Vec<u32>,
    },
}

/// A file of a group, and what it said before anything was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// The file.
    pub path: PathBuf,
    /// All that is to be written for it to be as it was.
    pub contents: String,
}

impl Before {
    /// Writes it back. A group that is gone needs none, and no other file is written than one of a quota: a
    /// record may say anything.
    pub fn restore(&self) -> Result<(), QuotaError> {
        if !FILES.iter().any(|name| self.path.ends_with(name)) {
            let (path, contents) = (self.path.clone(), self.contents.clone());
            return Err(QuotaError::Malformed { path, contents });
        }
        match write(&self.path, &self.contents) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            written => written.map_err(failed("write", &self.path)),
        }
    }
}

/// The groups of a guest's vCPUs. `Send` and `Sync`. Dropping it gives them back what they had.
#[derive(Debug)]
pub struct Quotas {
    groups: Vec<Group>,
    is_lowered: bool,
}

impl Quotas {
    /// Of these folders, for these threads, which are the guest's vCPUs.
    pub fn new(folders: &[PathBuf], vcpus: &[u32]) -> Result<Self, QuotaError> {
        let mut left: HashSet<_> = vcpus.iter().copied().collect();
        let mut groups = Vec::new();
        for folder in folders {
            let (quota, members) = Quota::of(folder)?;
            let own = members.iter().filter(|member| left.remove(member)).count();
            groups.push(Group::new(quota, own as u64));
        }
        if !left.is_empty() {
            let mut threads: Vec<_> = left.into_iter().collect();
            threads.sort_unstable();
            return Err(QuotaError::Elsewhere { threads });
        }
        Ok(Self { groups, is_lowered: false })
    }

    /// What is to be written back, should nobody be left to do so.
    pub fn before(&self) -> Vec<Before> {
        self.groups.iter().map(|group| group.quota.before.clone()).collect()
    }

    /// Takes so many percent (1 to 99) of their time away from the vCPUs. 0 gives back what was taken, and
    /// changes nothing where nothing was.
    pub fn lower(&mut self, percent: u8) -> Result<(), QuotaError> {
        if percent == 0 {
            if !self.is_lowered {
                return Ok(());
            }
            // All of them, whatever comes of one.
            let restored: Vec<_> =
                self.groups.iter().map(|group| group.quota.before.restore()).collect();
            restored.into_iter().collect::<Result<(), _>>()?;
            self.is_lowered = false;
            return Ok(());
        }
        self.is_lowered = true;
        self.groups.iter().try_for_each(|group| group.lower(percent))
    }
}

impl Drop for Quotas {
    fn drop(&mut self) {
        for group in self.groups.iter().filter(|_| self.is_lowered) {
            if let Err(error) = group.quota.before.restore() {
                tracing::error!(%error, "a control group may still be slowed down");
            }
        }
    }
}

#[derive(Debug)]
struct Group {
    quota: Quota,
    /// What its vCPUs may take at full speed, in each period.
    full_us: u64,
}

impl Group {
    fn new(quota: Quota, vcpus: u64) -> Self {
        let all = vcpus.saturating_mul(quota.period_us);
        let full_us = quota.limit_us.map_or(all, |limit| limit.min(all));
        Self { quota, full_us }
    }

    fn lower(&self, percent: u8) -> Result<(), QuotaError> {
        let left = u64::from(100 - percent.min(99));
        // A group without vCPUs of this guest is none of our business.
        if self.full_us == 0 {
            return Ok(());
        }
        let quota_us = (self.full_us.saturating_mul(left) / 100).max(LEAST_US);
        let Quota { before, period_us, is_unified, .. } = &self.quota;
        let contents =
            if *is_unified { format!("{quota_us} {period_us}") } else { quota_us.to_string() };
        write(&before.path, &contents).map_err(failed("write", &before.path))
    }
}

/// What a group has, in microseconds.
#[derive(Debug)]
struct Quota {
    before: Before,
    /// `None` if it may take all there is.
    limit_us: Option<u64>,
    period_us: u64,
    /// Of the second kind, where quota and period are one file.
    is_unified: bool,
}

impl Quota {
    /// With the group's threads.
    fn of(group: &Path) -> Result<(Self, Vec<u32>), QuotaError> {
        let unified = group.join("cpu.max");
        let is_unified = unified.exists();
        let path = if is_unified { unified } else { group.join("cpu.cfs_quota_us") };
        if !path.exists() {
            return Err(QuotaError::NoQuota { group: group.to_owned() });
        }
        let contents = read(&path)?;
        let malformed = || QuotaError::Malformed { path: path.clone(), contents: contents.clone() };
        let (limit, period) = if is_unified {
            contents.split_once(' ').map(|(limit, period)| (limit.to_owned(), period.to_owned()))
        } else {
            Some((contents.clone(), read(&group.join("cpu.cfs_period_us"))?))
        }
        .ok_or_else(malformed)?;
        let limit_us = match &*limit {
            "max" | "-1" => None,
            limit => Some(limit.parse().map_err(|_| malformed())?),
        };
        let period_us = period.parse().map_err(|_| malformed())?;
        let threads = read(&group.join(if is_unified { "cgroup.threads" } else { "tasks" }))?;
        let members = threads.lines().filter_map(|thread| thread.parse().ok()).collect();
        let before = Before { path, contents };
        Ok((Self { before, limit_us, period_us, is_unified }, members))
    }
}

/// To a file that is there.
fn write(path: &Path, contents: &str) -> io::Result<()> {
    File::options().write(true).truncate(true).open(path)?.write_all(contents.as_bytes())
}

fn read(path: &Path) -> Result<String, QuotaError> {
    let contents = fs::read_to_string(path).map_err(failed("read", path))?;
    Ok(contents.trim_end().to_owned())
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> QuotaError {
    let path = path.to_owned();
    move |cause| QuotaError::File { operation, path, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with files of these names.
    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            fs::write(folder.path().join(name), contents).unwrap();
        }
        folder
    }

    fn unified(max: &str, threads: &str) -> tempfile::TempDir {
        group(&[("cpu.max", max), ("cgroup.threads", threads)])
    }

    fn folders(groups: &[&tempfile::TempDir]) -> Vec<PathBuf> {
        groups.iter().map(|group| group.path().to_owned()).collect()
    }

    #[test]
    fn both_kinds_of_groups_are_lowered_and_get_back_what_they_had() {
        let one = unified("max 100000\n", "7\n8\n9\n");
        let other = group(&[
            ("cpu.cfs_quota_us", "30000\n"),
            ("cpu.cfs_period_us", "50000\n"),
            ("tasks", "10\n"),
        ]);
        let mut quotas = Quotas::new(&folders(&[&one, &other]), &[7, 9, 10]).unwrap();
        // What somebody else changes meanwhile is left alone as long as nothing was lowered.
        fs::write(one.path().join("cpu.max"), "50000 100000").unwrap();
        quotas.lower(0).unwrap();
        assert_eq!(fs::read(one.path().join("cpu.max")).unwrap(), b"50000 100000");
        let said = || {
            let one = fs::read_to_string(one.path().join("cpu.max")).unwrap();
            (one, fs::read_to_string(other.path().join("cpu.cfs_quota_us")).unwrap())
        };
        let lowered = |one: &str, other: &str| (one.to_owned(), other.to_owned());
        quotas.lower(20).unwrap();
        assert_eq!(said(), lowered("160000 100000", "24000"));
        quotas.lower(99).unwrap();
        assert_eq!(said(), lowered("2000 100000", "1000"));
        quotas.lower(0).unwrap();
        assert_eq!(said(), lowered("max 100000", "30000"));
        quotas.lower(50).unwrap();
        drop(quotas);
        assert_eq!(said(), lowered("max 100000", "30000"));
    }

    #[test]
    fn what_would_slow_nobody_down_is_refused() {
        let none = group(&[]);
        let error = Quotas::new(&folders(&[&none]), &[7]).unwrap_err();
        assert!(matches!(error, QuotaError::NoQuota { .. }), "{error}");
        for max in ["", "max", "fast 100000", "-5 100000", "100000 fast"] {
            let wrong = unified(max, "7");
            let error = Quotas::new(&folders(&[&wrong]), &[7]).unwrap_err();
            assert!(matches!(error, QuotaError::Malformed { .. }), "{max:?}: {error}");
        }
        let one = unified("max 100000", "7\n8\n");
        let error = Quotas::new(&folders(&[&one]), &[7, 21, 20]).unwrap_err();
        assert!(error.to_string().ends_with("groups given: 20, 21"), "{error}");
        let without_threads = group(&[("cpu.max", "max 100000")]);
        let error = Quotas::new(&folders(&[&without_threads]), &[7]).unwrap_err();
        assert!(matches!(error, QuotaError::File { operation: "read", .. }), "{error}");
    }

    /// One cannot be written. The others get theirs nevertheless, and that one as soon as it can be.
    #[test]
    fn what_could_not_be_given_back_is_given_back_later() {
        let (one, other) = (unified("max 100000", "7"), unified("max 100000", "8"));
        let mut quotas = Quotas::new(&folders(&[&one, &other]), &[7, 8]).unwrap();
        quotas.lower(50).unwrap();
        let path = one.path().join("cpu.max");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        quotas.lower(0).unwrap_err();
        assert_eq!(fs::read(other.path().join("cpu.max")).unwrap(), b"max 100000");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "50000 100000").unwrap();
        drop(quotas);
        assert_eq!(fs::read(&path).unwrap(), b"max 100000");
    }

    #[test]
    fn nothing_else_is_written_whatever_a_record_says() {
        let folder = group(&[("passwd", "root")]);
        let before = Before { path: folder.path().join("passwd"), contents: "nobody".into() };
        let error = before.restore().unwrap_err();
        assert!(matches!(error, QuotaError::Malformed { .. }), "{error}");
        assert_eq!(fs::read(&before.path).unwrap(), b"root");
    }

    #[test]
    fn a_group_that_is_gone_needs_nothing_back() {
        let one = unified("max 100000", "7");
        let quotas = Quotas::new(&folders(&[&one]), &[7]).unwrap();
        let [before] = &*quotas.before() else { panic!("one file") };
        drop(one);
        before.restore().unwrap();
    }
}
