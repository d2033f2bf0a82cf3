//! `demo`: a source and a destination as two processes, a guest that moves from one to the
//! other, and a verdict.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, after, bounded, never, select_biased, unbounded};
use pageferry::Statistics;
use pageferry_cli::child::OwnedChild;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report, Timeline, page};
use pageferry_cli::say;
use pageferry_cli::units::{options, value_name};
use pageferry_cli::wishes::{Wish, listen_to_signals};
use pageferry_vmm::guest::{GuestConfig, GuestKind};
use pageferry_vmm::tracking::DirtyTracking;
use rustix::process::{Pid, Signal, kill_process};

use crate::args::DemoArgs;
use crate::report::of_source;

/// How long the guest runs on where it ends up, before its memory is checked.
const RUN_ON: &str = "300ms";

/// How long a process may take to listen, or to end once the other has.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn demo(args: &DemoArgs) -> Result<Outcome, Failure> {
    // Decided once, so that it is said once, and before anything starts.
    let config = crate::run::config(&args.guest)?;
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let tracking = crate::run::tracking(&args.guest, config.kind)?;
    let listen = match &args.listen {
        Some(listen) => listen.clone(),
        None => args.migration.transport.address_here(&args.migration.rdma)?,
    };
    let mut destination =
        Process::start("destination", &destination_args(args, &listen), Stdio::piped())?;
    let Some(address) = destination.listening_on(&wishes)? else {
        return finish(args, called_off(args, &config, tracking), [None, None]);
    };
    let mut source = Process::start(
        "source",
        &source_args(args, config.kind, tracking, &address),
        Stdio::inherit(),
    )?;

    let mut departed =
        source.await_report(&wishes, None)?.unwrap_or_else(|| called_off(args, &config, tracking));
    if departed.outcome != Outcome::Completed {
        // The destination ends by what the source tells it; but a source that never came to
        // connect has told it nothing.
        destination.interrupt();
    }
    let mut arrived = destination
        .await_report(&wishes, Some(PATIENCE))
        .and_then(|arrived| arrived.ok_or_else(|| "the destination was interrupted".into()));
    let there = arrived.as_mut().ok().and_then(|arrived| arrived.timeline.take());
    let timelines = [departed.timeline.take(), there];
    finish(args, merge(departed, arrived), timelines)
}

fn finish(
    args: &DemoArgs,
    mut report: Report,
    timelines: [Option<Timeline>; 2],
) -> Result<Outcome, Failure> {
    if let Some(path) = &args.report
        && let Err(error) = page::write(path, &report, timelines)
    {
        report.fail(error.to_string());
    }
    report.print(args.json)?;
    Ok(report.outcome)
}

/// The report in place of a source's that was interrupted before it listened to that.
fn called_off(args: &DemoArgs, config: &GuestConfig, tracking: DirtyTracking) -> Report {
    let ended = (Outcome::Cancelled, GuestAt::Source);
    let transport = args.migration.transport.name();
    let statistics = Statistics::default();
    let guest = (config, tracking);
    let mut report = of_source(ended, transport, guest, &args.migration, &statistics);
    report.error = Some("cancelled before the guest had started".to_owned());
    report
}

fn source_args(
    args: &DemoArgs,
    kind: GuestKind,
    tracking: DirtyTracking,
    address: &str,
) -> Vec<String> {
    let guest = &args.guest;
    let mut list =
        ["run", "--json", "--with-parent", "--run-for", RUN_ON].map(str::to_owned).to_vec();
    list.extend(options([
        ("migrate-to", Some(address.to_owned())),
        ("memory", Some(guest.memory().to_string())),
        ("working-set", Some(guest.working_set().to_string())),
        ("workload", Some(value_name(&guest.workload))),
        ("vcpus", Some(guest.vcpus.to_string())),
        ("backing", Some(value_name(&guest.backing))),
        ("cpu-baseline", guest.cpu_baseline.as_ref().map(|file| file.display().to_string())),
        ("guest", Some(value_name(&kind))),
        ("dirty-source", Some(value_name(&tracking))),
        ("seed", Some(guest.seed.to_string())),
        ("dirty-rate", guest.dirty_rate.map(|rate| rate.to_string())),
    ]));
    if args.verify {
        list.push("--verify".to_owned());
    }
    if args.report.is_some() {
        list.push("--timeline".to_owned());
    }
    list.extend(args.migration.to_command_line());
    list
}

fn destination_args(args: &DemoArgs, listen: &str) -> Vec<String> {
    let mut list =
        ["receive", "--json", "--with-parent", "--run-for", RUN_ON].map(str::to_owned).to_vec();
    list.extend(options([
        ("listen", Some(listen.to_owned())),
        ("backing", Some(value_name(&args.guest.backing))),
        ("populate", Some(args.populate.to_string())),
    ]));
    list.extend(args.migration.for_both_sides());
    if args.report.is_some() {
        list.push("--timeline".to_owned());
    }
    list
}

/// One side.
struct Process {
    name: &'static str,
    child: OwnedChild,
    lines: Option<Receiver<String>>,
}

impl Process {
    fn start(name: &'static str, args: &[String], stderr: Stdio) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            // Ctrl-C is for the demo, which passes it on to the source.
            .process_group(0);
        let mut child = OwnedChild::spawn(&mut command)
            .map_err(|error| format!("failed to start the {name}: {error}"))?;
        let lines = child.stderr.take().map(|stderr| forward_lines(name, stderr));
        Ok(Self { name, child, lines })
    }

    /// The address from the line that a listening destination writes; `None` if a Ctrl-C came first.
    fn listening_on(&mut self, wishes: &Receiver<Wish>) -> Result<Option<String>, Failure> {
        let timer = after(PATIENCE);
        let lines = self.lines.as_ref().ok_or("the destination's messages are not read")?;
        let silent = "the destination did not start to listen; its messages are above";
        loop {
            select_biased! {
                recv(wishes) -> wish => if matches!(wish, Ok(Wish::Interrupt)) {
                    return Ok(None);
                },
                recv(lines) -> line => {
                    let line = line.map_err(|_| silent)?;
                    if let Some(address) = line.strip_prefix("listening on ") {
                        return Ok(Some(address.to_owned()));
                    }
                }
                recv(timer) -> _ => return Err(silent.into()),
            }
        }
    }

    /// Waits for the process to end, and reads its report; `None` if a Ctrl-C ended it before
    /// it had one. Ctrl-C goes on to the process.
    fn await_report(
        &mut self,
        wishes: &Receiver<Wish>,
        patience: Option<Duration>,
    ) -> Result<Option<Report>, Failure> {
        let Some(mut stdout) = self.child.stdout.take() else {
            return Err(format!("the {}'s report was read before", self.name).into());
        };
        let (done, ended) = bounded(1);
        thread::spawn(move || {
            let mut text = String::new();
            let read = stdout.read_to_string(&mut text).map(|_| text);
            done.send(read)
        });
        let timer = patience.map_or_else(never, after);
        let text = loop {
            select_biased! {
                recv(wishes) -> wish => if matches!(wish, Ok(Wish::Interrupt)) {
                    self.interrupt();
                },
                recv(ended) -> text => break text??,
                recv(timer) -> _ => return Err(format!("the {} does not end", self.name).into()),
            }
        };
        let status = self.child.wait()?;
        if text.is_empty() && status.signal() == Some(Signal::INT.as_raw()) {
            return Ok(None);
        }
        serde_json::from_str(&text).map(Some).map_err(|_| {
            format!("the {} ended with {status} and without a report", self.name).into()
        })
    }

    fn interrupt(&self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
            && let Err(error) = kill_process(pid, Signal::INT)
        {
            say!("failed to interrupt the {}: {error}", self.name);
        }
    }
}

/// Shows a process's messages with its name, and hands them on.
fn forward_lines(name: &'static str, stderr: impl Read + Send + 'static) -> Receiver<String> {
    let (lines_in, lines) = unbounded();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(std::io::Result::ok) {
            say!("{name}: {line}");
            // Nobody listens once the address is known.
            let _ = lines_in.send(line);
        }
    });
    lines
}

/// One report of both sides': the source knows the migration, the destination the guest after it.
fn merge(mut report: Report, arrived: Result<Report, Failure>) -> Report {
    match (report.outcome, arrived) {
        (Outcome::Completed, Ok(arrived)) => {
            report.oracle_ok = arrived.oracle_ok;
            report.oracle = arrived.oracle;
            report.populated = arrived.populated;
            report.heartbeats = arrived.heartbeats;
            report.heartbeat_gap_ms = arrived.heartbeat_gap_ms;
            if arrived.outcome != Outcome::Completed {
                report.fail(arrived.error.unwrap_or_else(|| "the destination failed".to_owned()));
            } else if !report.checks_passed() || report.oracle_ok.is_none() {
                report.fail("a check failed at the destination".to_owned());
            }
        }
        (Outcome::Completed, Err(error)) => {
            report.guest_at = GuestAt::Unknown;
            report.fail(format!("the guest was handed over, and then: {error}"));
        }
        // The guest is at the source, which has said all there is to say.
        _ => {}
    }
    report
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use pageferry_cli::migration::MigrationArgs;

    use crate::args::{Cli, Command as Parsed};

    /// Over their whole range, and to the nanosecond.
    #[test]
    fn times_arrive_as_they_were_given() {
        for time in ["1ns", "999ns", "1s 1us 1ns", "18446744073709551615s 999999999ns"] {
            let given = ["pageferry-vmm", "demo", "--downtime-limit", time, "--deadline", time];
            let Parsed::Demo(args) = Cli::try_parse_from(given).expect("a command line").command
            else {
                panic!("no demo")
            };
            let list =
                source_args(&args, GuestKind::Process, DirtyTracking::Auto, "127.0.0.1:7400");
            let source = Cli::try_parse_from(["pageferry-vmm".to_owned()].iter().chain(&list));
            let Parsed::Run(source) = source.expect("a command line").command else {
                panic!("no source")
            };
            let of = |args: &MigrationArgs| (args.downtime_limit, args.deadline);
            assert_eq!(of(&source.onward.migration), of(&args.migration), "{time}");
        }
    }
}
