//! Sweeps of migrations, and the page that is made of them.

use std::fs;

use crate::support::{number, report, run};

const SMALL: [&str; 4] = ["migrate", "--json", "--memory=64M", "--working-set=8M"];

#[test]
fn every_combination_is_migrated_and_right() {
    let more = ["--transport=tcp", "--channels=1,3", "--backing=memfd", "--workload=random,idle"];
    let report = report(&[&SMALL[..], &more].concat());
    let migrations = report["migrations"].as_array().expect("migrations");
    let settings: Vec<_> = migrations
        .iter()
        .map(|each| (number(each, "setting.channels"), each["setting"]["workload"].clone()))
        .collect();
    let expected = [(1.0, "random"), (3.0, "random"), (1.0, "idle"), (3.0, "idle")];
    assert_eq!(settings, expected.map(|(channels, workload)| (channels, workload.into())));
    for each in migrations {
        assert_eq!((&each["outcome"], &each["oracle_ok"]), (&"completed".into(), &true.into()));
        assert_eq!(each["user_copied_bytes"], 0);
        for list in ["rounds", "samples", "heartbeat_gaps"] {
            assert!(!each[list].as_array().expect(list).is_empty(), "no {list} in {each}");
        }
        let samples = each["samples"].as_array().expect("samples");
        assert!(samples.is_sorted_by_key(|sample| sample["landed_bytes"].as_u64()), "{each}");
        assert!(number(each, "cpu_ms") > 0.0 && number(each, "heartbeat_gap_ms") > 0.0);
    }
}

#[test]
fn load_is_there_and_is_counted() {
    let more = ["--transport=tcp", "--guest-load=1", "--host-load=2", "--guest=process"];
    let report = report(&[&SMALL[..], &more].concat());
    let each = &report["migrations"][0];
    for name in
        ["guest_cpus", "guest_gigabytes_per_second", "host_cpus", "host_gigabytes_per_second"]
    {
        assert!(number(each, &format!("load.{name}")) > 0.0, "{name} in {each}");
    }
    assert_eq!(each["oracle_ok"], true);
}

#[test]
fn a_page_is_made_of_several_documents() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let write = |name: &str, args: &[&str]| {
        let ran = run(args);
        assert_eq!(ran.status, Some(0), "{}", ran.stderr);
        fs::write(file(name), ran.stdout).expect("keep it");
        file(name)
    };
    let sweep =
        write("sweep.json", &[&SMALL[..], &["--transport=tcp", "--workload=idle"]].concat());
    let pairs = write(
        "pairs.json",
        &["throughput", "--json", "--memory=8M", "--pairs=2", "--backing=memfd"],
    );
    let page = file("page.html");
    let report = report(&["report", &sweep, &pairs, "--out", &page, "--json"]);
    assert_eq!(report["kind"], "report");
    let name = &report["comparisons"][0]["contestants"][0]["name"];
    assert_eq!(name, "pageferry, tcp");
    let html = fs::read_to_string(&page).expect("a page");
    for plot in ["downtime", "comparison-0", "throughput-0", "remaining-0"] {
        assert!(html.contains(&format!("data-plot=\"{plot}\"")), "no {plot}");
    }
    // Nothing from elsewhere, and nothing that runs.
    for foreign in ["<script", "http://", "https://", "url(", "@import", "<link"] {
        assert!(!html.contains(foreign), "{foreign} in the page");
    }
    let ran = run(&["report", &page, "--out", "/dev/null"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(1), ""));
    assert!(ran.stderr.contains("no document of pageferry's"), "{}", ran.stderr);
}
