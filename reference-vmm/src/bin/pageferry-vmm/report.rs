//! What a report says of this VMM's guests.

use std::time::Duration;

use pageferry::Statistics;
use pageferry_cli::migration::MigrationArgs;
use pageferry_cli::outcome::Outcome;
use pageferry_cli::report::{GuestAt, Report};
use pageferry_vmm::error::GuestError;
use pageferry_vmm::guest::{Guest, GuestConfig};
use pageferry_vmm::heartbeat::HeartbeatSnapshot;
use pageferry_vmm::tracking::DirtyTracking;

/// Of the side that has the whole picture.
pub(crate) fn of_source(
    ended: (Outcome, GuestAt),
    transport: &str,
    (config, tracking): (&GuestConfig, DirtyTracking),
    args: &MigrationArgs,
    statistics: &Statistics,
) -> Report {
    let memory_bytes = config.memory_bytes();
    let mut report = Report::of_source(ended, transport, memory_bytes, args, statistics);
    describe(&mut report, config);
    report.dirty_source = Some(tracking.to_string());
    report
}

/// What the guest is.
pub(crate) fn describe(report: &mut Report, config: &GuestConfig) {
    report.guest = Some(config.kind.to_string());
    report.workload = Some(config.workload.kind.to_string());
    report.vcpus = Some(config.vcpus);
    report.backing = Some(config.backing.to_string());
    report.working_set_bytes = Some(config.workload.working_set_bytes);
}

/// What it noticed.
pub(crate) fn heartbeat(report: &mut Report, seen: HeartbeatSnapshot) {
    report.heartbeat(seen.beats, Duration::from_nanos(seen.longest_gap_ns));
}

/// Pauses the guest for good and looks whether its memory is what it wrote.
pub(crate) fn check(guest: &mut Guest, report: &mut Report) -> Result<(), GuestError> {
    guest.pause()?;
    let oracle = guest.check_oracle();
    if !oracle.ok {
        report.fail(format!("the guest's memory is wrong: {}", oracle.detail));
    }
    report.oracle(oracle.ok, oracle.detail);
    if let Some(failure) = guest.failure() {
        report.fail(format!("the guest ended: {failure}"));
    }
    Ok(())
}
