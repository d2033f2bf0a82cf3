//! A report as a table for people.

use comfy_table::{Cell, CellAlignment, Table};
use indicatif::{HumanBytes, HumanCount};
use pageferry::memory::PAGE_BYTES;
use pageferry_report::document::ZeroCopy;

use super::{GuestAt, Pulses, Report};
use crate::outcome::Outcome;
use crate::output;

impl Report {
    pub(super) fn table(&self) -> Table {
        let mut table = output::table();
        let mut row = |name: &str, value: String| {
            let value = Cell::new(value).set_alignment(CellAlignment::Left);
            table.add_row(vec![Cell::new(name), value]);
        };
        let outcome = match self.outcome {
            Outcome::Completed if self.guest_paused => "completed: the guest is at the destination",
            Outcome::Completed => "completed: the guest runs at the destination",
            Outcome::Cancelled if self.guest_paused => "cancelled: the guest is at the source",
            Outcome::Cancelled => "cancelled: the guest runs on at the source",
            Outcome::Failed if self.guest_at == GuestAt::Source && self.guest_paused => {
                "failed: the guest is at the source"
            }
            Outcome::Failed if self.guest_at == GuestAt::Source => {
                "failed: the guest runs on at the source"
            }
            Outcome::Failed if self.guest_at == GuestAt::Paused => {
                "failed: the guest is paused at the source"
            }
            Outcome::Failed => "failed",
            Outcome::Uncertain => "uncertain: see below",
        };
        let paused = if self.guest_paused { ", paused as it was" } else { "" };
        row("outcome", format!("{outcome}{paused}"));
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
        if let Some(Pulses { count, total_ms, longest_ms }) = self.pulses {
            let all = format!("{total_ms:.1} ms in all, {longest_ms:.1} ms at most");
            row("stood still for rounds", format!("{count} times, {all}"));
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
        for (name, value) in self.downtime.parts() {
            row(&format!("  {name}"), format!("{value:.2} ms"));
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
        if self.damaged_pages > 0 {
            let pages = HumanCount(self.damaged_pages);
            row("pages damaged", format!("{pages} with those near them, sent again"));
        }
        row("copied in user space", HumanBytes(self.user_copied_bytes).to_string());
        let ZeroCopy { sent_bytes, copied_bytes, .. } = self.zero_copy;
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
