//! The system calls that docs/embedding.md lists for filters are all that the engine's threads make.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use rustix::process::Signal;

use crate::documented;
use crate::support::host::{can_trace, guest_kind};
use crate::support::process::Process;
use crate::support::sides::{SMALL, destination};

/// The threads' names begin so.
const ENGINE: &str = "ferry-";

/// Under strace, which writes a file a thread.
fn traced(name: &'static str, directory: &Path, args: &[&str]) -> Process {
    let files = directory.join(name);
    let files = files.to_str().expect("a path of letters");
    let strace = ["-ff", "-qq", "--signal=none", "-o", files, env!("CARGO_BIN_EXE_pageferry-vmm")];
    Process::start_program(name, "strace", &[&strace, args].concat())
}

/// strace is slow, and nothing here is a matter of time.
const PATIENT: [&str; 3] = ["--handshake-timeout=60s", "--connect-timeout=60s", "--json"];

/// A source that is traced, whose guest has begun to run.
fn traced_source(directory: &Path, more: &[&str]) -> Process {
    let own = ["run", "--on-demand", "--run-for=10ms", "--guest", guest_kind()];
    let mut source = traced("source", directory, &[&own, SMALL, &PATIENT, more].concat());
    source.await_message("pageferry guest: ");
    source
}

/// Such a source, and a destination that is traced. With its address.
fn sides(directory: &Path, more: &[&str]) -> (Process, Process, String) {
    let own = ["receive", "--listen=127.0.0.1:0", "--populate=1", "--run-for=10ms"];
    let is_for_both =
        |option: &&str| ["--transport", "--shared-key"].iter().any(|it| option.starts_with(it));
    let both: Vec<_> = more.iter().copied().filter(is_for_both).collect();
    let args = [&own, &PATIENT[..], &both].concat();
    let mut destination = traced("destination", directory, &args);
    let line = destination.await_message("listening on ");
    let address = line.trim_start_matches("listening on ").to_owned();
    (traced_source(directory, more), destination, address)
}

/// What each thread of the engine called once it had its name, by that name.
fn called(directory: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut called: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in fs::read_dir(directory).expect("the traces").flatten() {
        let trace = fs::read(entry.path()).expect("a trace");
        let trace = String::from_utf8_lossy(&trace);
        let mut name = None;
        for line in trace.lines() {
            let Some((call, rest)) = line.split_once('(') else { continue };
            if let Some((_, named)) = rest.split_once("PR_SET_NAME, \"") {
                name = named.split_once('"').map(|(name, _)| name.to_owned());
            }
            // Resumed calls and the like are no names.
            let is_name =
                call.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            if let Some(name) = name.as_ref().filter(|name| name.starts_with(ENGINE) && is_name) {
                called.entry(name.clone()).or_default().insert(call.to_owned());
            }
        }
    }
    called
}

/// All that was called is documented. The threads that there were.
fn assert_documented(directory: &Path) -> BTreeSet<String> {
    let table = documented::system_calls();
    let everyone = &table["every one"];
    let mut seen = BTreeSet::new();
    for (name, calls) in called(directory) {
        let role = table.keys().find(|role| name.starts_with(role.as_str()));
        let role = role.unwrap_or_else(|| panic!("no thread {name} in embedding.md"));
        let missing: Vec<_> = calls
            .iter()
            .filter(|call| !everyone.contains(*call) && !table[role].contains(*call))
            .collect();
        assert!(missing.is_empty(), "{name} calls {missing:?}, which embedding.md does not list");
        seen.insert(role.clone());
    }
    seen
}

fn limited(both: &[&str]) {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let more = ["--bandwidth-limit=32M", "--verify", "--downtime-limit=1m"];
    let (mut source, mut destination, address) = sides(directory.path(), &[both, &more].concat());
    source.say(format!("migrate {address}"));
    let (departed, arrived) = (source.finish().report(0), destination.finish().report(0));
    assert_eq!((departed.text("outcome"), arrived.text("outcome")), ("completed", "completed"));
    let seen = assert_documented(directory.path());
    for role in ["ferry-accept", "ferry-control", "ferry-popu", "ferry-recv", "ferry-send"] {
        assert!(seen.contains(role), "no {role} in {seen:?}");
    }
}

#[test]
fn of_a_limited_migration_by_tcp() {
    limited(&["--transport=tcp"]);
}

#[test]
fn of_a_limited_migration_by_io_uring() {
    limited(&["--transport=auto"]);
}

#[test]
fn of_a_migration_that_is_encrypted() {
    let key = tempfile::NamedTempFile::new().expect("a file");
    fs::write(key.path(), [b'k'; 32]).expect("it is writable");
    limited(&["--transport=tcp", &format!("--shared-key={}", key.path().display())]);
}

/// Of a guest that does not converge.
const ENDLESS: &[&str] =
    &["--transport=tcp", "--downtime-limit=1us", "--zero-copy=on", "--workload=random"];

#[test]
fn of_a_migration_that_is_cancelled() {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (mut source, mut destination, address) = sides(directory.path(), ENDLESS);
    source.say(format!("migrate {address}"));
    source.await_message("round 1: ");
    source.say("cancel");
    source.finish().assert_status(3);
    destination.finish().assert_status(3);
    assert!(assert_documented(directory.path()).contains("ferry-recv"));
}

#[test]
fn of_a_source_that_loses_its_link() {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (mut destination, address) = destination(&[]);
    let mut source = traced_source(directory.path(), ENDLESS);
    source.say(format!("migrate {address}"));
    source.await_message("round 1: ");
    destination.signal(Signal::KILL);
    destination.finish();
    source.finish().assert_status(1);
    assert!(assert_documented(directory.path()).contains("ferry-send"));
}
