//! Guests of QEMU, moved by pageferry and by QEMU itself.

use pageferry_qemu::testing::Guests;

use crate::support::{number, report};

#[test]
fn a_guest_is_moved_by_each() {
    if Guests::build(1).is_none() {
        return;
    }
    let args = ["compare-guests", "--json", "--rounds=1", "--memory=256M", "--working-set=16M"];
    let report = report(&args);
    let names = |list: &str| -> Vec<String> {
        let list = report[list].as_array().expect("a list");
        list.iter().map(|each| each["name"].as_str().expect("a name").to_owned()).collect()
    };
    for missing in report["missing"].as_array().expect("a list") {
        eprintln!("{} skipped, because {}", missing["name"], missing["why"]);
    }
    let all = [names("contestants"), names("missing")].concat();
    for name in ["pageferry, tcp", "pageferry, iouring", "QEMU", "QEMU, multifd"] {
        assert!(all.iter().any(|each| each == name), "no {name} among {all:?}");
    }
    for contestant in report["contestants"].as_array().expect("a list") {
        let moved = &contestant["moves"][0];
        let working_set = number(&report, "working_set_bytes");
        assert!(number(moved, "wire_bytes") >= working_set, "{contestant}");
        assert!(number(moved, "total_ms") >= number(moved, "downtime_ms"), "{contestant}");
        for figure in ["downtime_ms", "cpu_ms"] {
            assert!(number(moved, figure) > 0.0, "{contestant}");
        }
        // A guest that QEMU 7.2 has moved under TCG may be wrong, and show no life. On a busy machine its last sign
        // of life here may be heard as late as its first there.
        if moved["oracle_ok"] == true {
            number(moved, "standstill_ms");
        }
    }
}
