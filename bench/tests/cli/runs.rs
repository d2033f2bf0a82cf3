//! Runs of pages, by two processes.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use pageferry_iouring::{IoUringOptions, Rings};

use crate::support::{number, program, report, run};

/// Ends a process that would not by itself.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_length_is_sent_in_every_way() {
    if let Err(unavailable) = Rings::new(IoUringOptions::default()) {
        eprintln!("skipped, because {unavailable}");
        return;
    }
    let mut listening = program(&["runs", "--listen=127.0.0.1:0"]);
    let mut listening = Ended(listening.stderr(Stdio::piped()).spawn().expect("start the program"));
    let messages = listening.0.stderr.take().expect("a pipe");
    let line = BufReader::new(messages).lines().next().expect("a line").expect("text");
    let address = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}"));
    let connect = format!("--connect={address}");
    let args = ["runs", &connect, "--sizes=16K,1M", "--bytes=8M", "--samples=2", "--json"];
    let report = report(&args);
    let rows = report["rows"].as_array().expect("rows");
    let expected = [16, 1024].map(|kib| {
        ["copied", "pinned", "registered"].map(|way| (f64::from(kib << 10), way.to_owned()))
    });
    let found = rows
        .iter()
        .map(|row| (number(row, "run_bytes"), row["way"].as_str().expect("a way").to_owned()));
    assert_eq!(found.collect::<Vec<_>>(), expected.concat());
    for row in rows {
        assert!(number(row, "seconds_per_gib") > 0.0, "{row}");
        assert!(number(row, "cpu_seconds_per_gib") > 0.0, "{row}");
        let expected = match row["way"].as_str() {
            Some("copied") => 0.0..=0.0,
            Some("registered") => 1.0..=1.0,
            _ => 0.0..=1.0,
        };
        assert!(expected.contains(&number(row, "zero_copy_share")), "{row}");
    }
}

#[test]
fn it_sends_or_takes() {
    for args in [&["runs"][..], &["runs", "--listen=127.0.0.1:0", "--connect=127.0.0.1:1"]] {
        assert_eq!(run(args).status, Some(2), "{args:?}");
    }
    let ran = run(&["runs", "--connect=127.0.0.1:1", "--sizes=5000"]);
    assert_eq!(ran.status, Some(2));
    assert!(ran.stderr.contains("whole pages"), "{}", ran.stderr);
}
