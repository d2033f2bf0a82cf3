//! Latencies and their files.

use std::fs;

use crate::support::{number, report, run};

fn measured(more: &[&str]) -> serde_json::Value {
    let own = ["latency", "--json", "--memory=16M", "--migrations=2", "--pings=200"];
    report(&[&own, more].concat())
}

fn of<'a>(report: &'a serde_json::Value, what: &str) -> &'a serde_json::Value {
    let latencies = report["latencies"].as_array().expect("latencies");
    let found = latencies.iter().find(|latency| latency["what"] == what);
    found.unwrap_or_else(|| panic!("no {what} in {report}"))
}

#[test]
fn everything_is_measured_and_recording_costs_next_to_nothing() {
    for transport in ["tcp", "iouring"] {
        if transport == "iouring" && crate::support::no_rings() {
            continue;
        }
        let report = measured(&["--transport", transport]);
        assert_eq!(report["kind"], "latency");
        for (what, count) in [("control", 200.0), ("page", 200.0), ("commit", 4.0)] {
            let latency = of(&report, what);
            assert_eq!(latency["transport"], transport);
            assert!((number(latency, "count") - count).abs() < f64::EPSILON, "{latency}");
            assert!(number(latency, "min_ns") > 0.0 && latency["rate"].is_null(), "{latency}");
        }
        let batch = of(&report, "batch");
        // 16 MiB in batches of 4 MiB at most, twice.
        assert!(number(batch, "count") >= 8.0, "{batch}");
        let figures = ["min_ns", "p50_ns", "p99_ns", "max_ns"].map(|name| number(batch, name));
        assert!(figures.is_sorted(), "{batch}");
        assert!(number(batch, "recording.share_of_transfer") < 0.01, "{batch}");
    }
}

#[test]
fn histograms_are_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_str().expect("text");
    measured(&["--histograms", path, "--rate=20000"]);
    let log = fs::read_to_string(directory.path().join("tcp.hlog")).expect("a log");
    assert!(log.lines().filter(|line| line.starts_with("Tag=batch,")).count() == 2, "{log}");
    for what in ["batch", "page", "control", "commit"] {
        let name = format!("tcp-{what}.hgrm");
        let text = fs::read_to_string(directory.path().join(name)).expect("a distribution");
        assert!(text.contains("1/(1-Percentile)") && text.contains("#[Mean"), "{text}");
    }
}

#[test]
fn a_rate_is_in_the_report_and_a_directory_that_cannot_be_is_an_error() {
    let report = measured(&["--rate=5000"]);
    assert!((number(of(&report, "page"), "rate") - 5000.0).abs() < f64::EPSILON);
    assert!(of(&report, "commit")["rate"].is_null());
    let args =
        ["latency", "--memory=4M", "--migrations=1", "--pings=1", "--histograms=/dev/null/x"];
    let ran = run(&args);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(1), ""));
    assert!(ran.stderr.contains("failed to write /dev/null/x"), "{}", ran.stderr);
}
