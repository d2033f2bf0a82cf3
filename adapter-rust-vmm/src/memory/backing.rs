//! The size of the pages behind a mapping.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use pageferry::memory::PAGE_BYTES;

/// `f_type` of hugetlbfs (linux/magic.h). A hugetlb memfd lives on an internal mount of it.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Page size in bytes of a file's mappings.
pub(super) fn of_file(file: &File) -> io::Result<u64> {
    let stat = rustix::fs::fstatfs(file)?;
    if stat.f_type == HUGETLBFS_MAGIC {
        // hugetlbfs reports its page size as the block size.
        u64::try_from(stat.f_bsize).map_err(io::Error::other)
    } else {
        Ok(PAGE_BYTES)
    }
}

/// Page size in bytes of the mapping at `host_addr`, from /proc/self.
///
/// `smaps` tells it, but walks every page table of the process to count what nobody asked for:
/// seconds under a lock for a large guest. So `maps` is asked first. Anonymous hugetlb mappings
/// are files there (of an internal hugetlbfs mount), so a mapping without inode is ordinary.
pub(super) fn of_mapping(host_addr: usize) -> io::Result<u64> {
    let maps = BufReader::new(File::open("/proc/self/maps")?);
    if inode_of_mapping(maps, host_addr)? == 0 {
        return Ok(PAGE_BYTES);
    }
    let smaps = BufReader::new(File::open("/proc/self/smaps")?);
    kernel_page_bytes(smaps, host_addr)
}

/// Whether the mapping at `host_addr` is a shared one, so that what is written to it is in its
/// file. In doubt it is not: nothing depends on a file that is not mentioned.
pub(super) fn is_shared(host_addr: usize) -> bool {
    File::open("/proc/self/maps")
        .and_then(|maps| perms_of_mapping(BufReader::new(maps), host_addr))
        .is_ok_and(|perms| perms.ends_with('s'))
}

fn inode_of_mapping(maps: impl BufRead, host_addr: usize) -> io::Result<u64> {
    field_of_mapping(maps, host_addr, 4, |field| field.parse().ok())
}

fn perms_of_mapping(maps: impl BufRead, host_addr: usize) -> io::Result<String> {
    field_of_mapping(maps, host_addr, 1, |field| Some(field.to_owned()))
}

/// A field of the mapping's line: address perms offset dev inode pathname.
fn field_of_mapping<T>(
    maps: impl BufRead,
    host_addr: usize,
    index: usize,
    parse: impl Fn(&str) -> Option<T>,
) -> io::Result<T> {
    for line in maps.lines() {
        let line = line?;
        if header_range(&line).is_some_and(|range| range.contains(&host_addr)) {
            let field = line.split_ascii_whitespace().nth(index).and_then(&parse);
            return field.ok_or_else(|| malformed(&line));
        }
    }
    Err(unmapped(host_addr))
}

fn kernel_page_bytes(smaps: impl BufRead, host_addr: usize) -> io::Result<u64> {
    let mut inside = false;
    for line in smaps.lines() {
        let line = line?;
        if let Some(range) = header_range(&line) {
            inside = range.contains(&host_addr);
        } else if inside && let Some(value) = line.strip_prefix("KernelPageSize:") {
            let kib =
                value.trim().strip_suffix("kB").and_then(|kib| kib.trim().parse::<u64>().ok());
            return kib.map(|kib| kib * 1024).ok_or_else(|| malformed(&line));
        }
    }
    Err(unmapped(host_addr))
}

/// The addresses of a mapping, if the line is the first of one.
fn header_range(line: &str) -> Option<std::ops::Range<usize>> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

fn malformed(line: &str) -> io::Error {
    io::Error::other(format!("/proc/self has an unexpected line {line:?}"))
}

fn unmapped(host_addr: usize) -> io::Error {
    io::Error::other(format!("/proc/self shows no mapping at {host_addr:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
KernelPageSize:        4 kB
7f0000200000-7f0000600000 rw-s 00000000 00:0f 1234   /anon_hugepage (deleted)
Size:               4096 kB
KernelPageSize:     2048 kB
VmFlags: rd wr sh ht
";

    #[test]
    fn the_right_mapping_is_read() {
        assert_eq!(kernel_page_bytes(SMAPS.as_bytes(), 0x7f00_0000_0000).unwrap(), 4096);
        assert_eq!(kernel_page_bytes(SMAPS.as_bytes(), 0x7f00_0030_0000).unwrap(), 2 << 20);
        assert_eq!(inode_of_mapping(SMAPS.as_bytes(), 0x7f00_001f_ffff).unwrap(), 0);
        assert_eq!(inode_of_mapping(SMAPS.as_bytes(), 0x7f00_0020_0000).unwrap(), 1234);
        assert_eq!(perms_of_mapping(SMAPS.as_bytes(), 0x7f00_0000_0000).unwrap(), "rw-p");
        assert_eq!(perms_of_mapping(SMAPS.as_bytes(), 0x7f00_0020_0000).unwrap(), "rw-s");
    }

    #[test]
    fn no_mapping_and_nonsense_are_errors() {
        assert!(kernel_page_bytes(SMAPS.as_bytes(), 0x1000).is_err());
        assert!(inode_of_mapping(SMAPS.as_bytes(), 0x1000).is_err());
        assert!(inode_of_mapping("0-2000 rw-p 0 00:00 x".as_bytes(), 0x1000).is_err());
        assert!(kernel_page_bytes("0-2000 rw\nKernelPageSize: x kB".as_bytes(), 0).is_err());
    }
}
