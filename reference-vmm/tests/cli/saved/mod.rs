//! A guest that goes on from a file, and what people see of its state.

mod inspected;
mod interrupted;
mod refused;
mod written;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::process::Process;

/// A file that is removed in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path of letters")
    }

    fn with(name: &str, contents: &[u8]) -> Self {
        let scratch = Self::new(name);
        fs::write(&scratch.0, contents).expect("write");
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs the program to its end: exit status, stdout, messages.
fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let mut process = Process::start("program", args);
    let (status, out) = process.finish_for_people();
    let messages = process.messages();
    (status, out, messages)
}

fn report(args: &[&str]) -> Value {
    let (status, out, messages) = run(args);
    assert_eq!(status, Some(0), "{args:?}: {messages}");
    let report: Value = serde_json::from_str(&out).expect("one JSON object");
    assert_eq!((&report["schema"], &report["oracle_ok"]), (&1.into(), &true.into()), "{report}");
    report
}

const SMALL: [&str; 4] = ["--memory=16M", "--working-set=4M", "--run-for=200ms", "--json"];

fn saved(name: &str, options: &[&str]) -> (Scratch, Value) {
    let file = Scratch::new(name);
    let args = [&["save", file.path()], &SMALL[..], options].concat();
    let report = report(&args);
    (file, report)
}

/// What is in a directory of its own, which goes with it.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("read a directory").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_guest_goes_on_from_a_file() {
    // KVM where there is KVM, and threads in any case.
    for kind in ["--guest=auto", "--guest=process"] {
        for workload in ["sequential", "random", "hot-cold", "idle"] {
            let workload = format!("--workload={workload}");
            let (file, saved) = saved("goes-on", &[kind, &workload, "--vcpus=2"]);
            assert!(saved["state_bytes"].as_u64().unwrap() > 100, "{saved}");
            let backing = ["--backing=anonymous", "--backing=memfd"];
            // As often as one likes: restoring takes nothing from the file.
            for backing in backing {
                let args = ["restore", file.path(), "--run-for=200ms", "--json", backing];
                let restored = report(&args);
                for same in ["guest", "workload", "vcpus", "state_bytes", "memory_bytes"] {
                    assert_eq!(restored[same], saved[same], "{same}");
                }
                let beats = |report: &Value| report["heartbeats"].as_u64().expect("a number");
                assert!(beats(&restored) >= beats(&saved) + 10, "{saved}\n{restored}");
            }
        }
    }
}
