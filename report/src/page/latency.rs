//! Percentile curves.

use maud::{Markup, html};

use crate::latency::{Latency, What};
use crate::plot::{Axis, Lines, Series, Share, duration_ns, figure};

pub(super) fn all(latencies: &[Latency]) -> Markup {
    let kinds = [What::Batch, What::Page, What::Control, What::Commit];
    html! {
        @if !latencies.is_empty() {
            h2 { "Latencies" }
            p {
                "How long it took for so many of a hundred; both axes are logarithmic, the one below \
                 by the distance to 100 %."
            }
            div.plots.two {
                @for what in kinds {
                    @let these: Vec<_> = latencies.iter().filter(|each| each.what == what).collect();
                    @if these.iter().any(|each| each.count > 0) { (curves(what, &these)) }
                }
            }
            (table(latencies))
        }
    }
}

fn name(latency: &Latency) -> String {
    let rate = latency.rate.map_or_else(String::new, |rate| format!(", {rate} a second"));
    format!("{}{rate}", latency.transport)
}

fn curves(what: What, latencies: &[&Latency]) -> Markup {
    let names: Vec<_> = latencies.iter().map(|latency| name(latency)).collect();
    let legend: Vec<_> = (0..).zip(names.iter().map(String::as_str)).collect();
    let count = latencies.iter().map(|latency| latency.count).max().unwrap_or(1);
    let shortest = latencies.iter().filter(|each| each.count > 0).map(|each| each.min_ns).min();
    let longest = latencies.iter().map(|latency| latency.max_ns).max().unwrap_or(1);
    let plot = |units: f64| Lines {
        x: Axis::percentiles(count),
        y: Axis::log(shortest.unwrap_or(1) as f64..=longest as f64, duration_ns),
        x_title: "percentile",
        series: (0..)
            .zip(latencies)
            .map(|(color, latency)| Series {
                color,
                name: name(latency),
                points: points(latency),
                filled: false,
            })
            .collect(),
        marks: Vec::new(),
        height: if units > 400.0 { 280.0 } else { 240.0 },
    };
    figure(&format!("latency-{}", what.name()), what.description(), &legend, Share::Half, |width| {
        plot(width.units).draw(width)
    })
}

/// By the inverse of the distance to 100 %, up to where one of all is left.
fn points(latency: &Latency) -> Vec<(f64, f64)> {
    let last = latency.count.max(1) as f64;
    latency
        .curve
        .iter()
        .map(|point| {
            let left = 1.0 - point.percentile / 100.0;
            (if left * last > 1.0 { 1.0 / left } else { last }, point.ns as f64)
        })
        .collect()
}

fn table(latencies: &[Latency]) -> Markup {
    html! {
        div.table {
            table {
                thead {
                    tr {
                        th { "what" } th { "transport" }
                        @for head in ["count", "50 %", "90 %", "99 %", "99.9 %", "99.99 %", "longest"] {
                            th.n { (head) }
                        }
                    }
                }
                tbody {
                    @for each in latencies {
                        tr {
                            td { (each.what.description()) } td { (name(each)) }
                            td.n { (each.count) }
                            @for ns in [each.p50_ns, each.p90_ns, each.p99_ns, each.p99_9_ns, each.p99_99_ns, each.max_ns] {
                                td.n { (duration_ns(ns as f64)) }
                            }
                        }
                    }
                }
            }
        }
    }
}
