//! What re-arming KVM's dirty log costs.

use crate::support::{no_kvm, number, report, run};

const QUICK: [&str; 4] = ["rearm", "--memory=128M", "--samples=1", "--gigabits=100"];

#[test]
fn every_pattern_has_a_row_for_each_number_of_vcpus() {
    if no_kvm() {
        return;
    }
    let report = report(&[&QUICK[..], &["--vcpus=1,2", "--json"]].concat());
    let rows = report["rows"].as_array().expect("rows");
    let pages = (128_u64 << 20) / 4096;
    let expected = [1, 2].into_iter().flat_map(|vcpus| {
        // A call for each stripe of 512 pages with something dirty, which each of them has.
        [("dense", pages), ("scattered", pages / 64), ("single", pages / 512)]
            .map(|(pattern, dirty)| (vcpus, pattern, dirty))
    });
    assert_eq!(rows.len(), 6, "{report}");
    for (row, (vcpus, pattern, dirty)) in rows.iter().zip(expected) {
        let named = (row["vcpus"].as_u64(), row["pattern"].as_str(), row["pages"].as_u64());
        assert_eq!(named, (Some(vcpus), Some(pattern), Some(dirty)), "{row}");
        assert_eq!(row["stripe_calls"].as_u64(), Some(pages / 512), "{row}");
        let calls = number(row, "engine_calls");
        assert!((1.0..=number(row, "stripe_calls")).contains(&calls), "{row}");
        for name in ["stripe_ms", "engine_ms", "bare_ms", "at_once_ms", "round_ms"] {
            assert!(number(row, name) > 0.0, "{name} in {row}");
        }
        assert!(number(row, "engine_ms") <= number(row, "round_ms"), "{row}");
    }
}

#[test]
fn without_json_there_is_a_table() {
    if no_kvm() {
        return;
    }
    let ran = run(&[&QUICK[..], &["--vcpus=1"]].concat());
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    for part in ["dense", "scattered", "single"] {
        assert!(ran.stdout.contains(part), "no {part:?} in\n{}", ran.stdout);
    }
}
