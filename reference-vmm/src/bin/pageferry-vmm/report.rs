//! What a migration did, as one JSON object and as a table for people.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table};
use indicatif::{HumanBytes, HumanCount};
use pageferry::memory::PAGE_BYTES;
use pageferry::{Ending, Statistics};
use pageferry_cli::migration::MigrationArgs;
use pageferry_cli::outcome::Outcome;
use pageferry_cli::output;
use pageferry_cli::say;
use pageferry_vmm::guest::GuestConfig;
use pageferry_vmm::heartbeat::HeartbeatSnapshot;
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::OracleReport;
use serde::{Deserialize, Serialize};

use crate::timeline::Timeline;

/// Version of the JSON object. Fields are added, never repurposed.
const SCHEMA: u32 = 1;

/// Where the guest is at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GuestAt {
    /// It runs at the source.
    Source,
    /// It runs at the destination.
    Destination,
    /// It is paused at the source, which owns it.
    Paused,
    /// Both sides have a paused copy, or one has and the other runs.
    Unknown,
    /// The program failed before there was one, or lost it.
    Nowhere,
}

/// The JSON object. What a side cannot know is null.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) schema: u32,
    pub(crate) outcome: Outcome,
    /// Why it is not "completed".
    pub(crate) error: Option<String>,
    pub(crate) guest_at: GuestAt,
    /// "kvm" or "process".
    pub(crate) guest: Option<String>,
    pub(crate) workload: Option<String>,
    pub(crate) vcpus: Option<u8>,
    pub(crate) backing: Option<String>,
    /// As `--dirty-source` calls it; the source knows.
    pub(crate) dirty_source: Option<String>,
    pub(crate) transport: String,
    /// Data channels that were asked for; how many of them are used may change on the way.
    pub(crate) channels: u16,
    pub(crate) memory_bytes: u64,
    pub(crate) working_set_bytes: Option<u64>,
    pub(crate) total_ms: f64,
    pub(crate) setup_ms: f64,
    pub(crate) registration_ms: f64,
    /// Registering guest memory while pages flowed, by all of this side's threads together.
    pub(crate) registered_on_the_way_ms: f64,
    pub(crate) downtime_ms: f64,
    pub(crate) downtime: DowntimeReport,
    /// Standstill for comparing memory, on top of `downtime_ms`.
    pub(crate) verify_ms: f64,
    /// The limit that held at the last switchover; where there was none, in the end.
    pub(crate) downtime_limit_ms: Option<f64>,
    /// What was expected when the last switchover was decided on.
    pub(crate) predicted_downtime_ms: Option<f64>,
    pub(crate) switchover_attempts: u32,
    /// Standstill for switchovers that were called off, all together.
    pub(crate) called_off_ms: f64,
    pub(crate) throttle_max_percent: u8,
    /// "converged", "throttled", "gave-up", or "undecided"; the source knows.
    pub(crate) convergence: Option<String>,
    pub(crate) rounds: u32,
    pub(crate) pages: PagesReport,
    pub(crate) bytes_on_wire: u64,
    pub(crate) user_copied_bytes: u64,
    pub(crate) zero_copy: ZeroCopyReport,
    pub(crate) system_calls: u64,
    /// Data channels lost on the way; others took over.
    pub(crate) lost_channels: u16,
    /// How often pages were dealt out anew since a channel lagged.
    pub(crate) rebalances: u32,
    /// What was done at the destination ahead of the data.
    pub(crate) populated: PopulatedReport,
    /// Device state: its length, and what saving and loading it took, as far as this side knows.
    pub(crate) device_state_bytes: u64,
    pub(crate) device_state_save_ms: f64,
    pub(crate) device_state_load_ms: f64,
    /// CPU time of the source's process during the migration, the guest's included.
    pub(crate) cpu_ms: Option<f64>,
    pub(crate) throughput_gbps: f64,
    pub(crate) dirty_pages_per_second: f64,
    pub(crate) heartbeats: Option<u64>,
    pub(crate) heartbeat_gap_ms: Option<f64>,
    pub(crate) oracle_ok: Option<bool>,
    pub(crate) oracle: Option<String>,
    pub(crate) memory_match: Option<bool>,
    /// Between the processes of a demo only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) timeline: Option<Timeline>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct DowntimeReport {
    pub(crate) pause: f64,
    pub(crate) final_harvest: f64,
    pub(crate) final_pages: f64,
    pub(crate) device_state: f64,
    pub(crate) commit: f64,
    pub(crate) resume: f64,
}

/// What became of sends that asked the kernel not to copy.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct ZeroCopyReport {
    /// Sends that are complete.
    pub(crate) sent: u64,
    /// Those of them that the kernel copied after all.
    pub(crate) copied_by_kernel: u64,
    /// Bytes of either.
    pub(crate) sent_bytes: u64,
    pub(crate) copied_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct PopulatedReport {
    pub(crate) threads: u16,
    pub(crate) bytes: u64,
    pub(crate) ms: f64,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct PagesReport {
    pub(crate) data: u64,
    pub(crate) zero: u64,
    pub(crate) encoded: u64,
}

fn ms(duration: Duration) -> f64 {
    // Microseconds are as far as these figures mean anything.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

impl Report {
    pub(crate) fn new(
        outcome: Outcome,
        guest_at: GuestAt,
        transport: &str,
        channels: u16,
        memory_bytes: u64,
        statistics: &Statistics,
    ) -> Self {
        let downtime = &statistics.downtime;
        Self {
            schema: SCHEMA,
            outcome,
            error: None,
            guest_at,
            guest: None,
            workload: None,
            vcpus: None,
            backing: None,
            dirty_source: None,
            transport: transport.to_owned(),
            channels,
            memory_bytes,
            working_set_bytes: None,
            total_ms: ms(statistics.total),
            setup_ms: ms(statistics.setup),
            registration_ms: ms(statistics.registration.took),
            registered_on_the_way_ms: ms(statistics.registered_on_the_way.took),
            downtime_ms: ms(downtime.total()),
            downtime: DowntimeReport {
                pause: ms(downtime.pause),
                final_harvest: ms(downtime.final_harvest),
                final_pages: ms(downtime.final_pages),
                device_state: ms(downtime.device_state),
                commit: ms(downtime.commit),
                resume: ms(downtime.resume),
            },
            verify_ms: ms(downtime.verify),
            downtime_limit_ms: None,
            predicted_downtime_ms: statistics.predicted_downtime.map(ms),
            switchover_attempts: statistics.switchover_attempts,
            called_off_ms: ms(statistics.called_off),
            throttle_max_percent: statistics.throttle_max_percent,
            convergence: None,
            rounds: statistics.round_count,
            pages: PagesReport {
                data: statistics.pages.data,
                zero: statistics.pages.zero,
                encoded: statistics.pages.encoded,
            },
            bytes_on_wire: statistics.wire_bytes,
            user_copied_bytes: statistics.user_copied_bytes,
            zero_copy: ZeroCopyReport {
                sent: statistics.zero_copy.sent,
                copied_by_kernel: statistics.zero_copy.copied_by_kernel,
                sent_bytes: statistics.zero_copy.sent_bytes,
                copied_bytes: statistics.zero_copy.copied_bytes,
            },
            system_calls: statistics.system_calls,
            lost_channels: statistics.lost_channels,
            rebalances: statistics.rebalances,
            populated: PopulatedReport {
                threads: statistics.populated.threads,
                bytes: statistics.populated.bytes,
                ms: ms(statistics.populated.took),
            },
            device_state_bytes: statistics.device_state.bytes,
            device_state_save_ms: ms(statistics.device_state.save),
            device_state_load_ms: ms(statistics.device_state.load),
            cpu_ms: None,
            throughput_gbps: statistics.throughput_gbps(),
            dirty_pages_per_second: statistics.dirty_pages_per_second,
            heartbeats: None,
            heartbeat_gap_ms: None,
            oracle_ok: None,
            oracle: None,
            memory_match: None,
            timeline: None,
        }
    }

    /// Of a program that failed before there was a migration to report, or after it lost its guest.
    pub(crate) fn of_failure(transport: &str, why: String) -> Self {
        let (outcome, at) = (Outcome::Failed, GuestAt::Nowhere);
        let mut report = Self::new(outcome, at, transport, 0, 0, &Statistics::default());
        report.error = Some(why);
        report
    }

    /// Of the side that has the whole picture.
    pub(crate) fn of_source(
        (outcome, guest_at): (Outcome, GuestAt),
        transport: &str,
        config: &GuestConfig,
        args: &MigrationArgs,
        statistics: &Statistics,
    ) -> Self {
        let memory_bytes = config.regions.iter().map(|(_, len_bytes)| len_bytes).sum();
        let mut report =
            Self::new(outcome, guest_at, transport, args.channels, memory_bytes, statistics);
        report.guest(config);
        report.downtime_limit(args.downtime_limit);
        let convergence = match statistics.convergence {
            Ending::Converged => "converged",
            Ending::Throttled => "throttled",
            Ending::GaveUp => "gave-up",
            _ => "undecided",
        };
        report.convergence = Some(convergence.to_owned());
        report.cpu_ms = Some(0.0);
        report
    }

    pub(crate) fn guest(&mut self, config: &GuestConfig) {
        self.guest = Some(config.kind.to_string());
        self.workload = Some(config.workload.kind.to_string());
        self.vcpus = Some(config.vcpus);
        self.backing = Some(config.backing.to_string());
        self.working_set_bytes = Some(config.workload.working_set_bytes);
    }

    /// The limit that held at the last switchover, or in the end where there was none.
    pub(crate) fn downtime_limit(&mut self, limit: Duration) {
        self.downtime_limit_ms = Some(ms(limit));
    }

    pub(crate) fn dirty_source(&mut self, tracking: DirtyTracking) {
        self.dirty_source = Some(tracking.to_string());
    }

    pub(crate) fn heartbeat(&mut self, seen: HeartbeatSnapshot) {
        self.heartbeats = Some(seen.beats);
        self.heartbeat_gap_ms = Some(ms(Duration::from_nanos(seen.longest_gap_ns)));
    }

    /// What the migration took of this process's CPU time.
    pub(crate) fn cpu_time(&mut self, took: Duration) {
        self.cpu_ms = Some(ms(took));
    }

    pub(crate) fn oracle(&mut self, oracle: &OracleReport) {
        self.oracle_ok = Some(oracle.ok);
        self.oracle = Some(oracle.detail.clone());
    }

    /// Records a failure, without making an earlier one better.
    pub(crate) fn fail(&mut self, why: String) {
        if matches!(self.outcome, Outcome::Completed | Outcome::Cancelled) {
            self.outcome = Outcome::Failed;
        }
        self.error = Some(match self.error.take() {
            Some(earlier) => format!("{earlier}; {why}"),
            None => why,
        });
    }

    /// Whether no check that was made failed.
    pub(crate) fn checks_passed(&self) -> bool {
        self.oracle_ok != Some(false) && self.memory_match != Some(false)
    }

    /// The object on stdout, or the table. If nobody reads it, the guest runs all the same.
    pub(crate) fn print(&self, json: bool) -> Result<(), serde_json::Error> {
        let text = if json { serde_json::to_string(self)? } else { self.table().to_string() };
        if let Err(error) = output::line(&text) {
            say!("failed to print the report: {error}");
        }
        Ok(())
    }

    fn table(&self) -> Table {
        let mut table = output::table();
        let mut row = |name: &str, value: String| {
            let value = Cell::new(value).set_alignment(CellAlignment::Left);
            table.add_row(vec![Cell::new(name), value]);
        };
        let outcome = match self.outcome {
            Outcome::Completed => "completed: the guest runs at the destination",
            Outcome::Cancelled => "cancelled: the guest runs on at the source",
            Outcome::Failed if self.guest_at == GuestAt::Source => {
                "failed: the guest runs on at the source"
            }
            Outcome::Failed if self.guest_at == GuestAt::Paused => {
                "failed: the guest is paused at the source"
            }
            Outcome::Failed => "failed",
            Outcome::Uncertain => "uncertain: see below",
        };
        row("outcome", outcome.to_owned());
        if let Some(error) = &self.error {
            row("error", error.clone());
        }
        if let (Some(guest), Some(workload), Some(vcpus), Some(backing)) =
            (&self.guest, &self.workload, self.vcpus, &self.backing)
        {
            let memory = HumanBytes(self.memory_bytes);
            let working_set = HumanBytes(self.working_set_bytes.unwrap_or_default());
            let text =
                format!("{guest}, {vcpus} vCPU, {memory} {backing}, {workload} over {working_set}");
            row("guest", text);
        }
        if let Some(dirty_source) = &self.dirty_source {
            row("dirty source", dirty_source.clone());
        }
        row("transport", format!("{}, {} data channels", self.transport, self.channels));
        row("total time", format!("{:.1} ms, {} rounds", self.total_ms, self.rounds));
        let moved = HumanBytes(self.bytes_on_wire);
        row("throughput", format!("{:.2} Gb/s, {moved} on the wire", self.throughput_gbps));
        let limit = match self.downtime_limit_ms {
            Some(limit) => format!(" (limit {limit:.0} ms)"),
            None => String::new(),
        };
        let predicted = match self.predicted_downtime_ms {
            Some(predicted) => format!(", predicted {predicted:.2} ms"),
            None => String::new(),
        };
        row("downtime", format!("{:.2} ms{limit}{predicted}", self.downtime_ms));
        let parts = &self.downtime;
        for (name, value) in [
            ("  pause", parts.pause),
            ("  final harvest", parts.final_harvest),
            ("  final pages", parts.final_pages),
            ("  device state", parts.device_state),
            ("  commit", parts.commit),
            ("  resume", parts.resume),
        ] {
            row(name, format!("{value:.2} ms"));
        }
        if self.verify_ms > 0.0 {
            row("verification", format!("{:.1} ms more of standstill, to compare", self.verify_ms));
        }
        if let Some(convergence) = &self.convergence {
            let throttled = match self.throttle_max_percent {
                0 => String::new(),
                percent => format!(", slowed down by up to {percent} %"),
            };
            let (attempts, stood) = (self.switchover_attempts, self.called_off_ms);
            let called_off = if stood > 0.0 {
                format!(", {attempts} switchovers, {stood:.1} ms for those called off")
            } else {
                String::new()
            };
            row("convergence", format!("{convergence}{throttled}{called_off}"));
        }
        let data = HumanBytes(self.pages.data * PAGE_BYTES);
        row("pages sent", format!("{} ({data})", HumanCount(self.pages.data)));
        row("pages zero", format!("{}, not sent", HumanCount(self.pages.zero)));
        row("copied in user space", HumanBytes(self.user_copied_bytes).to_string());
        let ZeroCopyReport { sent_bytes, copied_bytes, .. } = self.zero_copy;
        let (sent, copied) = (HumanBytes(sent_bytes), HumanBytes(copied_bytes));
        row("sent zero-copy", format!("{sent}, {copied} copied by the kernel"));
        if let (Some(beats), Some(gap)) = (self.heartbeats, self.heartbeat_gap_ms) {
            row("the guest noticed", noticed(gap, self.verify_ms, &HumanCount(beats)));
        }
        row(
            "memory",
            match self.memory_match {
                Some(true) => "equal on both sides, by digest".to_owned(),
                Some(false) => "DIFFERS between the sides".to_owned(),
                None => "not compared".to_owned(),
            },
        );
        if let (Some(ok), Some(oracle)) = (self.oracle_ok, &self.oracle) {
            let verdict = if ok { "right" } else { "WRONG" };
            row("oracle in the guest", format!("{verdict}: {oracle}"));
        }
        table
    }
}

/// The longest gap. The one of the switchover holds the time in which memory was compared, which is
/// not part of the downtime.
fn noticed(gap_ms: f64, verify_ms: f64, beats: &HumanCount) -> String {
    let gap = format!("a gap of {gap_ms:.1} ms in {beats} heartbeats");
    if verify_ms > 0.0 { format!("{gap}; verification took {verify_ms:.1} ms") } else { gap }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_told_with_how_long_verification_took() {
        let text = noticed(160.0, 140.0, &HumanCount(1000));
        assert_eq!(text, "a gap of 160.0 ms in 1,000 heartbeats; verification took 140.0 ms");
        assert_eq!(noticed(20.0, 0.0, &HumanCount(7)), "a gap of 20.0 ms in 7 heartbeats");
    }
}
