//! Whether a guest could go, asked of who waits for one: nothing moves, and it goes on waiting.

use serde_json::Value;

use crate::support::host::guest_kind;
use crate::support::peer::closed_port;
use crate::support::process::Process;
use crate::support::sides::{SMALL, destination, source_that_stays};

fn check(address: &str, more: &[&str]) -> (Option<i32>, Value) {
    let own = ["check", address, "--json", "--for=200ms", "--guest", guest_kind()];
    let (status, out) = Process::start("check", &[&own, SMALL, more].concat()).finish_for_people();
    (status, serde_json::from_str(&out).expect("one JSON object"))
}

#[test]
fn it_could_go_and_does_not() {
    let (mut destination, address) = destination(&[]);
    for _ in 0..2 {
        let (status, answer) = check(&address, &[]);
        assert_eq!((status, &answer["outcome"]), (Some(0), &"completed".into()), "{answer}");
        let number =
            |name: &str| answer[name].as_f64().unwrap_or_else(|| panic!("{name}: {answer}"));
        assert!(number("bytes_per_second") > 1e6 && number("dirty_pages_per_second") > 0.0);
        assert!(number("downtime_ms") < number("downtime_limit_ms"));
        destination.await_message("it asks for a guest of 64.00 MiB");
        destination.await_message("the next is waited for");
    }
    let said = destination.messages();
    assert!(!said.contains("lost"), "nothing was: {said}");
    // Of a guest that runs already, which then goes.
    let mut source = source_that_stays(&[]);
    source.say(format!("check {address}"));
    source.await_message("yes: the guest may go there");
    source.await_message("downtime to expect");
    let beats = source.beats();
    source.await_beats_beyond(beats);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

/// It keeps others out.
#[test]
fn it_is_over_in_a_minute() {
    let why = ["check", "127.0.0.1:1", "--for=61s"];
    let mut process = Process::start("check", &why);
    process.await_message("more than a minute");
    assert_eq!(process.finish_for_people().0, Some(2));
}

#[test]
fn a_limit_that_could_not_be_kept_is_told() {
    let (_destination, address) = destination(&[]);
    let (status, answer) = check(&address, &["--downtime-limit=1us"]);
    assert_eq!((status, &answer["outcome"]), (Some(1), &"failed".into()), "{answer}");
    let why = answer["error"].as_str().expect("why");
    assert!(why.contains("the downtime will not come below"), "{why}");
    assert!(answer["downtime_ms"].as_f64() > Some(0.001), "{answer}");
}

#[test]
fn who_cannot_take_it_says_why() {
    let (_held, nowhere) = closed_port();
    let (status, answer) = check(&nowhere, &[]);
    assert_eq!((status, &answer["outcome"]), (Some(1), &"failed".into()), "{answer}");
    let (mut destination, address) = destination(&["--memory=32M"]);
    let (status, answer) = check(&address, &[]);
    assert_eq!(status, Some(1), "{answer}");
    let why = answer["error"].as_str().expect("why");
    assert!(why.contains("--memory here takes only"), "{why}");
    destination.await_message("the next is waited for");
}
