//! What a migration did: the JSON object, a table for people, and a page of plots.

pub mod page;
mod table;
mod timeline;

use std::time::Duration;

use pageferry::{Ending, Statistics};
use pageferry_report::document::{Downtime, ZeroCopy, ms};
use serde::{Deserialize, Serialize};

use crate::migration::MigrationArgs;
use crate::outcome::Outcome;
use crate::output;

pub use timeline::Timeline;

/// Version of the JSON object. Fields are added, never repurposed.
pub const SCHEMA: u32 = 1;

/// Where the guest is at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestAt {
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
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it is not "completed".
    pub error: Option<String>,
    /// Where the guest is.
    pub guest_at: GuestAt,
    /// Whether it is paused there because it was paused before.
    pub guest_paused: bool,
    /// "kvm" or "process".
    pub guest: Option<String>,
    /// What the guest does.
    pub workload: Option<String>,
    /// Its virtual CPUs.
    pub vcpus: Option<u8>,
    /// What backs its memory.
    pub backing: Option<String>,
    /// As `--dirty-source` calls it; the source knows.
    pub dirty_source: Option<String>,
    /// What moved the pages.
    pub transport: String,
    /// Data channels that were asked for; how many of them are used may change on the way.
    pub channels: u16,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// What of it the guest writes to.
    pub working_set_bytes: Option<u64>,
    /// From the call to its return.
    pub total_ms: f64,
    /// Before the first page.
    pub setup_ms: f64,
    /// Registering guest memory.
    pub registration_ms: f64,
    /// Registering guest memory while pages flowed, by all of this side's threads together.
    pub registered_on_the_way_ms: f64,
    /// All the guest stood still, comparing memory apart.
    pub downtime_ms: f64,
    /// Its parts.
    pub downtime: Downtime,
    /// Standstill for comparing memory, on top of `downtime_ms`.
    pub verify_ms: f64,
    /// The limit that held at the last switchover; where there was none, in the end.
    pub downtime_limit_ms: Option<f64>,
    /// What was expected when the last switchover was decided on.
    pub predicted_downtime_ms: Option<f64>,
    /// How often a switchover was tried.
    pub switchover_attempts: u32,
    /// Standstill for switchovers that were called off, all together.
    pub called_off_ms: f64,
    /// By how much the guest was slowed down at most.
    pub throttle_max_percent: u8,
    /// "converged", "throttled", "gave-up", or "undecided"; the source knows.
    pub convergence: Option<String>,
    /// Rounds over dirty pages.
    pub rounds: u32,
    /// Pages.
    pub pages: PagesReport,
    /// Bytes on the wire.
    pub bytes_on_wire: u64,
    /// Page bytes copied in user space.
    pub user_copied_bytes: u64,
    /// What became of zero-copy sends.
    pub zero_copy: ZeroCopy,
    /// System calls that moved data.
    pub system_calls: u64,
    /// How often the link was made anew: because it was lost, or lacked data channels.
    pub rejoins: u32,
    /// Data channels lost on the way; others took over.
    pub lost_channels: u32,
    /// How many of them were there again later, on another link.
    pub reopened_channels: u32,
    /// Pages that arrived otherwise than they were sent, with those that lie near; they were sent again. The source knows.
    pub damaged_pages: u64,
    /// How often pages were dealt out anew since a channel lagged.
    pub rebalances: u32,
    /// What was done at the destination ahead of the data.
    pub populated: PopulatedReport,
    /// Device state: its length, and what saving and loading it took, as far as this side knows.
    pub device_state_bytes: u64,
    /// Saving it.
    pub device_state_save_ms: f64,
    /// Loading it.
    pub device_state_load_ms: f64,
    /// CPU time of the source's process during the migration, the guest's included.
    pub cpu_ms: Option<f64>,
    /// Bits on the wire a second, in 10⁹.
    pub throughput_gbps: f64,
    /// Pages the guest wrote a second, in the last round that it ran.
    pub dirty_pages_per_second: f64,
    /// Beats of the guest's heart.
    pub heartbeats: Option<u64>,
    /// The longest time between two.
    pub heartbeat_gap_ms: Option<f64>,
    /// Whether the guest found its memory right.
    pub oracle_ok: Option<bool>,
    /// In its words.
    pub oracle: Option<String>,
    /// Whether memory is the same on both sides, where it was compared.
    pub memory_match: Option<bool>,
    /// Of a guest that has to stand still whenever it is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulses: Option<Pulses>,
    /// Between the processes of a demo only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

/// Moments that a guest stood still so that it could be looked at what it wrote; not part of the downtime.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Pulses {
    /// How many.
    pub count: u64,
    /// All together.
    pub total_ms: f64,
    /// The longest.
    pub longest_ms: f64,
}

/// What was done at the destination ahead of the data.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct PopulatedReport {
    /// Threads that did it.
    pub threads: u16,
    /// Memory they allocated.
    pub bytes: u64,
    /// How long that took.
    pub ms: f64,
}

/// Pages by how they were sent, or not.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct PagesReport {
    /// Sent as they are.
    pub data: u64,
    /// Zero, and not sent.
    pub zero: u64,
    /// Sent encoded.
    pub encoded: u64,
}

impl Report {
    /// With what the engine says.
    pub fn new(
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
            guest_paused: false,
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
            downtime: downtime.into(),
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
            zero_copy: statistics.zero_copy.into(),
            system_calls: statistics.system_calls,
            rejoins: statistics.rejoins,
            lost_channels: statistics.lost_channels,
            reopened_channels: statistics.reopened_channels,
            damaged_pages: statistics.damaged_pages,
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
            pulses: None,
            timeline: None,
        }
    }

    /// Of a program that failed before there was a migration to report, or after it lost its guest.
    pub fn of_failure(transport: &str, why: String) -> Self {
        let (outcome, at) = (Outcome::Failed, GuestAt::Nowhere);
        let mut report = Self::new(outcome, at, transport, 0, 0, &Statistics::default());
        report.error = Some(why);
        report
    }

    /// Of the side that has the whole picture.
    pub fn of_source(
        (outcome, guest_at): (Outcome, GuestAt),
        transport: &str,
        memory_bytes: u64,
        args: &MigrationArgs,
        statistics: &Statistics,
    ) -> Self {
        let mut report =
            Self::new(outcome, guest_at, transport, args.channels, memory_bytes, statistics);
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

    /// The limit that held at the last switchover, or in the end where there was none.
    pub fn downtime_limit(&mut self, limit: Duration) {
        self.downtime_limit_ms = Some(ms(limit));
    }

    /// What the guest noticed: so many beats, and the longest time between two.
    pub fn heartbeat(&mut self, beats: u64, longest_gap: Duration) {
        self.heartbeats = Some(beats);
        self.heartbeat_gap_ms = Some(ms(longest_gap));
    }

    /// What the migration took of this process's CPU time.
    pub fn cpu_time(&mut self, took: Duration) {
        self.cpu_ms = Some(ms(took));
    }

    /// Whether the guest found its own memory right.
    pub fn oracle(&mut self, ok: bool, detail: String) {
        self.oracle_ok = Some(ok);
        self.oracle = Some(detail);
    }

    /// Records a failure, without making an earlier one better.
    pub fn fail(&mut self, why: String) {
        if matches!(self.outcome, Outcome::Completed | Outcome::Cancelled) {
            self.outcome = Outcome::Failed;
        }
        self.error = Some(match self.error.take() {
            Some(earlier) => format!("{earlier}; {why}"),
            None => why,
        });
    }

    /// Whether no check that was made failed.
    pub fn checks_passed(&self) -> bool {
        self.oracle_ok != Some(false) && self.memory_match != Some(false)
    }

    /// The object on stdout, or the table. If nobody reads it, the guest runs all the same.
    pub fn print(&self, json: bool) -> Result<(), serde_json::Error> {
        let text = if json { serde_json::to_string(self)? } else { self.table().to_string() };
        if let Err(error) = output::line(&text) {
            say!("failed to print the report: {error}");
        }
        Ok(())
    }
}
