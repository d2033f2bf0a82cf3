//! The engine and others. A peer that this machine does not have is named, and is no failure.

use crate::support::report;

#[test]
fn who_is_there_is_measured_and_who_is_not_is_named() {
    let args = ["compare", "--json", "--memory=64M", "--rounds=2", "--transport=tcp"];
    let report = report(&args);
    let comparison = &report["comparisons"][0];
    let contestants = comparison["contestants"].as_array().expect("contestants");
    let missing = comparison["missing"].as_array().expect("missing");
    let name = |each: &serde_json::Value| each["name"].as_str().expect("a name").to_owned();
    for each in contestants {
        let gbps = each["gbps"].as_array().expect("figures");
        assert_eq!(gbps.len(), 2, "{each}");
        assert!(gbps.iter().all(|figure| figure.as_f64().is_some_and(|gbps| gbps > 0.0)), "{each}");
    }
    for each in missing {
        eprintln!("{} skipped, because {}", name(each), each["why"]);
        assert!(!each["why"].as_str().expect("a reason").is_empty());
    }
    let all: Vec<_> = contestants.iter().chain(missing).map(name).collect();
    for peer in ["pageferry, tcp", "bare loop", "iperf3", "QEMU", "ib_write_bw", "ib_read_bw"] {
        assert!(all.iter().any(|name| name.starts_with(peer)), "no {peer} among {all:?}");
    }
}
