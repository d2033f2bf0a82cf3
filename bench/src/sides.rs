//! A measurement by two processes, a source and a destination: who starts both tells them on stdin what to
//! do, and they answer on stdout, one JSON value a line. What is told and answered is the measurement's own.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use pageferry_cli::child::{OwnedChild, end_with_parent};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::signals;
use rustix::process::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// When one side fails the other mostly does too, and one of them knows why.
const OTHER_SIDES_WORDS: Duration = Duration::from_millis(500);

/// A process of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SideName {
    /// Has the memory that is moved.
    Source,
    /// Has fresh memory for each measurement.
    Destination,
}

impl std::fmt::Display for SideName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// An answer as it goes over the wire; or why there is none, and the side has ended.
type Word<A> = Result<A, String>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// Someone pressed Ctrl-C.
    #[error("cancelled")]
    Cancelled,
    /// A side failed.
    #[error("{0}")]
    Failed(String),
}

/// How a measurement ended: that somebody cancelled it is no failure.
pub(crate) fn outcome(measured: Result<(), Failure>) -> Result<Outcome, Failure> {
    match measured {
        Ok(()) => Ok(Outcome::Completed),
        Err(error) if matches!(error.downcast_ref(), Some(NoAnswer::Cancelled)) => {
            say!("cancelled");
            Ok(Outcome::Cancelled)
        }
        Err(error) => Err(error),
    }
}

/// Both processes. Dropping it ends them and waits until they are gone.
#[derive(Debug)]
pub(crate) struct Sides<A> {
    source: Process,
    destination: Process,
    heard: Receiver<(SideName, Option<Word<A>>)>,
    /// Answers that were not asked for yet.
    early: VecDeque<(SideName, A)>,
    interrupted: Receiver<()>,
}

impl<A: DeserializeOwned + std::fmt::Debug + Send + 'static> Sides<A> {
    /// Starts both, as `side MEASUREMENT source` and `destination`.
    pub(crate) fn start(measurement: &str) -> Result<Self, Failure> {
        let (interrupt, interrupted) = unbounded();
        signals::listen(&signals::ending(), interrupt, |_| ())
            .map_err(|error| format!("failed to listen to signals: {error}"))?;
        let (hear, heard) = unbounded();
        Ok(Self {
            source: Process::start(measurement, SideName::Source, hear.clone())?,
            destination: Process::start(measurement, SideName::Destination, hear)?,
            heard,
            early: VecDeque::new(),
            interrupted,
        })
    }

    /// Tells a side what to do.
    pub(crate) fn tell(&mut self, side: SideName, order: &impl Serialize) -> Result<(), Failure> {
        let process = match side {
            SideName::Source => &mut self.source,
            SideName::Destination => &mut self.destination,
        };
        let line = format!("{}\n", serde_json::to_string(order)?);
        let told = process.stdin.write_all(line.as_bytes());
        told.map_err(|error| format!("failed to talk to the {side}: {error}").into())
    }

    /// Waits for what `wanted` makes of the next answer of a side.
    pub(crate) fn answer<T>(
        &mut self,
        side: SideName,
        wanted: impl FnOnce(A) -> Option<T>,
    ) -> Result<T, NoAnswer> {
        let answer = loop {
            if let Some(at) = self.early.iter().position(|(from, _)| *from == side)
                && let Some((_, answer)) = self.early.remove(at)
            {
                break answer;
            }
            select! {
                recv(self.interrupted) -> _ => return Err(NoAnswer::Cancelled),
                recv(self.heard) -> heard => match heard {
                    Ok((from, Some(Err(why)))) => return Err(self.failed(from, &why)),
                    Ok((from, Some(Ok(answer)))) => self.early.push_back((from, answer)),
                    Ok((from, None)) => return Err(self.failed(from, "it ended by itself")),
                    Err(error) => return Err(NoAnswer::Failed(error.to_string())),
                }
            }
        };
        let unexpected = format!("the {side} gave an unexpected answer: {answer:?}");
        wanted(answer).ok_or(NoAnswer::Failed(unexpected))
    }

    /// What went wrong, with what the other side has to say about it.
    fn failed(&self, side: SideName, why: &str) -> NoAnswer {
        let mut text = format!("{side}: {why}");
        while let Ok((from, answer)) = self.heard.recv_timeout(OTHER_SIDES_WORDS) {
            match answer {
                Some(Err(why)) => text = format!("{text}; {from}: {why}"),
                _ if from == side => {}
                _ => break,
            }
        }
        NoAnswer::Failed(text)
    }
}

#[derive(Debug)]
struct Process {
    _child: OwnedChild,
    stdin: ChildStdin,
}

impl Process {
    fn start<A: DeserializeOwned + Send + 'static>(
        measurement: &str,
        name: SideName,
        hear: Sender<(SideName, Option<Word<A>>)>,
    ) -> Result<Self, Failure> {
        let failed = |error| format!("failed to start the {name}: {error}");
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["side", measurement, &name.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for us, who end both.
            .process_group(0);
        let mut child = OwnedChild::spawn(&mut command).map_err(failed)?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(std::io::ErrorKind::BrokenPipe.into()).into());
        };
        let process = Self { _child: child, stdin };
        thread::Builder::new()
            .name(format!("hear-{name}"))
            .spawn(move || listen(name, stdout, &hear))
            .map_err(failed)?;
        Ok(process)
    }
}

/// Passes a side's answers on, and `None` at their end.
fn listen<A: DeserializeOwned>(
    name: SideName,
    stdout: ChildStdout,
    hear: &Sender<(SideName, Option<Word<A>>)>,
) {
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        let answer = serde_json::from_str(&line)
            .unwrap_or_else(|error| Err(format!("it said nonsense: {error}")));
        if hear.send((name, Some(answer))).is_err() {
            return;
        }
    }
    // Nobody may listen any more.
    let _ = hear.send((name, None));
}

/// The life of a side: does what it is told until stdin ends.
pub(crate) fn serve<O: DeserializeOwned>(
    mut obey: impl FnMut(O) -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    // Ends with its parent even while it is busy.
    end_with_parent(Signal::KILL)?;
    for line in stdin().lock().lines() {
        let order = serde_json::from_str(&line?)?;
        if let Err(error) = obey(order) {
            tell_parent(&Word::<()>::Err(pageferry::Chain::of(&*error).to_string()))?;
            return Ok(Outcome::Failed);
        }
    }
    Ok(Outcome::Completed)
}

/// Answers who started this side.
pub(crate) fn answer(answer: &impl Serialize) -> Result<(), Failure> {
    tell_parent(&Word::Ok(answer))
}

fn tell_parent(word: &Word<impl Serialize>) -> Result<(), Failure> {
    let line = format!("{}\n", serde_json::to_string(word)?);
    Ok(stdout().write_all(line.as_bytes())?)
}
