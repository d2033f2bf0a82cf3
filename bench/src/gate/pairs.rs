//! Times, by pairs of runs that alternate: what changes slowly on this host changes for both.

use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_report::document::median;
use serde_json::Value;

use super::binary::Binary;
use super::verdict::{Limit, Row};
use crate::outcome::Failure;
use crate::random::Random;

/// A ratio of times that is no worse than noise.
const SLACK: f64 = 1.05;
/// How often the ratios are drawn anew, and which of the medians are left out at either end.
const RESAMPLES: usize = 2000;
const LEFT_OUT: f64 = 0.025;

/// Something to take the time of.
struct Timed {
    name: &'static str,
    args: &'static [&'static str],
    /// The time that its JSON has, or what is proportional to one.
    time: fn(&Value) -> Option<f64>,
}

const LOOP: fn(&Value) -> Option<f64> = |report| report.get("nanoseconds")?.as_f64();
const THROUGHPUT: fn(&Value) -> Option<f64> =
    |report| Some(1.0 / report.get("engine_gbps_median")?.as_f64()?);

const TIMED: [Timed; 6] = [
    Timed { name: "scan", args: &["hot", "scan", "--work=4", "--repeat=20"], time: LOOP },
    Timed { name: "coalesce", args: &["hot", "coalesce", "--work=8", "--repeat=20"], time: LOOP },
    Timed { name: "tcp", args: &["hot", "tcp", "--work=8", "--repeat=20"], time: LOOP },
    Timed { name: "iouring", args: &["hot", "iouring", "--work=8", "--repeat=20"], time: LOOP },
    Timed {
        name: "a transfer by tcp",
        args: &["throughput", "--transport=tcp", "--memory=128M", "--pairs=2", "--json"],
        time: THROUGHPUT,
    },
    Timed {
        name: "a transfer by iouring",
        args: &["throughput", "--transport=iouring", "--memory=128M", "--pairs=2", "--json"],
        time: THROUGHPUT,
    },
];

pub(super) fn times(head: &Binary, base: Option<&Binary>, pairs: u16) -> Result<Vec<Row>, Failure> {
    let Some(base) = base else { return Ok(Vec::new()) };
    let rings = Rings::new(IoUringOptions::default()).is_ok();
    let mut rows = Vec::new();
    for timed in TIMED.iter().filter(|timed| rings || !timed.name.contains("iouring")) {
        let mut found = interval(&ratios(timed, head, base, pairs)?);
        if found.is_some_and(|found| found.low > SLACK) {
            // One in so many intervals is off by chance, and there are several: what is really
            // slower is so once more, in pairs of their own.
            found = interval(&ratios(timed, head, base, pairs)?);
        }
        let name = format!("time of {}", timed.name);
        rows.push(match found {
            Some(interval) => Row::of_ratio(name, interval, SLACK),
            None => Row::new(name, None, None, Limit::NoMore),
        });
    }
    Ok(rows)
}

/// Head over base, a ratio a pair; none if one of them cannot do it.
fn ratios(timed: &Timed, head: &Binary, base: &Binary, pairs: u16) -> Result<Vec<f64>, Failure> {
    let mut ratios = Vec::new();
    for number in 0..pairs {
        let (first, second) = if number % 2 == 0 { (head, base) } else { (base, head) };
        let (Some(first), Some(second)) = (time(timed, first)?, time(timed, second)?) else {
            return Ok(Vec::new());
        };
        ratios.push(if number % 2 == 0 { first / second } else { second / first });
    }
    Ok(ratios)
}

fn time(timed: &Timed, binary: &Binary) -> Result<Option<f64>, Failure> {
    let Some(report) = binary.json(timed.args)? else { return Ok(None) };
    let time = (timed.time)(&report).filter(|time| time.is_finite() && *time > 0.0);
    let time = time.ok_or_else(|| format!("the {binary} took no time for {}", timed.name))?;
    Ok(Some(time))
}

/// The median, and the interval that most medians of resampled ratios are in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Interval {
    pub(super) low: f64,
    pub(super) median: f64,
    pub(super) high: f64,
}

fn interval(ratios: &[f64]) -> Option<Interval> {
    let middle = median(ratios.iter().copied())?;
    // The same draws for the same ratios.
    let mut random = Random::new(1);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let draw = |_| {
                let index = random.below(ratios.len() as u64);
                usize::try_from(index).ok().and_then(|index| ratios.get(index)).copied()
            };
            median((0..ratios.len()).filter_map(draw))
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few dozen")]
    let left_out = (medians.len() as f64 * LEFT_OUT) as usize;
    let low = *medians.get(left_out)?;
    let high = *medians.get(medians.len().checked_sub(1 + left_out)?)?;
    Some(Interval { low, median: middle, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_its_median_and_narrows_with_what_agrees() {
        let agreed = interval(&[1.1; 11]).unwrap();
        assert_eq!(agreed, Interval { low: 1.1, median: 1.1, high: 1.1 });
        let noisy = interval(&[0.7, 1.5, 0.9, 1.2, 1.0, 1.1, 0.8, 1.4, 1.0]).unwrap();
        assert!(noisy.low < 1.0 && noisy.high > 1.0, "{noisy:?}");
        assert!((noisy.median - 1.0).abs() < 1e-9);
        assert_eq!(interval(&[]), None);
    }
}
