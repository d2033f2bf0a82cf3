//! One case, by two processes and the way between them.

use std::time::{Duration, Instant};

use pageferry_tcp::preamble::Kind;
use rustix::process::Signal;

use crate::support::process::Process;
use crate::support::sides::{destination, source};

use super::model::{Case, End, Fault, Step, Way};
use super::path::{Path, Verdict};

/// What two sides wait for each other, in all: less than a person would, more than a busy machine holds them up.
const LIMITS: &[&str] = &[
    "--rejoin-timeout=4s",
    "--stall-timeout=3s",
    "--load-timeout=3s",
    "--commit-timeout=3s",
    "--handshake-timeout=3s",
    "--registration-timeout-per-gib=1s",
    "--connect-timeout=2s",
];

/// For how long a link is away that comes back.
const AWAY: Duration = Duration::from_secs(1);

/// What became of a case.
pub(super) struct Outcome {
    pub(super) ends: (End, End),
    pub(super) took: Duration,
}

/// Makes it happen. Panics where a guest is lost or not right, and where it does not end; `dice` are for what the case
/// leaves open.
pub(super) fn play(case: Case, dice: u64) -> Outcome {
    let began = Instant::now();
    let both = [LIMITS, &["--transport", case.transport]].concat();
    let (mut destination, address) = destination(&both);
    let steps: Vec<_> = case.step.needs_a_cut_at().into_iter().chain([case.step]).collect();
    let path = Path::to(&address, &steps);
    // A rate at which memory converges, and the guest is not throttled.
    let more = ["--verify", "--channels=2", "--dirty-rate=2000", "--downtime-limit=1s"];
    let mut source = source(&[&both, &more[..]].concat());
    let beats = source.beats();
    source.say(format!("migrate {}", path.address));

    if case.step.needs_a_cut_at().is_some() {
        path.await_step().unwrap_or_else(|| panic!("{case}: it was not to be cut"));
        path.reset(|_| true);
        path.go_on(Verdict::Drop);
    }
    let frame = path.await_step().unwrap_or_else(|| panic!("{case}: that step did not come"));
    strike(case, dice, frame, &path, &source, &destination);

    // Who was stopped goes on once the other one has ended.
    let ends = if case.fault == Fault::SourceStopped {
        let there = end_of_destination(case, &mut destination);
        source.signal(Signal::CONT);
        (end_of_source(case, &mut source, beats), there)
    } else {
        let here = end_of_source(case, &mut source, beats);
        if case.fault == Fault::DestinationStopped {
            destination.signal(Signal::CONT);
        }
        (here, end_of_destination(case, &mut destination))
    };
    Outcome { ends, took: began.elapsed() }
}

/// What is to happen happens, with that message under way.
fn strike(
    case: Case,
    dice: u64,
    frame: Vec<u8>,
    path: &Path,
    source: &Process,
    destination: &Process,
) {
    let way = case.step.way();
    match case.fault {
        Fault::SourceKilled => source.signal(Signal::KILL),
        Fault::DestinationKilled => destination.signal(Signal::KILL),
        Fault::SourceStopped => source.stop(),
        Fault::DestinationStopped => destination.stop(),
        Fault::ControlReset => drop(path.reset(|kind| kind == Kind::Control)),
        Fault::DataReset => {
            let channel = u16::from(dice & 1 != 0);
            path.reset(|kind| kind == Kind::Data { channel });
        }
        Fault::BlackHole(blocked) => path.block(blocked),
        Fault::BlackHoles => {
            path.block(Way::ToDestination);
            path.block(Way::ToSource);
        }
        Fault::HalfClosed => path.close_half(way),
        Fault::Flipped => {}
        Fault::BackInTime => path.cut_for(AWAY),
        Fault::BackTooLate => path.cut_for_good(),
    }
    path.go_on(match case.fault {
        Fault::Flipped => Verdict::Replace(flipped(frame, dice)),
        fault if fault.delivers(way) => Verdict::Deliver,
        _ => Verdict::Drop,
    });
}

/// With one bit changed.
fn flipped(mut frame: Vec<u8>, dice: u64) -> Vec<u8> {
    let bit = usize::try_from(dice).unwrap_or(0) % (frame.len() * 8);
    frame[bit / 8] ^= 1 << (bit % 8);
    frame
}

fn end_of_source(case: Case, source: &mut Process, beats: u64) -> End {
    if case.fault == Fault::SourceKilled {
        source.finish();
        return End::Killed;
    }
    let report = source.await_report();
    match (report.text("outcome"), report.text("guest_at")) {
        ("failed", "source") => {
            report.assert_kept("failed", &[], beats);
            source.finish().assert_status(1);
            End::AtSource
        }
        // By the destination, which was told to end.
        ("cancelled", "source") if case.step == Step::Hello => {
            report.assert_kept("cancelled", &[], beats);
            source.finish().assert_status(3);
            End::AtSource
        }
        ("completed", "destination") => {
            report.assert_departed();
            source.finish().assert_status(0);
            End::AtDestination
        }
        ("uncertain", "unknown") => keeps_its_copy(source),
        other => panic!("{case}: a source of {other:?}"),
    }
}

fn end_of_destination(case: Case, destination: &mut Process) -> End {
    if case.fault == Fault::DestinationKilled {
        destination.finish();
        return End::Killed;
    }
    // It goes on waiting where it has not heard a whole greeting, or none that it could take.
    let report = match case.step {
        Step::Hello => None,
        _ => destination.await_report_unless("no guest came from"),
    };
    let Some(report) = report else {
        destination.signal(Signal::INT);
        destination.finish().report(3).assert_did_not_come("cancelled", &[]);
        return End::Waits;
    };
    match (report.text("outcome"), report.text("guest_at")) {
        ("failed", "source") => {
            report.assert_did_not_come("failed", &[]);
            destination.finish().assert_status(1);
            End::AtSource
        }
        ("completed", "destination") => {
            report.assert_arrived();
            assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
            destination.finish().assert_status(0);
            End::AtDestination
        }
        ("uncertain", "unknown") => keeps_its_copy(destination),
        other => panic!("{case}: a destination of {other:?}"),
    }
}

/// It stays until somebody decides.
fn keeps_its_copy(process: &mut Process) -> End {
    assert!(process.lives());
    process.signal(Signal::INT);
    process.finish().assert_status(4);
    End::Uncertain
}
