//! Counts that are the same in every run.
//!
//! A loop is done once with so much work and once with twice as much: the difference is what the
//! loop costs, without the start of the program and the making of what it works on.

use std::collections::BTreeMap;

use pageferry_cli::outcome::Failure;
use pageferry_cli::say;
use pageferry_iouring::{IoUringOptions, Rings};

use super::binary::Binary;
use super::verdict::{Limit, Row};
use crate::hot::{BATCHES, Counts};

/// How much worse a number of instructions may be. It changes a little with the compiler's mood
/// about unrelated code.
const INSTRUCTIONS_SLACK: f64 = 0.03;

/// Calls by which threads wait for each other, so that their number is up to chance.
const BY_CHANCE: [&str; 3] = ["futex", "restart_syscall", "sched_yield"];

/// Runs of which the one with the fewest calls counts.
const RUNS: u32 = 5;

/// A loop of `hot`, and how much of it is enough to count.
struct Hot {
    name: &'static str,
    work: u32,
    /// Whether the kernel is in it.
    is_transport: bool,
}

const LOOPS: [Hot; 9] = [
    Hot { name: "scan", work: 1, is_transport: false },
    Hot { name: "coalesce", work: 4, is_transport: false },
    Hot { name: "zero", work: 1, is_transport: false },
    Hot { name: "framing", work: 1, is_transport: false },
    // Where RDMA is built in.
    Hot { name: "work-requests", work: 1, is_transport: false },
    Hot { name: "tcp", work: 2, is_transport: true },
    Hot { name: "iouring", work: 2, is_transport: true },
    Hot { name: "tcp-zero-copy", work: 2, is_transport: true },
    Hot { name: "iouring-zero-copy", work: 2, is_transport: true },
];

/// Those that this machine can do.
fn loops() -> impl Iterator<Item = &'static Hot> {
    let rings = Rings::new(IoUringOptions::default());
    if let Err(unavailable) = &rings {
        say!("loops over iouring skipped, because {unavailable}");
    }
    LOOPS.iter().filter(move |each| rings.is_ok() || !each.name.starts_with("iouring"))
}

/// What a loop costs by some count.
fn cost(
    each: &Hot,
    mut count: impl FnMut(&[&str]) -> Result<Option<u64>, Failure>,
) -> Result<Option<u64>, Failure> {
    let mut by = |work: u32| count(&["hot", each.name, "--work", &work.to_string()]);
    let (Some(once), Some(twice)) = (by(each.work)?, by(2 * each.work)?) else { return Ok(None) };
    Ok(Some(twice.saturating_sub(once)))
}

/// Instructions in user space, counted by valgrind.
pub(super) fn instructions(head: &Binary, base: Option<&Binary>) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    // What the kernel does with zero-copy sends is not for valgrind to count.
    for each in loops().filter(|each| !each.name.ends_with("zero-copy")) {
        let of = |binary: &Binary| cost(each, |args| callgrind(binary, args));
        let (head, base) = (of(head)?, base.map(of).transpose()?.flatten());
        let name = format!("instructions of {}", each.name);
        rows.push(Row::new(name, base, head, Limit::Ratio(1.0 + INSTRUCTIONS_SLACK)));
    }
    Ok(rows)
}

fn callgrind(binary: &Binary, args: &[&str]) -> Result<Option<u64>, Failure> {
    let options = ["--tool=callgrind", "--callgrind-out-file=/dev/null"];
    let Some((_, words)) = binary.run_by("valgrind", &options, args)? else { return Ok(None) };
    let collected = words.lines().find_map(|line| line.split_once("Collected : "));
    let count = collected.and_then(|(_, count)| count.trim().parse().ok());
    Ok(Some(count.ok_or_else(|| format!("valgrind counted nothing: {words}"))?))
}

/// Everything that may not become more by one.
pub(super) fn counters(head: &Binary, base: Option<&Binary>) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for each in loops() {
        let name = each.name;
        let mut row = |what: &str, count: &dyn Fn(&Binary) -> Result<Option<u64>, Failure>| {
            let (head, base) = (count(head)?, base.map(count).transpose()?.flatten());
            rows.push(Row::new(format!("{what} of {name}"), base, head, Limit::NoMore));
            Ok::<_, Failure>(())
        };
        let own = |figure: fn(&Counts) -> u64| {
            move |binary: &Binary| {
                cost(each, |args| Ok(counted(binary, args)?.map(|counts| figure(&counts))))
            }
        };
        let zero_copy = name.ends_with("zero-copy");
        if !zero_copy {
            row("allocations", &own(|counts| counts.allocations))?;
        }
        if each.is_transport {
            row("bytes copied in user space", &own(|counts| counts.user_copied_bytes))?;
        }
        if zero_copy {
            row("bytes sent zero-copy and copied", &own(|counts| counts.zero_copy.copied_bytes))?;
        } else if each.is_transport {
            row("bytes on the wire", &own(|counts| counts.wire_bytes))?;
            row("system calls a batch, in tenths,", &|binary| {
                let calls = cost(each, |args| strace(binary, args))?;
                Ok(calls.map(|calls| tenths(calls, each.work * BATCHES)))
            })?;
        }
    }
    Ok(rows)
}

fn counted(binary: &Binary, args: &[&str]) -> Result<Option<Counts>, Failure> {
    Ok(binary.json(args)?.map(serde_json::from_value).transpose()?)
}

/// How often something was done for each of so many batches, in tenths: threads that find each other
/// before make a call more or less by chance, and one in ten batches is more than that.
fn tenths(count: u64, batches: u32) -> u64 {
    let batches = u64::from(batches.max(1));
    (count * 10 + batches / 2) / batches
}

/// System calls of all threads, whoever counts them himself: the least of a few runs, since what the
/// kernel delivers late is waited for by one call more.
fn strace(binary: &Binary, args: &[&str]) -> Result<Option<u64>, Failure> {
    let mut least: Option<u64> = None;
    for _ in 0..RUNS {
        // What it counted goes to stderr, where the program says nothing.
        let Some((_, table)) = binary.run_by("strace", &["-f", "-c", "-q"], args)? else {
            return Ok(None);
        };
        let by_chance = |name: &str| BY_CHANCE.contains(&name);
        let calls = calls(&table);
        let sum = calls.iter().filter(|(name, _)| !by_chance(name)).map(|(_, count)| *count).sum();
        least = Some(least.map_or(sum, |least| least.min(sum)));
    }
    Ok(least)
}

/// The columns "calls" and "syscall" of strace's table; the one of errors may be empty.
fn calls(table: &str) -> BTreeMap<String, u64> {
    table
        .lines()
        .filter_map(|line| {
            let columns: Vec<_> = line.split_whitespace().collect();
            let name = columns.last().filter(|name| **name != "total")?;
            Some(((*name).to_owned(), columns.get(3)?.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_more_in_every_tenth_batch_shows_and_two_in_all_do_not() {
        assert_eq!([894, 896, 898].map(|calls| tenths(calls, 128)), [70, 70, 70]);
        assert_eq!(tenths(896 + 13, 128), 71);
        assert_eq!(tenths(896 + 128, 128), 80);
    }

    #[test]
    fn straces_table_is_read() {
        let table = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.003000           3      1000           sendmsg
 30.00    0.001500           3       500        20 recvmsg
 10.00    0.000500           5       100           futex
------ ----------- ----------- --------- --------- ----------------
100.00    0.005000           3      1600        20 total
";
        let expected = [("futex", 100), ("recvmsg", 500), ("sendmsg", 1000)];
        assert_eq!(calls(table), expected.map(|(name, count)| (name.to_owned(), count)).into());
    }
}
