//! Downtime limits, and guests that do not meet them.

use crate::support::process::Process;
use crate::support::sides::{BUSY, TIGHT, destination, source_of, under_way};

const IMPOSSIBLE: &[&str] =
    &["demo", "--json", "--memory=128M", "--working-set=96M", "--backing=memfd"];

#[test]
fn a_limit_that_cannot_be_met_ends_as_the_policy_says() {
    for policy in ["keep-trying", "throttle", "give-up"] {
        let policy = format!("--not-converging={policy}");
        let args = [IMPOSSIBLE, TIGHT, &[&policy, "--deadline=1s"]].concat();
        let report = Process::start("demo", &args).finish().report(1);
        report.assert_kept("failed", &["not converging", "limit of 1\u{b5}s"], 0);
        assert_eq!(report.text("convergence"), "gave-up");
        assert!(report.number("downtime_ms") == 0.0, "{report:?}");
    }
}

#[test]
fn by_best_effort_a_guest_leaves_once_nothing_is_left() {
    let more = ["--workload=idle", "--downtime-bound=best-effort"];
    let report = Process::start("demo", &[IMPOSSIBLE, TIGHT, &more].concat()).finish().report(0);
    report.assert_contract();
    report.assert_departed();
    assert!(report.number("downtime_ms") > report.number("downtime_limit_ms"), "{report:?}");
    assert_eq!(report.count("switchover_attempts"), 1);
}

#[test]
fn post_copy_is_refused() {
    let args = [IMPOSSIBLE, &["--not-converging=post-copy"]].concat();
    let report = Process::start("demo", &args).finish().report(1);
    report.assert_kept("failed", &["unsupported yet: post-copy"], 0);
    assert_eq!(report.text("convergence"), "undecided");
    assert_eq!(report.count("rounds"), 0);
}

#[test]
fn limits_are_changed_on_the_way() {
    let (mut source, mut destination, _) = under_way(&["--not-converging=keep-trying"]);
    source.say("not-converging post-copy");
    source.await_message("unsupported yet: post-copy");
    source.say("channels 1");
    source.say("downtime-bound best-effort");
    source.say("downtime-limit 20s");
    let departed = source.finish().report(0);
    departed.assert_departed();
    // And not the one that it began with.
    assert_eq!(departed.number("downtime_limit_ms").to_string(), "20000", "{departed:?}");
    destination.finish().report(0).assert_arrived();
}

/// No switchover was tried: it is the limit that would have held.
#[test]
fn the_limit_of_a_migration_that_is_cancelled_is_the_last_one() {
    let more = ["--not-converging=keep-trying", "--bandwidth-limit=1M"];
    let (mut destination, address) = destination(&[]);
    let mut source = source_of(&[BUSY, TIGHT, &["--run-for", "100ms"], &more].concat());
    source.say(format!("migrate {address}"));
    destination.await_message("a source connected");
    source.say("downtime-limit 2ms");
    source.say("cancel");
    let report = source.finish().report(3);
    assert_eq!(report.number("downtime_limit_ms").to_string(), "2", "{report:?}");
}

#[test]
fn without_a_migration_there_is_nothing_to_change() {
    let mut source = source_of(BUSY);
    for line in
        ["downtime-limit 1s", "downtime-bound strict", "not-converging give-up", "channels 1"]
    {
        source.say(line);
        source.await_message("no migration is under way");
    }
    source.say("downtime-limit soon");
    source.await_message("a time is like");
    source.say("quit");
    source.finish().assert_status(3);
}
