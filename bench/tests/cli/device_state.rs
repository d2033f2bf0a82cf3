//! Saving device state.

use crate::support::{number, report, run};

#[test]
fn saving_loading_and_coding_have_figures() {
    let report = report(&["device-state", "--json", "--vcpus=2", "--blob=256K", "--samples=2"]);
    assert!(number(&report, "state_bytes") > 500.0, "{report}");
    let saves = report["saves"].as_array().expect("saves");
    let threads: Vec<_> = saves.iter().map(|save| save["threads"].as_u64()).collect();
    assert_eq!(threads, [Some(1), Some(2), Some(4)]);
    for save in saves {
        assert!(
            number(save, "ms") > 0.0 && number(save, "worst_ms") >= number(save, "ms"),
            "{save}"
        );
    }
    assert!(number(&report, "load_ms") > 0.0, "{report}");
    for what in ["encode", "decode", "copy"] {
        let rate = number(&report, &format!("{what}_gigabytes_per_second"));
        assert!(rate > 0.0, "{what}: {report}");
    }
}

#[test]
fn nonsense_is_refused() {
    for args in [["device-state", "--vcpus=0"], ["device-state", "--blob=5G"]] {
        assert_eq!(run(&args).status, Some(2), "{args:?}");
    }
}
