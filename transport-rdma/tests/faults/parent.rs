//! A case: two processes, and what happens to them.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::model::{Case, End, Fault, Step, Way};
use crate::side::{DESTINATION, HELD, LISTENS, NOBODY, ROLE, SOURCE, STEPS};

/// No less than an emulated machine takes for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// A side. Killed when dropped.
struct Side {
    role: &'static str,
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    /// What it has said and nobody has waited for.
    said: Vec<String>,
}

impl Side {
    fn start(role: &'static str, address: &str, case: Case) -> Self {
        let steps = case.step.needs_a_cut_at().into_iter().chain([case.step]);
        let steps: Vec<_> = steps.map(|step| format!("{step:?}")).collect();
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .env(ROLE, format!("{role} {address}"))
            .env(STEPS, steps.join(" "))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a side");
        let stdin = child.stdin.take().expect("a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (say, lines) = channel();
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|it| say.send(it)));
        Self { role, child, stdin, lines, said: Vec::new() }
    }

    fn say(&mut self, command: &str) {
        // One that is killed hears nothing.
        let _ = writeln!(self.stdin, "{command}");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is there");
    }

    /// Stops it, and waits until each of its threads has.
    fn stop(&self) {
        self.signal(Signal::STOP);
        self.await_stop();
    }

    fn await_stop(&self) {
        let tasks = format!("/proc/{}/task", self.child.id());
        let began = Instant::now();
        while !std::fs::read_dir(&tasks).expect("its threads").flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // After the name, which is in brackets and may hold anything.
            stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('T'))
        }) {
            assert!(began.elapsed() < PATIENCE, "the {} does not stop", self.role);
            thread::yield_now();
        }
    }

    /// The next line that begins with one of these; `None` once the side has ended.
    fn hear(&mut self, wanted: &[&str]) -> Option<String> {
        let is_wanted = |line: &String| wanted.iter().any(|wanted| line.starts_with(wanted));
        if let Some(at) = self.said.iter().position(is_wanted) {
            return Some(self.said.remove(at));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if is_wanted(&line) => return Some(line),
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the {} does not say any of {wanted:?}, but {:?}", self.role, self.said)
                }
            }
        }
    }

    /// How it ended, by its own account.
    fn end(&mut self) -> Option<End> {
        self.hear(&["end "]).map(|line| match line.as_str() {
            "end Waits" => End::Waits,
            "end AtSource" => End::AtSource,
            "end AtDestination" => End::AtDestination,
            "end Uncertain" => End::Uncertain,
            other => panic!("the {} says {other:?}", self.role),
        })
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes it happen; how both end. Panics where a guest is not right, or a side does not end.
pub(crate) fn play(case: Case, dice: u64, address: &str) -> (End, End) {
    let mut destination = Side::start(DESTINATION, address, case);
    let listens = destination.hear(&[LISTENS]).unwrap_or_else(|| panic!("{case}: no destination"));
    let mut source = Side::start(SOURCE, listens.trim_start_matches(LISTENS), case);

    if let Some(cut) = case.step.needs_a_cut_at() {
        let holder = if cut.way() == Way::ToDestination { &mut source } else { &mut destination };
        holder.hear(&[HELD]).unwrap_or_else(|| panic!("{case}: it was not to be cut"));
        holder.say("drop");
    }
    let sends = case.step.way() == Way::ToDestination;
    let holder = if sends { &mut source } else { &mut destination };
    holder.hear(&[HELD]).unwrap_or_else(|| panic!("{case}: that step did not come"));
    strike(case, dice, &mut source, &mut destination);

    // Who was stopped goes on once the other one has ended.
    if case.fault == Fault::SourceStopped {
        let there = end_of_destination(case, &mut destination);
        source.signal(Signal::CONT);
        (end_of_source(case, &mut source), there)
    } else {
        let here = end_of_source(case, &mut source);
        if case.fault == Fault::DestinationStopped {
            destination.signal(Signal::CONT);
        }
        (here, end_of_destination(case, &mut destination))
    }
}

/// What is to happen happens, with that message held by who sends it.
fn strike(case: Case, dice: u64, source: &mut Side, destination: &mut Side) {
    let sends = case.step.way() == Way::ToDestination;
    let (deliver, stop, kill, cut) = ("deliver", "stop", "kill", "drop");
    let verdict = match case.fault {
        Fault::SourceKilled if sends => kill,
        Fault::DestinationKilled if !sends => kill,
        Fault::SourceStopped if sends => stop,
        Fault::DestinationStopped if !sends => stop,
        Fault::SourceKilled => {
            source.signal(Signal::KILL);
            deliver
        }
        Fault::DestinationKilled => {
            destination.signal(Signal::KILL);
            deliver
        }
        Fault::SourceStopped => {
            source.stop();
            deliver
        }
        Fault::DestinationStopped => {
            destination.stop();
            deliver
        }
        Fault::DataReset => {
            source.say(&format!("reset {}", dice % 2));
            source.hear(&["reset"]).expect("it is there");
            deliver
        }
        Fault::BackInTime | Fault::BackTooLate => {
            let away = if case.fault == Fault::BackInTime { 1_000 } else { u64::MAX };
            source.say(&format!("away {away}"));
            source.hear(&["away"]).expect("it is there");
            cut
        }
        Fault::ControlReset => cut,
        other => panic!("{other:?} cannot be planted"),
    };
    let holder = if sends { source } else { destination };
    holder.say(verdict);
    if verdict == stop {
        holder.await_stop();
    }
}

fn end_of_source(case: Case, source: &mut Side) -> End {
    match source.end() {
        Some(end) => end,
        None if case.fault == Fault::SourceKilled => End::Killed,
        None => panic!("{case}: the source has ended without a word"),
    }
}

fn end_of_destination(case: Case, destination: &mut Side) -> End {
    if case.fault == Fault::DestinationKilled {
        return destination.end().unwrap_or(End::Killed);
    }
    // It goes on waiting where it has not heard a whole greeting, or none that it could take.
    let nobody = case.step == Step::Hello
        || destination
            .hear(&["end ", NOBODY])
            .inspect(|line| destination.said.insert(0, line.clone()))
            .is_some_and(|line| line == NOBODY);
    if nobody {
        destination.say("quit");
    }
    match destination.end() {
        // Where pageferry-vmm would wait for the next one: this side takes one guest.
        Some(End::AtSource) if case.step == Step::Hello => End::Waits,
        Some(end) => end,
        None => panic!("{case}: the destination has ended without a word"),
    }
}
