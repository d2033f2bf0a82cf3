//! Loops that are counted, and the gate that compares the counts.

use serde_json::Value;

use crate::support::{no_rings, number, run};

fn counts(which: &str, work: u32) -> Value {
    let ran = run(&["hot", which, "--work", &work.to_string()]);
    assert_eq!(ran.status, Some(0), "{which}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).expect("counts")
}

/// What twice as much work costs more.
fn difference(which: &str, work: u32, name: &str) -> f64 {
    number(&counts(which, 2 * work), name) - number(&counts(which, work), name)
}

#[test]
fn inner_loops_allocate_nothing() {
    for (which, work) in [("scan", 1), ("coalesce", 4), ("zero", 2), ("framing", 1), ("tcp", 1)] {
        let allocations = difference(which, work, "allocations");
        assert!(allocations.abs() < f64::EPSILON, "{which}: {allocations}");
    }
}

#[test]
fn counts_of_transports_are_the_same_in_every_run() {
    for which in ["tcp", "iouring"] {
        if which == "iouring" && no_rings() {
            continue;
        }
        let of = |name: &str| difference(which, 1, name);
        assert!(of("wire_bytes") > 64.0 * 128.0 * 1024.0, "{which}");
        assert!(of("user_copied_bytes").abs() < f64::EPSILON, "{which}");
        // The least of three: an acknowledgement may be late, and then is asked for again.
        let least = |()| (0..3).map(|_| of("system_calls")).fold(f64::INFINITY, f64::min);
        let calls = [(); 2].map(least);
        assert!(calls[0] > 0.0 && (calls[0] - calls[1]).abs() < f64::EPSILON, "{which}: {calls:?}");
    }
}

#[test]
fn zero_copy_is_counted_where_the_kernel_copies() {
    let copied = difference("tcp-zero-copy", 1, "zero_copy.copied_bytes");
    assert!((copied - 64.0 * 128.0 * 1024.0).abs() < f64::EPSILON, "{copied}");
}

#[test]
fn a_gate_without_its_programs_says_which() {
    let ran = run(&["gate", "--head", "/nonexistent/bench"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(1), ""));
    assert!(ran.stderr.contains("failed to find the head"), "{}", ran.stderr);
}
