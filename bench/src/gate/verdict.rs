//! What came of it.

use comfy_table::{Cell, CellAlignment};
use pageferry_cli::outcome::Failure;
use pageferry_cli::say;
use serde::Serialize;

use super::histograms::Percentiles;
use super::interval::Interval;
use crate::output::{self, SCHEMA};

/// When a count is worse.
#[derive(Debug, Clone, Copy)]
pub(super) enum Limit {
    /// When it is more.
    NoMore,
    /// When it is more than so many times the base's.
    Ratio(f64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    Worse,
    /// There is nothing to compare with.
    New,
}

/// Something that was compared.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    what: String,
    /// Null where the base does not have it; and with times, which have a ratio only.
    base: Option<u64>,
    head: Option<u64>,
    /// Head over base, with times the median; null where there is none.
    ratio: Option<f64>,
    /// With times.
    ratio_low: Option<f64>,
    ratio_high: Option<f64>,
    verdict: Verdict,
}

impl Row {
    pub(super) fn new(what: String, base: Option<u64>, head: Option<u64>, limit: Limit) -> Self {
        let verdict = match (base, head) {
            (Some(base), Some(head)) => {
                let worse = match limit {
                    Limit::NoMore => head > base,
                    Limit::Ratio(ratio) => head as f64 > base as f64 * ratio,
                };
                if worse { Verdict::Worse } else { Verdict::Good }
            }
            _ => Verdict::New,
        };
        let ratio = match (base, head) {
            (Some(base), Some(head)) if base > 0 => Some(head as f64 / base as f64),
            _ => None,
        };
        Self { what, base, head, ratio, ratio_low: None, ratio_high: None, verdict }
    }

    /// Of times: worse when all of the interval is above the limit.
    pub(super) fn of_ratio(what: String, interval: Interval, limit: f64) -> Self {
        let Interval { low, median, high } = interval;
        Self {
            what,
            base: None,
            head: None,
            ratio: Some(median),
            ratio_low: Some(low),
            ratio_high: Some(high),
            verdict: if low > limit { Verdict::Worse } else { Verdict::Good },
        }
    }

    pub(super) fn is_worse(&self) -> bool {
        self.verdict == Verdict::Worse
    }

    fn figures(&self) -> [String; 4] {
        let count = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), |it| it.to_string());
        let ratio = match (self.ratio, self.ratio_low, self.ratio_high) {
            (Some(ratio), Some(low), Some(high)) => format!("{ratio:.3} ({low:.3} to {high:.3})"),
            (Some(ratio), ..) => format!("{ratio:.4}"),
            _ => String::new(),
        };
        let verdict = match self.verdict {
            Verdict::Good => "",
            Verdict::Worse => "WORSE",
            Verdict::New => "nothing to compare with",
        };
        [count(self.base), count(self.head), ratio, verdict.to_owned()]
    }
}

/// The JSON object.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    rows: Vec<Row>,
    latencies: Vec<Percentiles>,
}

impl Report {
    pub(super) fn new(rows: Vec<Row>, latencies: Vec<Percentiles>) -> Self {
        Self { schema: SCHEMA, rows, latencies }
    }

    pub(super) fn is_worse(&self) -> bool {
        self.rows.iter().any(Row::is_worse)
    }

    pub(super) fn print(&self, json: bool) -> Result<(), Failure> {
        let mut table = output::table();
        table.set_header(["", "base", "head", "head / base", ""]);
        for row in &self.rows {
            let mut cells = vec![Cell::new(&row.what)];
            let [base, head, ratio, verdict] = row.figures();
            cells.extend(
                [base, head, ratio].map(|text| Cell::new(text).set_alignment(CellAlignment::Right)),
            );
            cells.push(Cell::new(verdict));
            table.add_row(cells);
        }
        if !json && !self.latencies.is_empty() {
            output::line(&super::histograms::table(&self.latencies).to_string())?;
        }
        output::report(self, &table, json)?;
        for row in self.rows.iter().filter(|row| row.is_worse()) {
            let [base, head, ratio, _] = row.figures();
            say!("WORSE: {}: base {base}, head {head}, head / base {ratio}", row.what);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(base: Option<u64>, head: Option<u64>, limit: Limit) -> Verdict {
        Row::new("it".to_owned(), base, head, limit).verdict
    }

    #[test]
    fn counts_may_not_grow_and_instructions_a_little() {
        use Limit::{NoMore, Ratio};
        assert_eq!(verdict(Some(7), Some(7), NoMore), Verdict::Good);
        assert_eq!(verdict(Some(7), Some(8), NoMore), Verdict::Worse);
        assert_eq!(verdict(Some(0), Some(1), NoMore), Verdict::Worse);
        assert_eq!(verdict(Some(7), Some(0), NoMore), Verdict::Good);
        assert_eq!(verdict(None, Some(7), NoMore), Verdict::New);
        assert_eq!(verdict(Some(1000), Some(1030), Ratio(1.03)), Verdict::Good);
        assert_eq!(verdict(Some(1000), Some(1031), Ratio(1.03)), Verdict::Worse);
    }

    #[test]
    fn times_are_worse_when_all_of_the_interval_is() {
        let of = |low, high| {
            let interval = Interval { low, median: f64::midpoint(low, high), high };
            Row::of_ratio("it".to_owned(), interval, 1.05).verdict
        };
        assert_eq!(of(1.06, 1.2), Verdict::Worse);
        assert_eq!(of(1.04, 1.2), Verdict::Good);
        assert_eq!(of(0.8, 0.9), Verdict::Good);
    }
}
