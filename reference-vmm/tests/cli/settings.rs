//! Settings over their whole range: what the kernel or the clock cannot take is refused where it is
//! given, and what is taken moves the guest about as fast as anything else.

use pageferry_iouring::{IoUringOptions, Rings};

use crate::support::host::skipped;
use crate::support::process::Process;
use crate::support::report::Report;
use crate::support::sides::{destination, source};

/// The longest time that the command line can tell.
const LONGEST: &str = "18446744073709551615s";

/// Runs a demo with enough to send that waiting for each segment of it takes a minute.
fn completes(more: &[&str]) -> Report {
    let own = ["demo", "--json", "--memory=32M", "--working-set=16M", "--dirty-rate=1000"];
    Process::start("demo", &[&own, more].concat()).finish().report(0)
}

/// Every flag of a transport that takes a number or a choice, at its extremes. What one of them makes
/// slower by an order of magnitude is not to be had: it was 20 to 100 times with a send buffer of 16 KiB.
fn nothing_is_slow(transport: &str) {
    let took = |more: &[&str]| {
        let report = completes(&[&[transport], more].concat());
        assert_eq!(report.flag("memory_match"), Some(true), "{more:?}: {report:?}");
        report.number("total_ms")
    };
    let cases: &[&[&str]] = &[
        &["--channels=1"],
        &["--channels=256"],
        &["--populate=256"],
        &["--pin=0"],
        &["--zero-copy=on"],
        &["--zero-copy=off"],
        &["--send-buffer=64K"],
        &["--receive-buffer=64K"],
        &["--send-buffer=64K", "--receive-buffer=64K"],
        &["--zero-copy=on", "--send-buffer=64K", "--receive-buffer=64K"],
        &["--channels=256", "--send-buffer=64K", "--receive-buffer=64K"],
        // As much as an `int` holds, and 4 GiB more than nothing.
        &["--send-buffer=2G", "--receive-buffer=2G"],
        &["--send-buffer=1T", "--receive-buffer=1T"],
        &["--send-buffer=18446744073709551615", "--receive-buffer=18446744073709551615"],
        &["--tcp-user-timeout=off", "--keepalive=off"],
        &["--keepalive=1ns,1ns,127"],
        &["--bandwidth-limit=18446744073709551615"],
        &["--switchover-bandwidth=18446744073709551615"],
    ];
    // What is slow by itself is slow each time; what the machine does meanwhile comes and goes.
    let turn = || (took(&[]), cases.iter().map(|more| took(more)).collect::<Vec<_>>());
    let ((first, times), (second, again)) = (turn(), turn());
    let without = first.max(second).max(took(&[]));
    for (more, (time, again)) in cases.iter().zip(times.into_iter().zip(again)) {
        let (time, bound) = (f64::min(time, again), 10.0 * without + 5_000.0);
        assert!(time < bound, "{transport} {more:?}: {time} ms, and {without} ms without");
    }
}

#[test]
fn no_setting_is_slow_over_tcp() {
    nothing_is_slow("--transport=tcp");
}

#[test]
fn no_setting_is_slow_over_io_uring() {
    match Rings::new(IoUringOptions::default()) {
        Ok(_) => nothing_is_slow("--transport=iouring"),
        Err(unavailable) => skipped(&unavailable.to_string()),
    }
}

#[test]
fn a_buffer_of_less_than_a_segment_is_refused() {
    for option in ["--send-buffer", "--receive-buffer"] {
        for size in ["1", "4K", "16K", "65535"] {
            for command in ["demo", "run", "receive"] {
                let mut process = Process::start("program", &[command, option, size]);
                assert_eq!(process.finish_for_people().0, Some(2), "{command} {option} {size}");
                let messages = process.messages();
                for part in [option, "65536", "acknowledgement"] {
                    assert!(messages.contains(part), "{option} {size}: {messages}");
                }
            }
        }
    }
}

/// One that fails within a process of a demo, and not where it is given, was not thought of.
#[test]
fn a_demo_takes_the_longest_times() {
    let times = [
        "downtime-limit",
        "deadline",
        "handshake-timeout",
        "registration-timeout-per-gib",
        "stall-timeout",
        "load-timeout",
        "release-timeout",
        "commit-timeout",
        "connect-timeout",
        "preamble-timeout",
        "tcp-user-timeout",
    ];
    let mut options: Vec<_> = times.iter().map(|name| format!("--{name}={LONGEST}")).collect();
    options.push(format!("--keepalive={LONGEST},{LONGEST},127"));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    for transport in ["--transport=tcp", "--transport=auto"] {
        completes(&[&options[..], &[transport]].concat());
    }
}

/// How long a destination waits for a release bounds a wait that has a least length of its own: nobody is
/// uncertain for it, wherever it is given.
#[test]
fn the_shortest_time_for_a_release_leaves_nobody_uncertain() {
    for time in ["--release-timeout=1ns", "--release-timeout=1ms"] {
        completes(&[time]);
        let (mut destination, address) = destination(&[time]);
        let mut source = source(&[time]);
        source.say(format!("migrate {address}"));
        source.finish().report(0).assert_departed();
        destination.finish().report(0).assert_arrived();
    }
}

#[test]
fn a_demo_takes_the_largest_numbers() {
    let most = u64::MAX;
    completes(&[&format!("--seed={most}"), &format!("--max-rounds={}", u32::MAX)]);
    let own = ["demo", "--json", "--memory=16M", "--working-set=4M", "--workload=random"];
    let rate = format!("--dirty-rate={most}");
    Process::start("demo", &[&own[..], &[&rate]].concat()).finish().report(0);
}
