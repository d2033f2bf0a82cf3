//! Whether this host has room for a guest.
//!
//! Where it has not, a guest that was accepted all the same ends the destination in the middle of the migration: the
//! kernel kills a process that has no memory left, be it the machine's or its control group's
//! (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, cgroup-v1/hugetlb.rst).

use std::fs;
use std::path::{Component, Path, PathBuf};

use pageferry_report::facts::{free_swap_bytes, memory_and_swap_bytes};
use procfs::process::Process;

/// There is less memory than the guest has.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoRoom {
    /// In all of this machine.
    #[error(
        "the source has {guest_bytes} bytes of guest memory, and this machine {here_bytes} of memory and swap"
    )]
    Machine {
        /// The guest's.
        guest_bytes: u64,
        /// Memory and swap here, used or not.
        here_bytes: u64,
    },
    /// In a control group that this process is in.
    #[error(
        "the source has {guest_bytes} bytes of guest memory, and of {limit_bytes} that this process may have {left_bytes} \
         are left ({})",
        .file.display()
    )]
    Group {
        /// The guest's.
        guest_bytes: u64,
        /// What the group has not used, or could give back.
        left_bytes: u64,
        /// What it may have.
        limit_bytes: u64,
        /// The file that says so.
        file: PathBuf,
    },
}

/// Whether there may be room for a guest of so many bytes, in huge pages of that size or in others. What will be freed
/// is not known, so that it is refused only where it certainly does not fit.
pub fn check(guest_bytes: u64, huge_page_bytes: Option<u64>) -> Result<(), NoRoom> {
    if let Some(here_bytes) = memory_and_swap_bytes()
        && guest_bytes > here_bytes
    {
        return Err(NoRoom::Machine { guest_bytes, here_bytes });
    }
    let (left, swap_bytes) = match huge_page_bytes {
        None => (least(&groups("memory"), &Limit::of_memory()), free_swap_bytes().unwrap_or(0)),
        Some(bytes) => (least(&groups("hugetlb"), &Limit::of_huge_pages(bytes)), 0),
    };
    let Some(Left { bytes, limit_bytes, file }) = left else { return Ok(()) };
    let left_bytes = bytes.saturating_add(swap_bytes);
    if guest_bytes <= left_bytes {
        return Ok(());
    }
    Err(NoRoom::Group { guest_bytes, left_bytes, limit_bytes, file })
}

/// The names of a limit's files in a control group.
#[derive(Debug)]
struct Limit {
    most: String,
    used: String,
    /// A file with what is used and could be given back at once, and the lines of it that tell.
    given_back: Option<(&'static str, [&'static str; 2])>,
}

impl Limit {
    /// Of both versions of control groups.
    fn of_memory() -> [Self; 2] {
        // Pages of files, which the page cache can do without; those of shared memory are not among them.
        let second = ("memory.stat", ["active_file", "inactive_file"]);
        let first = ("memory.stat", ["total_active_file", "total_inactive_file"]);
        let limit = |most: &str, used: &str, given_back| Self {
            most: format!("memory.{most}"),
            used: format!("memory.{used}"),
            given_back: Some(given_back),
        };
        [limit("max", "current", second), limit("limit_in_bytes", "usage_in_bytes", first)]
    }

    /// Of pages in use, and of those that were promised to a mapping.
    fn of_huge_pages(bytes: u64) -> [Self; 4] {
        let size = if bytes < 1 << 30 {
            format!("{}MB", bytes >> 20)
        } else {
            format!("{}GB", bytes >> 30)
        };
        let limit = |most: &str, used: &str| Self {
            most: format!("hugetlb.{size}.{most}"),
            used: format!("hugetlb.{size}.{used}"),
            given_back: None,
        };
        [
            limit("max", "current"),
            limit("rsvd.max", "rsvd.current"),
            limit("limit_in_bytes", "usage_in_bytes"),
            limit("rsvd.limit_in_bytes", "rsvd.usage_in_bytes"),
        ]
    }

    /// What is left of it in a group that has it.
    fn left(&self, group: &Path) -> Option<Left> {
        let file = group.join(&self.most);
        // The second version writes "max" where there is no limit.
        let limit_bytes = number(&file)?;
        let used = number(&group.join(&self.used))?;
        let given_back = self.given_back.map_or(0, |(file, lines)| {
            let text = fs::read_to_string(group.join(file)).unwrap_or_default();
            let value = |line: &str| {
                let (name, value) = line.split_once(' ')?;
                lines.contains(&name).then(|| value.trim().parse().ok())?
            };
            text.lines().filter_map(value).fold(0, u64::saturating_add)
        });
        let bytes = limit_bytes.saturating_sub(used.saturating_sub(given_back));
        Some(Left { bytes, limit_bytes, file })
    }
}

/// What is left of a limit.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    bytes: u64,
    limit_bytes: u64,
    file: PathBuf,
}

fn least(groups: &[PathBuf], limits: &[Limit]) -> Option<Left> {
    let all = groups.iter().flat_map(|group| limits.iter().filter_map(|limit| limit.left(group)));
    all.min_by_key(|left| left.bytes)
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The folders of the groups that this process is in, and of those above them, where they have that controller.
fn groups(controller: &str) -> Vec<PathBuf> {
    let found = || {
        let process = Process::myself().ok()?;
        let (groups, mounts) = (process.cgroups().ok()?, process.mountinfo().ok()?);
        let folders = groups.0.iter().filter_map(|group| {
            let is_second = group.hierarchy == 0;
            if !is_second && !group.controllers.iter().any(|name| name == controller) {
                return None;
            }
            let mount = mounts.0.iter().find(|mount| {
                let kind = if is_second { "cgroup2" } else { "cgroup" };
                mount.fs_type == kind && (is_second || mount.super_options.contains_key(controller))
            })?;
            Some(from_top(&mount.mount_point, &mount.root, &group.pathname))
        });
        Some(folders.flatten().collect())
    };
    found().unwrap_or_default()
}

/// A group's folder and all above it, as far as they can be seen below the mount of `root`.
fn from_top(mount: &Path, root: &str, group: &str) -> Vec<PathBuf> {
    let below = Path::new(group).strip_prefix(root).unwrap_or(Path::new(""));
    let mut folders = vec![mount.to_owned()];
    for part in below.components() {
        // What lies beside a container's own root is not seen in it.
        let Component::Normal(part) = part else { break };
        let deeper = folders[folders.len() - 1].join(part);
        folders.push(deeper);
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files.
    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            fs::write(folder.path().join(name), contents).unwrap();
        }
        folder
    }

    fn left(files: &[(&str, &str)], limits: &[Limit]) -> Option<(u64, u64)> {
        let group = group(files);
        let left = least(&[group.path().to_owned()], limits)?;
        Some((left.bytes, left.limit_bytes))
    }

    #[test]
    fn memory_that_a_group_may_still_have() {
        let memory = Limit::of_memory();
        let stat = "anon 300\nfile 150\ninactive_file 70\nactive_file 30\nshmem 50\n";
        let second = [("memory.max", "1000\n"), ("memory.current", "400\n"), ("memory.stat", stat)];
        assert_eq!(left(&second, &memory), Some((700, 1000)));
        let none = [("memory.max", "max\n"), ("memory.current", "400\n")];
        assert_eq!(left(&none, &memory), None);
        let stat = "cache 9\nactive_file 9\ntotal_active_file 40\ntotal_inactive_file 60\n";
        let first = [
            ("memory.limit_in_bytes", "1000\n"),
            ("memory.usage_in_bytes", "1200\n"),
            ("memory.stat", stat),
        ];
        assert_eq!(left(&first, &memory), Some((0, 1000)));
    }

    #[test]
    fn huge_pages_that_a_group_may_still_have() {
        let pages = Limit::of_huge_pages(2 << 20);
        let files = [
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.rsvd.max", "8388608\n"),
            ("hugetlb.2MB.rsvd.current", "2097152\n"),
            ("hugetlb.1GB.max", "0\n"),
            ("hugetlb.1GB.current", "0\n"),
        ];
        assert_eq!(left(&files, &pages), Some((6 << 20, 8 << 20)));
        assert_eq!(left(&files, &Limit::of_huge_pages(1 << 30)), Some((0, 0)));
    }

    #[test]
    fn the_least_of_all_groups_counts() {
        let files = |most, used| [("memory.max", most), ("memory.current", used)];
        let (above, own) = (group(&files("100", "95")), group(&files("50", "1")));
        let both = [above.path().to_owned(), own.path().to_owned()];
        let least = least(&both, &Limit::of_memory()).unwrap();
        assert_eq!((least.bytes, least.file), (5, above.path().join("memory.max")));
    }

    #[test]
    fn groups_are_found_below_their_mount() {
        let found = |root, group| from_top(Path::new("/cg"), root, group);
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(found("/", "/"), paths(&["/cg"]));
        assert_eq!(found("/", "/a/b"), paths(&["/cg", "/cg/a", "/cg/a/b"]));
        // In a container that sees its own part alone.
        assert_eq!(found("/docker/1", "/docker/1/a"), paths(&["/cg", "/cg/a"]));
        assert_eq!(found("/docker/1", "/docker/2"), paths(&["/cg"]));
        assert_eq!(found("/", "/../2/a"), paths(&["/cg"]));
    }
}
