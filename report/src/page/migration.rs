//! Migrations: all side by side, and each over time.

use maud::{Markup, html};

use super::throughput::throughput;
use crate::document::Migration;
use crate::plot::{Axis, Lines, Series, Share, Stack, bytes, duration_ns, figure, number, stacks};

/// Migrations whose plots are open; one looks at more of them one by one.
const OPEN: usize = 2;

const MIB: f64 = (1_u32 << 20) as f64;

/// A table, and the downtimes with their parts.
pub(super) fn overview(migrations: &[Migration]) -> Markup {
    let rows: Vec<Stack> = migrations.iter().map(stack).collect();
    let longest = migrations.iter().map(|each| each.downtime.total()).fold(0.0, f64::max);
    let names = migrations.first().map_or(Vec::new(), |each| each.downtime.parts().to_vec());
    let legend: Vec<_> = (0..).zip(names.iter().map(|(name, _)| *name)).collect();
    html! {
        @if !migrations.is_empty() {
            h2 { "Downtime" }
            p {
                "How long the guest stood still, by the parts that make it up."
                @if verified(migrations) {
                    " With verification it stood still for longer, until memory was compared on both "
                    "sides: that is not counted as downtime, but the guest's gap holds it."
                }
            }
            (figure("downtime", "Downtime of each migration", &legend, Share::All, |width| {
                stacks(&rows, &Axis::linear(longest, width.units / 130.0, number), "ms", width)
            }))
            (table(migrations))
        }
    }
}

fn stack(migration: &Migration) -> Stack {
    let parts = migration.downtime.parts();
    Stack {
        name: migration.setting.title(),
        parts: (0..).zip(parts).map(|(color, (name, part))| (color, name, part)).collect(),
        total: format!("{} ms", number(migration.downtime_ms)),
    }
}

fn table(migrations: &[Migration]) -> Markup {
    let verified = verified(migrations);
    html! {
        div.table {
            table {
                thead {
                    tr {
                        th { "migration" }
                        @for head in ["total", "rounds", "Gb/s", "downtime"] { th.n { (head) } }
                        @if verified { th.n { "verification" } }
                        @for head in ["longest gap", "CPU", "wire"] { th.n { (head) } }
                        th { "guest" }
                    }
                }
                tbody { @for each in migrations { (row(each, verified)) } }
            }
        }
    }
}

fn row(each: &Migration, verified: bool) -> Markup {
    let milliseconds =
        |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| duration_ns(ms * 1e6));
    html! {
        tr {
            td.wide-text { (each.setting.title()) }
            td.n { (milliseconds(Some(each.total_ms))) }
            td.n { (each.rounds.last().map_or(0, |last| last.round)) }
            td.n { (number(each.throughput_gbps)) }
            td.n { (milliseconds(Some(each.downtime_ms))) }
            @if verified { td.n { (milliseconds(compared(each))) } }
            td.n { (milliseconds(each.heartbeat_gap_ms)) }
            td.n { (milliseconds(each.cpu_ms)) }
            td.n { (bytes(each.wire_bytes as f64)) }
            td {
                @match (each.outcome.as_str(), each.oracle_ok) {
                    ("completed", Some(true)) => span.good { "right" },
                    ("completed", None) => "moved",
                    ("completed", Some(false)) => span.bad { "WRONG" },
                    (outcome, _) => span.bad { (outcome) },
                }
                @if let Some(error) = &each.error { ": " (error) }
            }
        }
    }
}

fn verified(migrations: &[Migration]) -> bool {
    migrations.iter().any(|each| compared(each).is_some())
}

/// How long the guest stood still for its memory to be compared, if it was.
fn compared(each: &Migration) -> Option<f64> {
    Some(each.verify_ms).filter(|ms| *ms > 0.0)
}

/// Each over time.
pub(super) fn each(migrations: &[Migration]) -> Markup {
    html! {
        @if migrations.iter().any(|each| !each.samples.is_empty()) {
            h2 { "Over time" }
            p { "Dashed lines are the beginnings of rounds; the last one is sent with the guest paused." }
            @for (index, migration) in migrations.iter().enumerate() {
                @if !migration.samples.is_empty() {
                    details open[index < OPEN] {
                        summary {
                            (migration.setting.title()) " "
                            span { "(" (duration_ns(migration.total_ms * 1e6)) ")" }
                        }
                        div.plots.two { (over_time(index, migration)) }
                    }
                }
            }
        }
    }
}

fn over_time(index: usize, migration: &Migration) -> Markup {
    let end = migration.samples.last().map_or(1.0, |sample| sample.ms).max(migration.total_ms);
    let marks: Vec<_> =
        migration.rounds.iter().map(|round| (round.ms, round.round.to_string())).collect();
    let remaining: Vec<_> = migration
        .samples
        .iter()
        .map(|sample| (sample.ms, sample.remaining_bytes as f64 / MIB))
        .collect();
    let heartbeat = "The guest's longest heartbeat gap, ms";
    let heartbeat = match compared(migration) {
        Some(ms) => format!("{heartbeat}; verification took {}", duration_ns(ms * 1e6)),
        None => heartbeat.to_owned(),
    };
    let plots = [
        ("throughput", "Throughput, Gb/s", 0, throughput(migration)),
        ("dirty-rate", "Pages the guest wrote a second", 1, dirty_rate(migration)),
        ("remaining", "Left of the round, MiB", 2, remaining),
        ("heartbeat", heartbeat.as_str(), 4, gaps(migration)),
    ];
    html! {
        @for (name, caption, color, points) in plots {
            @if !points.is_empty() {
                (figure(&format!("{name}-{index}"), caption, &[], Share::Half, |width| {
                    let most = points.iter().map(|(_, value)| *value).fold(0.0, f64::max);
                    Lines {
                        x: Axis::time(end, width.units / 90.0, number),
                        y: Axis::linear(most, 4.0, number),
                        x_title: "ms from the beginning",
                        series: vec![Series {
                            color,
                            name: caption.to_owned(),
                            points: points.clone(),
                            filled: true,
                        }],
                        marks: marks.clone(),
                        height: 200.0,
                    }
                    .draw(width)
                }))
            }
        }
    }
}

/// What each round found the guest to have written during the round before.
fn dirty_rate(migration: &Migration) -> Vec<(f64, f64)> {
    let steps = migration.rounds.windows(2).flat_map(|pair| {
        let seconds = (pair[1].ms - pair[0].ms) / 1e3;
        let rate = if seconds > 0.0 { pair[1].dirty_pages as f64 / seconds } else { 0.0 };
        [(pair[0].ms, rate), (pair[1].ms, rate)]
    });
    steps.collect()
}

/// Each gap is drawn over the time that it lasted.
fn gaps(migration: &Migration) -> Vec<(f64, f64)> {
    let mut points = Vec::new();
    let mut end = 0.0;
    for gap in migration.heartbeat_gaps.iter().filter(|gap| gap.ms >= 0.0) {
        let began = (gap.ms - gap.gap_ms).max(end);
        if began > end {
            points.extend([(end, 0.0), (began, 0.0)]);
        }
        points.extend([(began, gap.gap_ms), (gap.ms, gap.gap_ms)]);
        end = gap.ms;
    }
    points
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;
    use crate::document::Gap;
    use crate::document::Sample;

    #[test]
    fn verification_is_a_part_of_its_own() {
        let sample = Sample { ms: 1.0, landed_bytes: 1, remaining_bytes: 0 };
        let gap = Gap { ms: 300.0, gap_ms: 160.0 };
        let migration = Migration {
            samples: vec![sample],
            heartbeat_gap_ms: Some(gap.gap_ms),
            heartbeat_gaps: vec![gap],
            ..Migration::default()
        };
        let plain = overview(from_ref(&migration)).into_string();
        assert!(!plain.contains("verification"), "{plain}");
        let migration = Migration { verify_ms: 140.0, ..migration };
        let page = overview(from_ref(&migration)).into_string();
        assert!(page.contains("<th class=\"n\">verification</th>"), "{page}");
        assert!(page.contains("<td class=\"n\">140 ms</td><td class=\"n\">160 ms</td>"), "{page}");
        assert!(page.contains("not counted as downtime"), "{page}");
        let page = each(from_ref(&migration)).into_string();
        assert!(page.contains("heartbeat gap, ms; verification took 140 ms"), "{page}");
    }
}
