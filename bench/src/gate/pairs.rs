//! Times, by pairs of runs that alternate: what changes slowly on this host changes for both.

use pageferry_cli::outcome::Failure;
use pageferry_iouring::{IoUringOptions, Rings};
use serde_json::Value;

use super::binary::Binary;
use super::interval::interval;
use super::verdict::{Limit, Row};

/// A ratio of times that is no worse than noise.
const SLACK: f64 = 1.05;

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
