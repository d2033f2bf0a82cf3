//! `--events`: what happens, as lines of JSON.

use std::fs;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

use crate::support::host::guest_kind;
use crate::support::process::Process;
use crate::support::report::Report;
use crate::support::sides::{SMALL, destination, source, source_that_stays};

/// The lines in a file, each of which has to be an object with an event and a time that does not go back.
fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("the events");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    // Progress is told by a thread of its own, which another one may overtake.
    let told = || lines.iter().filter(|line| line["event"] != "progress");
    let times = || told().map(|line| line["realtime_ms"].as_f64().expect("a time"));
    assert!(times().zip(times().skip(1)).all(|(before, after)| before <= after), "{text}");
    lines
}

/// Their names, without what repeats and without what depends on time.
fn names(lines: &[Value]) -> Vec<&str> {
    let names = lines.iter().map(|line| line["event"].as_str().expect("an event"));
    let mut names: Vec<_> = names
        .filter(|name| {
            !["progress", "forecast", "registering", "registered", "rebalanced"].contains(name)
        })
        .collect();
    names.dedup();
    names
}

#[test]
fn both_sides_tell_what_happens_as_it_happens() {
    let root = tempfile::tempdir().expect("a folder");
    let [there, here] = ["there", "here"].map(|name| root.path().join(name));
    let events = |path: &Path| format!("--events={}", path.display());
    let (mut destination, address) = destination(&[&events(&there)]);
    let mut source = source(&["--max-rounds=1", "--downtime-limit=10s", &events(&here)]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
    let (here, there) = (lines(&here), lines(&there));
    let [round, finished] = ["round_started", "round_finished"];
    let left = ["committed", "guest_runs_there", "ended"];
    assert_eq!(
        names(&here),
        [&["began", "agreed", round, finished, "guest_paused", round][..], &left].concat()
    );
    let came = ["began", "listening", "connected", "agreed", round, "loaded"];
    assert_eq!(names(&there), [&came[..], &left].concat());
    assert_eq!(there[1]["address"], address);
    for lines in [&here, &there] {
        let ended = lines.last().expect("the end");
        assert_eq!(ended["outcome"], "completed", "{ended}");
        assert_eq!(ended["guest_at"], "destination", "{ended}");
        assert_eq!(ended["error"], Value::Null, "{ended}");
    }
}

/// A guest that cannot go at first, and then can. What it says of its second move.
fn fails_once(path: &Path) -> Report {
    let mut source = source_that_stays(&[&format!("--events={}", path.display())]);
    source.say("migrate 127.0.0.1:1");
    assert_eq!(source.await_report().text("outcome"), "failed");
    let (mut destination, address) = destination(&[]);
    source.say(format!("migrate {address}"));
    let report = source.await_report();
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
    report
}

/// What was sent by somebody who wants to know why can be drawn.
#[test]
fn a_file_of_events_is_a_report() {
    let root = tempfile::tempdir().expect("a folder");
    let path = root.path().join("events");
    let report = fails_once(&path);
    let text = fs::read_to_string(&path).expect("the events");
    let document = pageferry_report::trace::read(&text).expect("a trace");
    assert!(!document.facts.kernel.is_empty(), "{:?}", document.facts);
    let [failed, completed] = &document.migrations[..] else { panic!("{document:?}") };
    assert_eq!(failed.outcome, "failed");
    assert!(failed.error.as_ref().is_some_and(|error| error.contains("refused")), "{failed:?}");
    assert_eq!(completed.outcome, "completed");
    assert_eq!(completed.wire_bytes, report.count("bytes_on_wire"));
    assert_eq!(completed.rounds.len() as u64, report.count("rounds"));
    let times = completed.rounds.iter().map(|round| round.ms);
    assert!(times.clone().all(|ms| (0.0..=completed.total_ms).contains(&ms)), "{completed:?}");
    // Cut off anywhere, as by the end of its program.
    for end in (0..text.len()).step_by(97) {
        let most = pageferry_report::trace::read(&text[..end]);
        assert!(most.is_none_or(|cut| cut.migrations.len() <= 2));
    }
    // Without its end it is still seen how far it came.
    let (unended, _) = text.trim_end().rsplit_once('\n').expect("two lines");
    let document = pageferry_report::trace::read(unended).expect("a trace");
    let [_, unended] = &document.migrations[..] else { panic!("{document:?}") };
    assert_eq!((&*unended.outcome, unended.rounds.len()), ("unknown", completed.rounds.len()));
}

/// Of each try, in one file.
#[test]
fn each_migration_has_its_end() {
    let root = tempfile::tempdir().expect("a folder");
    let path = root.path().join("events");
    fails_once(&path);
    let lines = lines(&path);
    let ended: Vec<_> = lines.iter().filter(|line| line["event"] == "ended").collect();
    let outcomes: Vec<_> = ended.iter().map(|line| line["outcome"].as_str()).collect();
    assert_eq!(outcomes, [Some("failed"), Some("completed")]);
    assert_eq!(ended[0]["guest_at"], "source");
    assert!(ended[0]["error"].as_str().is_some_and(|error| error.contains("refused")), "{lines:?}");
}

/// The guest is moved all the same.
#[test]
fn a_file_that_takes_nothing_ends_the_events_alone() {
    let (mut destination, address) = destination(&["--events=/dev/full"]);
    let mut source = source(&["--events=/dev/full"]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    // By the first of them, which comes before all else.
    assert!(source.messages().contains("no more events are written: "));
    destination.finish().report(0).assert_arrived();
}

#[test]
fn what_cannot_be_written_to_is_refused() {
    let root = tempfile::tempdir().expect("a folder");
    let fifo = root.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a FIFO");
    let nowhere = root.path().join("none/such");
    for (path, why) in [(&fifo, "needs its reader"), (&nowhere, "No such file")] {
        let events = format!("--events={}", path.display());
        let run = [&["run", "--on-demand", "--guest", guest_kind(), &events][..], SMALL].concat();
        let receive = ["receive", "--listen=127.0.0.1:0", &events];
        for args in [&run[..], &receive[..]] {
            let mut process = Process::start("program", args);
            let told = process.await_message("error: --events ");
            assert!(told.contains(why), "{told}");
            process.finish().assert_status(1);
        }
    }
}
