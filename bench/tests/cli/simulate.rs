//! Simulated migrations.

use crate::support::{number, report, run};

#[test]
fn every_contender_has_a_row_and_a_seed_repeats_itself() {
    let once = report(&["simulate", "--json", "--scenarios=60", "--seed=5"]);
    let again = report(&["simulate", "--json", "--scenarios=60", "--seed=5"]);
    assert_eq!(once["rows"], again["rows"]);
    assert_eq!((once["seed"].as_u64(), once["scenarios"].as_u64()), (Some(5), Some(60)));
    let rows = once["rows"].as_array().expect("rows");
    for name in ["harmonic", "last-bandwidth", "keep-trying", "give-up", "post-copy"] {
        assert!(rows.iter().any(|row| row["contender"] == name), "no {name} in {once}");
    }
    for row in rows {
        let ends = ["converged", "throttled", "post_copy", "gave_up"].map(|end| number(row, end));
        assert!((ends.iter().sum::<f64>() - 60.0).abs() < 0.5, "{row}");
        for name in ["called_off", "wasted_ms", "prediction_error_p95", "effort_p50"] {
            number(row, name);
        }
    }
    assert!(number(&rows[0], "overruns") < 0.5, "{}", rows[0]);
}

#[test]
fn plots_are_a_file_of_their_own() {
    let path = std::env::temp_dir().join(format!("simulated-{}.html", std::process::id()));
    let option = format!("--html={}", path.display());
    let ran = run(&["simulate", "--scenarios=20", &option]);
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("called off"), "{}", ran.stdout);
    let page = std::fs::read_to_string(&path).expect("the page");
    std::fs::remove_file(&path).expect("remove the page");
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg"));
    let ran = run(&["simulate", "--scenarios=1", "--html=/nowhere/at/all.html"]);
    assert_eq!(ran.status, Some(1));
    assert!(ran.stderr.contains("/nowhere/at/all.html"), "{}", ran.stderr);
}
