//! A migration takes no more memory than the guest uses: neither side allocates what was never touched.

use std::fs;

use crate::support::host::HugePages;
use crate::support::process::Process;
use crate::support::sides::{destination_that_stays, source_of};

/// Of a guest that uses a quarter of its memory, which stays the same.
const GUEST: &[&str] = &["--memory=512M", "--working-set=128M", "--workload=idle"];

/// Memory that a process has, or had at most, in KiB: huge pages are counted apart. `None` once it has ended.
fn memory_kib(process: &Process, lines: &[&str]) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).ok()?;
    let of = |name: &&str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    lines.iter().map(of).sum()
}

const NOW: &[&str] = &["VmRSS:", "HugetlbPages:"];
/// Nothing tells how many huge pages it had at most.
const MOST: &[&str] = &["VmHWM:", "HugetlbPages:"];

/// Neither side has a twentieth more than the guest's process had before.
fn moves_in_what_it_uses(backing: &str, transport: &str) {
    let options = [format!("--backing={backing}"), format!("--transport={transport}")];
    let [backing, transport] = [&options[0], &options[1]].map(String::as_str);
    let (mut destination, address) = destination_that_stays(&[backing, transport]);
    let mut source =
        source_of(&[GUEST, &[backing, transport, "--verify", "--channels=4"]].concat());
    let beats = source.beats();
    source.await_beats_beyond(beats);
    let before = memory_kib(&source, NOW).expect("a source that lives");
    source.say(format!("migrate {address}"));
    let mut at_source = before;
    while let Some(used) = memory_kib(&source, MOST) {
        at_source = at_source.max(used);
        std::thread::yield_now();
    }
    source.finish().report(0).assert_departed();
    let there = memory_kib(&destination, MOST).expect("a destination that lives");
    for (side, used) in [("source", at_source), ("destination", there)] {
        assert!(
            used <= before + before / 20,
            "{used} KiB at the {side}, {before} before: {options:?}"
        );
    }
    destination.say("quit");
    destination.finish().assert_status(0);
}

#[test]
fn of_anonymous_memory() {
    for transport in ["tcp", "iouring"] {
        moves_in_what_it_uses("anonymous", transport);
    }
}

#[test]
fn of_a_memfd() {
    for transport in ["tcp", "iouring"] {
        moves_in_what_it_uses("memfd", transport);
    }
}

#[test]
fn of_huge_pages() {
    // Both guests' memory is reserved: what is not used stays free.
    let Some(_reserved) = HugePages::reserve(512) else { return };
    for transport in ["tcp", "iouring"] {
        moves_in_what_it_uses("hugetlb", transport);
    }
}
