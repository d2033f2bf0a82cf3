//! State that is printed and compared, and schemas.

use std::fs::File;

use serde_json::Value;

use super::{Scratch, run, saved};

#[test]
fn state_is_printed_and_compared() {
    let (old, _) = saved("old", &["--guest=auto", "--workload=idle"]);
    let (new, _) = saved("new", &["--guest=auto", "--workload=idle"]);
    let (status, text, _) = run(&["inspect", old.path()]);
    assert_eq!(status, Some(0));
    for part in ["heartbeat 0: version 1", "  beats: ", "serial 0: version 1", "  line_control: "] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains('#'), "{text}");
    let (status, same, messages) = run(&["inspect", old.path(), old.path()]);
    assert_eq!((status, same.as_str(), messages.as_str()), (Some(0), "", "0 differences"));
    let (status, changes, messages) = run(&["inspect", old.path(), new.path()]);
    assert_eq!(status, Some(0));
    assert!(changes.contains("heartbeat 0: last_beat_realtime_ns: 0x"), "{changes}");
    assert!(messages.ends_with(" differences"), "{messages}");
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/1-kvm.state");
    let (status, text, _) = run(&["inspect", kept]);
    assert_eq!(status, Some(0));
    for part in ["vcpu 1: version 1", "  regs:\n    rax: ", "    rip: 0x", "clock 0: version 1"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let none = Scratch::with("none", b"something else");
    let (status, _, messages) = run(&["inspect", none.path()]);
    assert_eq!(status, Some(1));
    assert!(messages.contains("no device state"), "{messages}");
}

#[test]
fn state_is_read_from_stdin() {
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/1-process.state");
    let program = std::process::Command::new(env!("CARGO_BIN_EXE_pageferry-vmm"))
        .args(["inspect", "-"])
        .stdin(File::open(kept).unwrap())
        .output()
        .expect("start the program");
    let text = String::from_utf8(program.stdout).unwrap();
    assert!(text.contains("\nthread 1: version 1"), "{text}");
    assert_eq!(text.trim_end(), run(&["inspect", kept]).1);
}

#[test]
fn schemas_are_dumped_and_checked() {
    let (status, dumped, _) = run(&["schema", "dump"]);
    assert_eq!(status, Some(0));
    let old = Scratch::with("old.json", dumped.as_bytes());
    let check = |new: &str| {
        let new = Scratch::with("new.json", new.as_bytes());
        run(&["schema", "check", old.path(), new.path()])
    };
    let (status, out, _) = check(&dumped);
    assert_eq!((status, out.as_str()), (Some(0), "old to new: works\nnew to old: works"));
    let schema: Value = serde_json::from_str(&dumped).unwrap();
    let changed = |change: fn(&mut Value)| {
        let mut schema = schema.clone();
        let sections = schema["sections"].as_array_mut().unwrap();
        let serial = sections.iter_mut().find(|section| section["name"] == "serial").unwrap();
        change(&mut serial["state"]);
        schema.to_string()
    };
    // The right way.
    let (status, out, _) = check(&changed(|state| {
        state["version"] = 2.into();
        let field = r#"{"tag":9,"name":"speed","since":2,"has_default":true,"type":"u32"}"#;
        state["fields"].as_array_mut().unwrap().push(serde_json::from_str(field).unwrap());
    }));
    assert_eq!(status, Some(0));
    let declared = "old to new: works\nnew to old: fails\n  \
                    fails: serial: the writer has version 2, the reader reads up to 1";
    assert_eq!(out, declared);
    // And the wrong one.
    let (status, out, messages) = check(&changed(|state| {
        state["fields"].as_array_mut().unwrap().pop();
    }));
    assert_eq!(status, Some(1));
    assert!(out.contains("fails: serial.scratch: the writer does not send the field"), "{out}");
    assert!(messages.contains("2 of these were not declared"), "{messages}");
    let (status, _, messages) = check("{}");
    assert_eq!(status, Some(1));
    assert!(messages.contains("failed to read a schema: missing field `format`"), "{messages}");
}
