//! `recover`: what a migration that was broken off has left, and its end.

use std::io;
use std::path::Path;

use comfy_table::Table;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::{output, say};
use pageferry_qemu::quota::Before;
use pageferry_qemu::record::{Record, RecordFile, Standing, unlink};
use pageferry_qemu::{Qmp, QmpError, RunState};
use serde::Serialize;

use crate::args::{Decision, RecoverArgs};

/// What is known here.
#[derive(Debug, Serialize)]
struct Known {
    /// What was written down, if anything was.
    record: Option<Record>,
    /// QEMU's own word; none if it is gone.
    qemu: Option<RunState>,
    /// What to do.
    advice: &'static str,
}

pub(crate) fn recover(args: &RecoverArgs) -> Result<Outcome, Failure> {
    let file = RecordFile::left(&args.qmp)?;
    let qmp = reach(&args.qmp)?;
    let record = file.as_ref().map(RecordFile::record);
    if record.is_none() && qmp.is_none() {
        let path = args.qmp.display();
        return Err(format!(
            "no QEMU listens at {path}, and no migration has left a record beside it"
        )
        .into());
    }
    let state = qmp.as_ref().map(Qmp::run_state).transpose()?;
    let standing = record.as_ref().map(|record| record.standing);
    let (advice, allowed) = advice(standing, state.as_ref().map(|state| state.running));
    let known = Known { record, qemu: state, advice };
    let text = if args.json { serde_json::to_string(&known)? } else { known.table().to_string() };
    output::line(&text)?;
    let Decision { run, quit } = args.decision;
    let may = if run { allowed.run } else { allowed.quit };
    if (run || quit) && !may && !args.force {
        return Err(
            "this may leave two guests that run, or none: --force does it nevertheless".into()
        );
    }
    if run || quit {
        // Whoever stays in those groups has its own speed again.
        known.record.iter().flat_map(|record| &record.slowed).try_for_each(Before::restore)?;
    }
    if run {
        qmp.ok_or("QEMU is gone")?.cont()?;
        say!("the guest runs here");
    } else if quit {
        if let Some(qmp) = qmp {
            qmp.quit()?;
            say!("QEMU was told to quit");
        }
        // QEMU removes its socket itself, a little later, unless it was killed.
        let made = known.record.iter().flat_map(|record| &record.made);
        for path in made.chain([&args.qmp]) {
            unlink(path)
                .map_err(|error| format!("failed to remove {}: {error}", path.display()))?;
        }
    } else {
        return Ok(Outcome::Completed);
    }
    file.map(RecordFile::remove).transpose()?;
    Ok(Outcome::Completed)
}

/// QEMU's monitor; none if QEMU is gone.
fn reach(monitor: &Path) -> Result<Option<Qmp>, QmpError> {
    match Qmp::connect(monitor) {
        Err(QmpError::Connect { cause, .. })
            if matches!(
                cause.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        connected => connected.map(Some),
    }
}

impl Known {
    fn table(&self) -> Table {
        let record = self.record.as_ref().map(|record| {
            let peer = record.peer.as_deref().unwrap_or("a source");
            match record.standing {
                Standing::Here => format!("the guest is here; it was to go to {peer}"),
                Standing::GivingUp => format!("the guest was given to {peer}, or was about to be"),
                Standing::Gone => format!("the guest runs at {peer}"),
                Standing::Awaited => format!("the guest is at the source; {peer} was to send it"),
                Standing::Taken => format!("the guest was given to this side by {peer}"),
            }
        });
        let qemu = self.qemu.as_ref().map(|state| {
            let runs = if state.running { "the guest runs" } else { "the guest stands still" };
            format!("{}, {runs}", state.status)
        });
        let mut table = output::table();
        table.add_row(["record", record.as_deref().unwrap_or("none beside this monitor")]);
        table.add_row(["QEMU", qemu.as_deref().unwrap_or("gone")]);
        table.add_row(["advice", self.advice]);
        table
    }
}

/// What that means for the operator, who knows of both sides, and what may be done without `--force`.
fn advice(standing: Option<Standing>, running: Option<bool>) -> (&'static str, Decision) {
    let (advice, run, quit) = match (standing, running) {
        (None | Some(Standing::Here | Standing::Taken), Some(true)) => {
            ("the guest is here and runs; there is nothing to do", standing.is_some(), false)
        }
        (None, _) => (
            "no record says who has the guest; if it runs nowhere else, --run --force lets it go on",
            false,
            false,
        ),
        (Some(Standing::Here | Standing::Taken), Some(false)) => {
            ("the guest is here and stands still; --run lets it go on", true, false)
        }
        (Some(Standing::Here | Standing::Taken), None) => (
            "the guest was here and is gone with its QEMU; --quit removes what is left of it",
            false,
            true,
        ),
        (Some(Standing::GivingUp), _) => (
            "ask `recover` at the destination. If the guest was given to it: --run there, and then \
             --quit --force here. If it was not: --quit there, and then --run --force here",
            false,
            false,
        ),
        (Some(Standing::Gone | Standing::Awaited), Some(true)) => (
            "the guest runs here although it is the other side's: end one of the two, by --quit --force",
            false,
            false,
        ),
        (Some(Standing::Gone), _) => ("the guest runs there; --quit ends this QEMU", false, true),
        (Some(Standing::Awaited), _) => (
            "the guest is at the source; --quit ends this QEMU and removes the RAM that was made for it",
            false,
            true,
        ),
    };
    (advice, Decision { run, quit })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is known, two guests that run and none take `--force`.
    #[test]
    fn nobody_ends_the_only_guest_or_runs_a_second_one_unasked() {
        use Standing::{Awaited, GivingUp, Gone, Here, Taken};
        for standing in [None, Some(Here), Some(GivingUp), Some(Gone), Some(Awaited), Some(Taken)] {
            for running in [None, Some(false), Some(true)] {
                let (advice, allowed) = advice(standing, running);
                let elsewhere = matches!(standing, Some(Gone | Awaited));
                let here = matches!(standing, Some(Here | Taken));
                let gone = running.is_none();
                assert_eq!(allowed.run, here && !gone, "{standing:?}, {running:?}: {advice}");
                let runs = running == Some(true);
                assert_eq!(
                    allowed.quit,
                    elsewhere && !runs || here && gone,
                    "{standing:?}, {running:?}: {advice}"
                );
            }
        }
    }
}
