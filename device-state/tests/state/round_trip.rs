//! What is saved comes back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry_device_state::{Registry, from_bytes, to_bytes};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::zoo::{Fifo, Zoo, zoo};

fn some_zoo() -> Zoo {
    zoo().new_tree(&mut TestRunner::deterministic()).unwrap().current()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_new_value_is_the_old_one(mut old in zoo()) {
        let bytes = to_bytes(&mut old).unwrap();
        let mut new: Zoo = from_bytes(&bytes).unwrap();
        prop_assert_eq!(new.contents(), old.contents());
        prop_assert_eq!(new.handle, None);
        // One state has one form. Saving counts itself.
        new.saves = new.saves.wrapping_sub(1);
        prop_assert_eq!(to_bytes(&mut new).unwrap(), bytes);
    }

    #[test]
    fn a_device_is_loaded_where_it_stands(mut old in zoo(), mut device in zoo()) {
        let bytes = to_bytes(&mut old).unwrap();
        let (shared, counter) = (Arc::clone(&device.shared), Arc::clone(&device.counter));
        let mut machine = Registry::new();
        machine.add(0, &mut device).unwrap();
        machine.load(&bytes).unwrap();
        drop(machine);
        prop_assert_eq!(device.contents(), old.contents());
        prop_assert_eq!(device.handle, Some("kept"));
        // Who shares a part of it sees what was loaded.
        prop_assert_eq!(*shared.lock().unwrap(), *old.shared.lock().unwrap());
        prop_assert_eq!(counter.load(Ordering::SeqCst), old.counter.load(Ordering::SeqCst));
    }
}

#[test]
fn hooks_are_called_at_both_ends() {
    let mut state = some_zoo();
    state.saves = 4;
    state.label = "bad".to_owned();
    let bytes = to_bytes(&mut state).unwrap();
    assert_eq!(state.saves, 5);
    state.label = "unsaved".to_owned();
    let error = to_bytes(&mut state).unwrap_err();
    assert_eq!(error.to_string(), "section zoo 0, pre_save failed");
    assert_eq!(std::error::Error::source(&error).expect("a cause").to_string(), "not this one");
    let error = from_bytes::<Zoo>(&bytes).unwrap_err();
    assert!(error.to_string().ends_with("post_load failed"), "{error}");
    let cause = std::error::Error::source(&error).expect("a cause");
    assert_eq!(cause.to_string(), "a label cannot be bad");
}

#[test]
fn a_subsection_that_is_not_needed_is_not_sent() {
    let mut state = some_zoo();
    state.fifo = Fifo { data: vec![1, 2, 3], trigger_level: 8 };
    let with = to_bytes(&mut state).unwrap();
    state.fifo = Fifo::default();
    let without = to_bytes(&mut state).unwrap();
    let holds = |bytes: &[u8]| bytes.windows(8).any(|window| window == b"zoo/fifo");
    assert!(holds(&with) && !holds(&without));
    let mut device: Zoo = from_bytes(&with).unwrap();
    assert_eq!(device.fifo.trigger_level, 8);
    // Absent means default, whatever it was.
    let mut machine = Registry::new();
    machine.add(0, &mut device).unwrap();
    machine.load(&without).unwrap();
    drop(machine);
    assert_eq!(device.fifo, Fifo::default());
}

#[test]
fn state_goes_through_a_file() {
    let mut state = some_zoo();
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("zoo.state");
    std::fs::write(&path, to_bytes(&mut state).unwrap()).unwrap();
    let loaded: Zoo = from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(loaded.contents(), state.contents());
}

#[test]
fn what_is_too_long_is_not_saved() {
    let mut state = some_zoo();
    state.entries = vec![crate::zoo::Entry { address: 0, payload: vec![0; 17] }];
    let error = to_bytes(&mut state).unwrap_err();
    let text = "section zoo 0, field entries[0].payload: length 17, at most 16 is declared";
    assert_eq!(error.to_string(), text);
    assert_eq!((error.section(), error.field()), (Some(("zoo", 0)), "entries[0].payload"));
}
