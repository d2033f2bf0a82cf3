//! Whether systemd takes the units in `systemd/`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

const UNITS: [&str; 2] = ["pageferry-receive", "pageferry-migrate"];

/// What it says of them, with another line in each if one is given. `None` where there is no systemd.
fn complaints(line: &str) -> Option<String> {
    let root = tempfile::tempdir().expect("a folder");
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let mut verify = Command::new("systemd-analyze");
    // Of the units alone, and not of what this machine has besides.
    verify.args(["verify", "--recursive-errors=no", "--man=no"]);
    for name in UNITS {
        let text = fs::read_to_string(units.join(format!("{name}@.service"))).expect("a unit");
        let program = env!("CARGO_BIN_EXE_pageferry-qemu");
        let text = text.replace("/usr/local/bin/pageferry-qemu", program);
        // A template is looked at by one of its guests.
        let path = root.path().join(format!("{name}@vm1.service"));
        fs::write(&path, format!("{text}{line}\n")).expect("a unit");
        verify.arg(path);
    }
    let output = match verify.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("units of systemd skipped, because there is no systemd-analyze ({error})");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || !said.is_empty(), "{}", output.status);
    Some(said)
}

#[test]
fn systemd_takes_the_units() {
    if let Some(said) = complaints("") {
        assert_eq!(said, "");
    }
}

#[test]
fn a_mistake_would_be_noticed() {
    if let Some(said) = complaints("KillMood=process") {
        assert_eq!(said.matches("Unknown key").count(), UNITS.len(), "{said}");
    }
}
