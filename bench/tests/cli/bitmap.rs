//! Work on bitmaps.

use crate::support::{number, report, run};

#[test]
fn every_combination_has_a_row() {
    let report = report(&["bitmap", "--json", "--guest=64M,1G", "--threads=1,2", "--samples=1"]);
    let rows = report["rows"].as_array().expect("rows");
    // 0 and 100 % once, 0.1 and 10 % in two patterns.
    assert_eq!(rows.len(), 2 * 6 * 2);
    for row in rows {
        let pages = number(row, "guest_bytes") / 4096.0;
        assert!((number(row, "bitmap_bytes") - pages / 8.0).abs() < f64::EPSILON);
        let dirty = number(row, "dirty_pages");
        match (number(row, "dirty_share"), row["pattern"].as_str()) {
            (0.0, Some("uniform")) => assert!(dirty == 0.0, "{row}"),
            (1.0, Some("uniform")) => assert!((dirty - pages).abs() < f64::EPSILON, "{row}"),
            (_, Some("clustered" | "scattered")) => assert!(dirty < pages, "{row}"),
            _ => panic!("{row}"),
        }
        for name in ["read_ns", "scan_ns", "read_by_one_ns", "harvest_ns", "count_ns"] {
            assert!(number(row, name) > 0.0, "{name} in {row}");
        }
    }
}

#[test]
fn without_json_there_is_a_table() {
    let ran = run(&["bitmap", "--guest=64M", "--dirty=0.1", "--threads=1", "--samples=1"]);
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    for part in ["scan", "64.00 MiB", "10 %", "clustered", "scattered"] {
        assert!(ran.stdout.contains(part), "no {part:?} in\n{}", ran.stdout);
    }
}
