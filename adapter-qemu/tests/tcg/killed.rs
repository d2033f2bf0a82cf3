//! Each of the four processes of a migration is killed at each step: where the guest is then, and who is told. The
//! table in `docs/qemu.md`.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, ChildStderr, Command, Stdio};

use pageferry_qemu::testing::{Console, Guests, Running};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::commands::{
    Heard, Receiving, Running as Program, has_strace, may_track, migrating, recover, until,
};

const PAGES: u32 = 1024;

/// A guest on host *a* that is moving to host *b*.
struct Scene {
    guests: Guests,
    here: Heard,
    there: Console,
    source: Running,
}

/// The programs and the QEMU at the destination of one attempt.
struct Attempt {
    migrate: Program,
    receive: Receiving,
    qemu: Pid,
}

impl Attempt {
    fn switch_over(&mut self) {
        self.migrate.say("limit off");
    }
}

impl Scene {
    /// Says so if there can be none here.
    fn start() -> Option<Self> {
        if !may_track() {
            return None;
        }
        let guests = Guests::bare(PAGES)?;
        let (here, there) = (Heard::of(Console::of(&guests, "a")), Console::of(&guests, "b"));
        let source = Running::start(&guests, "a").unwrap();
        here.next();
        Some(Self { guests, here, there, source })
    }

    /// Pages have moved, and go on so slowly that the first round does not end until the limit is lifted.
    fn attempt(&self) -> Attempt {
        // Whoever is killed does not come back.
        let for_good = "--rejoin-timeout=1s";
        let (mut receive, address) = Receiving::start(&self.guests, "b", &[for_good]);
        let options = [
            "--bandwidth-limit=1M",
            "--downtime-bound=best-effort",
            "--downtime-limit=10s",
            for_good,
        ];
        let migrate = migrating(&self.guests, "a", &address, &options);
        let ram = self.guests.path("b.ram");
        // QEMU itself writes nothing there before it loads.
        until("pages move", || std::fs::metadata(&ram).is_ok_and(|file| file.blocks() > 0));
        let qemu = receive.qemu();
        Attempt { migrate, receive, qemu }
    }

    /// The same, and the guest stands still: the destination's QEMU does not answer.
    fn standing_still(&self) -> Attempt {
        let mut attempt = self.attempt();
        kill_process(attempt.qemu, Signal::STOP).unwrap();
        attempt.switch_over();
        attempt.migrate.hear("guest paused at the source");
        attempt
    }

    /// What is known on a host, which may do that.
    fn recover(&self, host: &str, options: &[&str]) -> Value {
        recover(&self.guests, host, options).expect("it may")
    }

    /// What is written down on a host.
    fn standing(&self, host: &str) -> Option<String> {
        let file = self.guests.path(&format!("{host}.qmp.migration"));
        let line = std::fs::read_to_string(file).ok()?;
        let record: Value = serde_json::from_str(line.lines().next()?).ok()?;
        record["standing"].as_str().map(str::to_owned)
    }

    fn await_standing(&self, host: &str, wanted: &str) {
        let what = format!("host {host} stands {wanted}");
        until(&what, || self.standing(host).as_deref() == Some(wanted));
    }

    /// The guest runs where it was, and nobody thinks otherwise.
    fn expect_here(&mut self) {
        self.here.await_pass();
        assert_eq!(self.standing("a"), None);
    }

    /// Nothing is left of an attempt at the destination.
    fn expect_nothing_there(&self) {
        for left in ["b.ram", "b.qmp", "b.qmp.migration"] {
            assert!(!self.guests.path(left).exists(), "{left} is left");
        }
    }

    /// The program at the destination was killed; its QEMU is told to quit.
    fn clean_up_there(&self) {
        let known = self.recover("b", &["--quit"]);
        assert_eq!(known["record"]["standing"], "awaited", "{known}");
        self.expect_nothing_there();
    }
}

/// The program failed, and the guest is where it was.
fn expect_kept(program: &mut Program) {
    let (report, status) = program.end();
    assert_eq!((status, &report["guest_at"]), (Some(1), &json!("source")), "{report}");
}

/// Holds a program up where it has written down how it stands, until this is dropped.
struct HeldUp {
    strace: Child,
    /// What it says must go somewhere.
    _said: BufReader<ChildStderr>,
}

impl HeldUp {
    fn hold(program: Pid) -> Self {
        let mut strace = Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", "trace=fdatasync"])
            .args(["-e", "inject=fdatasync:delay_exit=300000000", "-p"])
            .arg(program.as_raw_nonzero().to_string())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(strace.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        Self { strace, _said: said }
    }

    /// Who is held up ends there. Its end is known to others only once nobody traces it.
    fn kill(self, program: &mut Program) {
        program.signal(Signal::KILL);
        drop(self);
        program.kill();
    }
}

impl Drop for HeldUp {
    fn drop(&mut self) {
        // Who traces and is killed lets go.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

#[test]
fn the_guest_stays_whoever_is_killed_while_pages_move() {
    let Some(mut scene) = Scene::start() else { return };

    let mut attempt = scene.attempt();
    attempt.migrate.kill();
    expect_kept(&mut attempt.receive.program);
    assert_eq!(scene.recover("a", &[])["record"]["standing"], "here");
    scene.expect_nothing_there();
    // Nothing is to be decided: the next attempt just begins.
    scene.here.await_pass();

    let mut attempt = scene.attempt();
    attempt.receive.program.kill();
    expect_kept(&mut attempt.migrate);
    scene.expect_here();
    scene.clean_up_there();

    let mut attempt = scene.attempt();
    kill_process(attempt.qemu, Signal::KILL).unwrap();
    attempt.switch_over();
    expect_kept(&mut attempt.migrate);
    expect_kept(&mut attempt.receive.program);
    scene.expect_here();
    scene.expect_nothing_there();

    // The guest is in the source's QEMU, and goes with it.
    let mut attempt = scene.attempt();
    scene.source.child.kill().unwrap();
    expect_kept(&mut attempt.migrate);
    expect_kept(&mut attempt.receive.program);
    scene.expect_nothing_there();
    assert_eq!(scene.standing("a"), None);
}

#[test]
fn the_guest_stays_whoever_is_killed_while_it_stands_still() {
    let Some(mut scene) = Scene::start() else { return };

    let mut attempt = scene.standing_still();
    attempt.migrate.kill();
    kill_process(attempt.qemu, Signal::CONT).unwrap();
    expect_kept(&mut attempt.receive.program);
    scene.expect_nothing_there();
    // Who does not see to that first is told to, and changes nothing.
    let (report, _) = migrating(&scene.guests, "a", "127.0.0.1:1", &[]).end();
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("broken off (here in") && error.contains("recover"), "{error}");
    let known = scene.recover("a", &["--run"]);
    let (standing, running) = (&known["record"]["standing"], &known["qemu"]["running"]);
    assert_eq!((standing, running), (&json!("here"), &json!(false)), "{known}");
    scene.expect_here();

    let mut attempt = scene.standing_still();
    attempt.receive.program.kill();
    expect_kept(&mut attempt.migrate);
    scene.expect_here();
    kill_process(attempt.qemu, Signal::CONT).unwrap();
    scene.clean_up_there();

    let mut attempt = scene.standing_still();
    kill_process(attempt.qemu, Signal::KILL).unwrap();
    expect_kept(&mut attempt.migrate);
    expect_kept(&mut attempt.receive.program);
    scene.expect_here();
    scene.expect_nothing_there();

    let mut attempt = scene.standing_still();
    scene.source.child.kill().unwrap();
    kill_process(attempt.qemu, Signal::CONT).unwrap();
    let (report, status) = attempt.migrate.end();
    assert_eq!((status, &report["guest_at"]), (Some(1), &json!("paused")), "{report}");
    expect_kept(&mut attempt.receive.program);
    scene.expect_nothing_there();
    assert_eq!(scene.standing("a"), None);
}

/// Once the commit may have gone out nobody runs the guest by himself who does not know that he has it.
#[test]
fn the_guest_runs_once_whoever_is_killed_at_the_commit() {
    let Some(mut scene) = Scene::start() else { return };
    if !has_strace() {
        return;
    }

    // The source's program, before it has said it.
    let mut attempt = scene.attempt();
    let held = HeldUp::hold(attempt.migrate.pid());
    attempt.switch_over();
    scene.await_standing("a", "giving-up");
    held.kill(&mut attempt.migrate);
    attempt.receive.program.hear("the copy is kept");
    attempt.receive.program.signal(Signal::INT);
    let (report, _) = attempt.receive.program.end();
    assert_ne!(report["outcome"], "completed", "{report}");
    scene.expect_nothing_there();
    assert_eq!(recover(&scene.guests, "a", &["--run"]), None, "it ran the guest unasked");
    // Nor does it where nothing says any more who has it.
    let record = scene.guests.path("a.qmp.migration");
    let written = std::fs::read(&record).unwrap();
    std::fs::write(&record, b"").unwrap();
    assert_eq!(recover(&scene.guests, "a", &["--run"]), None, "it ran the guest unasked");
    std::fs::write(&record, written).unwrap();
    scene.recover("a", &["--run", "--force"]);
    scene.expect_here();

    // The destination's QEMU, before it was told to run the guest, which is given back.
    let mut attempt = scene.attempt();
    let held = HeldUp::hold(attempt.receive.program.pid());
    attempt.switch_over();
    scene.await_standing("b", "taken");
    kill_process(attempt.qemu, Signal::KILL).unwrap();
    drop(held);
    expect_kept(&mut attempt.migrate);
    expect_kept(&mut attempt.receive.program);
    scene.expect_here();
    scene.expect_nothing_there();

    // The destination's program, which has the guest and has not told it to run.
    let mut attempt = scene.attempt();
    let held = HeldUp::hold(attempt.receive.program.pid());
    attempt.switch_over();
    scene.await_standing("b", "taken");
    held.kill(&mut attempt.receive.program);
    let (report, status) = attempt.migrate.end();
    assert_eq!((status, &report["guest_at"]), (Some(4), &json!("unknown")), "{report}");
    assert_eq!(scene.standing("a").as_deref(), Some("giving-up"));
    let known = scene.recover("b", &["--run"]);
    assert_eq!(known["record"]["standing"], "taken", "{known}");
    let passes = [scene.there.pass(), scene.there.pass()];
    assert!(passes[0] < passes[1], "{passes:?}");
    scene.recover("a", &["--quit", "--force"]);
    assert!(scene.source.child.wait().unwrap().success(), "QEMU at the source did not quit");
    assert_eq!((scene.standing("a"), scene.standing("b")), (None, None));
}

/// Somebody removes the records while the guest moves: that costs nobody the guest.
#[test]
fn a_guest_moves_whatever_becomes_of_the_records() {
    let Some(mut scene) = Scene::start() else { return };
    let mut attempt = scene.attempt();
    for host in ["a", "b"] {
        std::fs::remove_file(scene.guests.path(&format!("{host}.qmp.migration"))).unwrap();
    }
    attempt.switch_over();
    let (report, status) = attempt.migrate.end();
    assert_eq!((status, &report["outcome"]), (Some(0), &json!("completed")), "{report}");
    attempt.receive.leave();
    let passes = [scene.there.pass(), scene.there.pass()];
    assert!(passes[0] < passes[1], "{passes:?}");
    assert!(scene.source.child.wait().unwrap().success(), "QEMU at the source did not quit");
}

/// All of the guest is at the destination by then.
#[test]
fn the_guest_runs_there_although_its_qemu_is_killed_at_the_commit() {
    let Some(mut scene) = Scene::start() else { return };
    if !has_strace() {
        return;
    }
    let mut attempt = scene.attempt();
    let held = HeldUp::hold(attempt.migrate.pid());
    attempt.switch_over();
    scene.await_standing("a", "giving-up");
    scene.source.child.kill().unwrap();
    drop(held);
    let (report, status) = attempt.migrate.end();
    assert_eq!((status, &report["outcome"]), (Some(0), &json!("completed")), "{report}");
    attempt.receive.leave();
    let passes = [scene.there.pass(), scene.there.pass()];
    assert!(passes[0] < passes[1], "{passes:?}");
    assert_eq!((scene.standing("a"), scene.standing("b")), (None, None));
}
