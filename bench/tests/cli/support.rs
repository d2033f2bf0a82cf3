//! Runs the program.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What the program did.
pub(crate) struct Ran {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The program, to be run.
pub(crate) fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.args(args).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub(crate) fn run(args: &[&str]) -> Ran {
    let Output { status, stdout, stderr } = program(args).output().expect("start the program");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Ran { status: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// The object of a run that succeeded.
pub(crate) fn report(args: &[&str]) -> Value {
    let ran = run(args);
    assert_eq!(ran.status, Some(0), "{args:?}: {}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), 1, "{args:?}: {}", ran.stdout);
    let report: Value = serde_json::from_str(&ran.stdout).expect("one JSON object on stdout");
    assert_eq!(report["schema"], 1);
    report
}

/// Whether this kernel has no io_uring for us; says so.
pub(crate) fn no_rings() -> bool {
    match pageferry_iouring::Rings::new(pageferry_iouring::IoUringOptions::default()) {
        Ok(_) => false,
        Err(unavailable) => {
            eprintln!("io_uring skipped, because {unavailable}");
            true
        }
    }
}

/// Whether there is no KVM for us; says so.
pub(crate) fn no_kvm() -> bool {
    match pageferry_vmm::guest::kvm_available() {
        Ok(()) => false,
        Err(reason) => {
            eprintln!("KVM skipped, because {reason}");
            true
        }
    }
}

/// A number that must be there and not negative. Parts of the name are separated by dots.
pub(crate) fn number(report: &Value, name: &str) -> f64 {
    let value = name.split('.').fold(report, |value, part| &value[part]);
    let number = value.as_f64().unwrap_or_else(|| panic!("{name} is no number in {report}"));
    assert!(number.is_finite() && number >= 0.0, "{name} is {number} in {report}");
    number
}
