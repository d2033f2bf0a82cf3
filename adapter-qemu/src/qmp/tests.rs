use std::io::Write;
use std::os::fd::AsFd;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;

/// A monitor that says a greeting, and after each line that it is told the next of these, with the line's
/// identifier for ID.
fn monitor(said: &'static [&'static str]) -> (UnixStream, JoinHandle<Vec<String>>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let playing = std::thread::spawn(move || {
        writeln!(theirs, "{GREETING}").unwrap();
        let mut said = [r#"{"return": {}, "id": ID}"#].iter().chain(said);
        let mut told = Vec::new();
        for line in BufReader::new(theirs.try_clone().unwrap()).lines() {
            let Ok(line) = line else { break };
            let message: Value = serde_json::from_str(&line).unwrap();
            told.push(line);
            let Some(next) = said.next() else { break };
            let id = message["id"].to_string();
            if writeln!(theirs, "{}", next.replace("ID", &id)).is_err() {
                break;
            }
        }
        told
    });
    (ours, playing)
}

/// A connection, and the monitor's end of it.
fn connected() -> (Qmp, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let greeting = std::thread::spawn(move || {
        writeln!(theirs, "{GREETING}").unwrap();
        let mut line = String::new();
        BufReader::new(theirs.try_clone().unwrap()).read_line(&mut line).unwrap();
        writeln!(theirs, r#"{{"return": {{}}, "id": 1}}"#).unwrap();
        theirs
    });
    (Qmp::over(ours).unwrap(), greeting.join().unwrap())
}

#[test]
fn a_command_is_answered_whatever_comes_before() {
    let (stream, _) = monitor(&[concat!(
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
        "\n",
        r#"{"return": {"old": true}, "id": 4711}"#,
        "\n",
        r#"{"return": {"status": "paused"}, "id": ID}"#,
    )]);
    let qmp = Qmp::over(stream).unwrap();
    assert_eq!(qmp.version().to_string(), "7.2.22 (Debian)");
    let answer = qmp.execute("query-status", Value::Null).unwrap();
    assert_eq!(answer["status"], "paused");
    let event = qmp.wait_event(Duration::ZERO, |event| event.name == "STOP").unwrap().unwrap();
    assert_eq!(event.data, Value::Null);
    assert_eq!(qmp.wait_event(Duration::ZERO, |_| true).unwrap(), None);
}

#[test]
fn a_refusal_has_its_words() {
    let (stream, _) = monitor(&[
        r#"{"id": ID, "error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}"#,
    ]);
    let error = Qmp::over(stream).unwrap().execute("x", Value::Null).unwrap_err();
    assert!(error.is_unknown_command());
    assert_eq!(error.to_string(), "QEMU refused x: The command x has not been found");
}

#[test]
fn who_ends_is_known_at_once() {
    let (stream, monitor) = monitor(&[]);
    let qmp = Qmp::over(stream).unwrap();
    // It hangs up after this.
    let error = qmp.execute("quit", Value::Null).unwrap_err();
    assert!(matches!(error, QmpError::Closed), "{error}");
    monitor.join().unwrap();
    let error = qmp.wait_event(Duration::MAX, |_| true).unwrap_err();
    assert!(matches!(error, QmpError::Closed), "{error}");
}

#[test]
fn what_does_not_answer_is_given_up() {
    let (stream, _monitor) = monitor(&[r#"{"event": "RESUME"}"#]);
    let qmp = Qmp::over(stream).unwrap();
    let time = Duration::from_millis(50);
    let error = qmp.execute_within(time, "stop", Value::Null, None).unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
}

#[test]
fn what_is_no_monitor_is_told_by_what_it_says() {
    for (said, shown) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
        ("{\"QMP\": 3}\n", "{\"QMP\": 3}"),
        ("{\"event\": \"STOP\"}\n", "{\"event\": \"STOP\"}"),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said.as_bytes()).unwrap();
        let error = Qmp::over(ours).unwrap_err();
        assert!(matches!(&error, QmpError::NoMonitor { said } if said == shown), "{error}");
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Qmp::over(ours).unwrap_err(), QmpError::Closed));
}

#[test]
fn nonsense_ends_it() {
    for said in ["nonsense", "[]", "{\"return\": 1}", "{\"id\": -1, \"return\": 1}", "\u{0}"] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        writeln!(theirs, "{GREETING}\n{said}").unwrap();
        let error = Qmp::over(ours).unwrap_err();
        assert!(matches!(&error, QmpError::Malformed { .. }), "{said}: {error}");
    }
}

/// A line without an end costs no more than the longest message.
#[test]
fn an_endless_line_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let endless = std::thread::spawn(move || {
        writeln!(theirs, "{GREETING}").unwrap();
        let part = vec![b'x'; 1 << 20];
        (0..).map_while(|_| theirs.write_all(&part).ok()).count()
    });
    let error = Qmp::over(ours).unwrap_err();
    assert!(matches!(error, QmpError::TooLong { .. }), "{error}");
    let taken = endless.join().unwrap() as u64;
    assert!(taken <= (MOST_BYTES >> 20) + 1, "{taken} MiB");
}

#[test]
fn events_that_nobody_wants_are_forgotten() {
    let (qmp, mut theirs) = connected();
    for count in 0..MOST_EVENTS + 10 {
        writeln!(theirs, r#"{{"event": "X", "data": {{"count": {count}}}}}"#).unwrap();
    }
    writeln!(theirs, r#"{{"event": "LAST"}}"#).unwrap();
    let time = Duration::from_secs(60);
    qmp.shared
        .wait_for(Instant::now() + time, |heard| {
            heard.events.last().is_some_and(|event| event.name == "LAST").then_some(())
        })
        .unwrap()
        .unwrap();
    let first = qmp.wait_event(time, |event| event.name == "X").unwrap().unwrap();
    assert_eq!(first.data["count"], 11);
}

#[test]
fn a_descriptor_goes_beside_a_command() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    let (qmp, mut theirs) = connected();
    let (given, mut kept) = UnixStream::pair().unwrap();
    let (line, descriptor) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let arguments = json!({ "fdname": "state" });
            qmp.execute_within(PROMPT, "getfd", arguments, Some(given.as_fd())).unwrap();
        });
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut line = [0; 4096];
        let mut into = [io::IoSliceMut::new(&mut line)];
        let read = recvmsg(&theirs, &mut into, &mut beside, RecvFlags::CMSG_CLOEXEC).unwrap();
        let Some(RecvAncillaryMessage::ScmRights(mut descriptors)) = beside.drain().next() else {
            panic!("no descriptor")
        };
        writeln!(theirs, r#"{{"return": {{}}, "id": 2}}"#).unwrap();
        asking.join().unwrap();
        (line[..read.bytes].to_vec(), descriptors.next().unwrap())
    });
    drop(given);
    assert!(line.ends_with(b"\n"), "the whole command");
    let message: Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(message["arguments"]["fdname"], "state");
    UnixStream::from(descriptor).write_all(b"!").unwrap();
    kept.read_exact(&mut [0]).unwrap();
}
