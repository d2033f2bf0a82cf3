//! What came of all scenarios, as one JSON object and as a table for people.

use comfy_table::{Cell, CellAlignment};
use pageferry_cli::outcome::Failure;
use pageferry_cli::say;
use serde::Serialize;

use super::contenders::{ALL, Contender};
use super::migration::{End, Outcome};
use super::scenario::{KINDS, Kind};
use crate::output::{self, SCHEMA};

/// What came of one contender. Times in milliseconds, shares from 0 to 1.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) contender: &'static str,
    pub(super) description: &'static str,
    pub(super) scenarios: usize,
    /// The guest left without being slowed down.
    pub(super) converged: usize,
    /// The guest left, slowed down.
    pub(super) throttled: usize,
    /// Post-copy would have begun.
    pub(super) post_copy: usize,
    /// The guest stayed.
    pub(super) gave_up: usize,
    pub(super) switchovers: u64,
    /// Switchovers that were called off.
    pub(super) called_off: u64,
    /// Scenarios in which one was.
    pub(super) scenarios_called_off: usize,
    /// Switchovers whose downtime was over the limit.
    pub(super) overruns: usize,
    /// How far predictions were from the downtime.
    pub(super) prediction_error_p50: f64,
    pub(super) prediction_error_p95: f64,
    /// Downtime as a share of the limit.
    pub(super) downtime_by_limit_p50: f64,
    pub(super) downtime_by_limit_max: f64,
    /// Standstill for switchovers that were called off, over all scenarios.
    pub(super) wasted_ms: f64,
    /// Total time over that of sending everything once, of guests that left.
    pub(super) effort_p50: f64,
    pub(super) effort_p95: f64,
    /// Of the time of migrations, what throttling took from guests.
    pub(super) slowed_share: f64,
}

/// The figure below which so large a share of them lies; 0 of none.
pub(super) fn quantile(figures: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut sorted: Vec<f64> = figures.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let index = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(index.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

impl Row {
    pub(super) fn of(contender: &Contender, outcomes: &[Outcome]) -> Self {
        let ended = |end| outcomes.iter().filter(|outcome| outcome.end == end).count();
        let left = || outcomes.iter().filter(|outcome| outcome.downtime.is_some());
        let by_limit =
            || outcomes.iter().filter_map(|outcome| Some(outcome.downtime? / outcome.limit));
        let errors = || outcomes.iter().filter_map(Outcome::error);
        let sum = |figure: fn(&Outcome) -> f64| outcomes.iter().map(figure).sum::<f64>();
        Self {
            contender: contender.name,
            description: contender.description,
            scenarios: outcomes.len(),
            converged: ended(End::Converged),
            throttled: ended(End::Throttled),
            post_copy: ended(End::PostCopy),
            gave_up: ended(End::GaveUp),
            switchovers: outcomes.iter().map(|outcome| u64::from(outcome.attempts)).sum(),
            called_off: outcomes.iter().map(|outcome| u64::from(outcome.called_off)).sum(),
            scenarios_called_off: outcomes.iter().filter(|outcome| outcome.called_off > 0).count(),
            overruns: outcomes.iter().filter(|outcome| outcome.overran()).count(),
            prediction_error_p50: quantile(errors(), 0.5),
            prediction_error_p95: quantile(errors(), 0.95),
            downtime_by_limit_p50: quantile(by_limit(), 0.5),
            downtime_by_limit_max: by_limit().fold(0.0, f64::max),
            wasted_ms: sum(|outcome| outcome.wasted) * 1e3,
            effort_p50: quantile(left().map(|outcome| outcome.effort), 0.5),
            effort_p95: quantile(left().map(|outcome| outcome.effort), 0.95),
            slowed_share: sum(|outcome| outcome.slowed) / sum(|outcome| outcome.total).max(1e-9),
        }
    }
}

/// How the default fared with guests of one kind.
#[derive(Debug, Serialize)]
struct KindRow {
    kind: Kind,
    scenarios: usize,
    left: usize,
    throttled: usize,
    prediction_error_p95: f64,
    effort_p50: f64,
}

impl KindRow {
    fn of(kind: Kind, outcomes: &[Outcome]) -> Self {
        let these = || outcomes.iter().filter(|outcome| outcome.kind == kind);
        let left = || these().filter(|outcome| outcome.downtime.is_some());
        Self {
            kind,
            scenarios: these().count(),
            left: left().count(),
            throttled: these().filter(|outcome| outcome.end == End::Throttled).count(),
            prediction_error_p95: quantile(these().filter_map(Outcome::error), 0.95),
            effort_p50: quantile(left().map(|outcome| outcome.effort), 0.5),
        }
    }
}

/// The JSON object.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    seed: u64,
    scenarios: u32,
    elapsed_ms: f64,
    /// Scenarios whose limit is below what a guest that writes nothing takes.
    pub(super) infeasible: usize,
    pub(super) rows: Vec<Row>,
    kinds: Vec<KindRow>,
}

impl Report {
    /// Of what all contenders came to, the default first.
    pub(super) fn new(
        seed: u64,
        scenarios: u32,
        elapsed_ms: f64,
        outcomes: &[Vec<Outcome>],
    ) -> Self {
        let rows = ALL.iter().zip(outcomes).map(|(contender, all)| Row::of(contender, all));
        let kinds = KINDS.iter().map(|kind| KindRow::of(*kind, &outcomes[0]));
        let (rows, kinds) = (rows.collect(), kinds.collect());
        let infeasible = outcomes[0].iter().filter(|outcome| outcome.infeasible).count();
        Self { schema: SCHEMA, seed, scenarios, elapsed_ms, infeasible, rows, kinds }
    }

    /// The object on stdout, or the table.
    pub(super) fn print(&self, json: bool) -> Result<(), Failure> {
        let mut table = output::table();
        table.set_header([
            "",
            "left",
            "slowed",
            "post-copy",
            "stayed",
            "switchovers",
            "called off",
            "standstill for those",
            "over the limit",
            "error p50, p95",
            "effort p50, p95",
        ]);
        for row in &self.rows {
            let figures = [
                (row.converged + row.throttled).to_string(),
                row.throttled.to_string(),
                row.post_copy.to_string(),
                row.gave_up.to_string(),
                row.switchovers.to_string(),
                format!("{} in {}", row.called_off, row.scenarios_called_off),
                format!("{:.0} ms", row.wasted_ms),
                row.overruns.to_string(),
                format!(
                    "{:.1} %, {:.1} %",
                    row.prediction_error_p50 * 100.0,
                    row.prediction_error_p95 * 100.0
                ),
                format!("{:.2}, {:.2}", row.effort_p50, row.effort_p95),
            ];
            let mut cells = vec![Cell::new(row.description)];
            cells.extend(figures.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
            table.add_row(cells);
        }
        let Self { scenarios, infeasible, .. } = self;
        say!("in {infeasible} of {scenarios} scenarios no guest can meet the limit");
        output::report(self, &table, json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let figures = || (1..=100).map(f64::from);
        assert_eq!(quantile(figures(), 0.5).to_bits(), 50.0_f64.to_bits());
        assert_eq!(quantile(figures(), 0.95).to_bits(), 95.0_f64.to_bits());
        assert_eq!(quantile(figures(), 1.0).to_bits(), 100.0_f64.to_bits());
        assert_eq!(quantile([3.0], 0.5).to_bits(), 3.0_f64.to_bits());
        assert_eq!(quantile([], 0.5).to_bits(), 0.0_f64.to_bits());
    }
}
