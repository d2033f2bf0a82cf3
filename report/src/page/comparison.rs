//! Bars of who moved how much.

use maud::{Markup, html};

use crate::document::{Comparison, Contestant};
use crate::plot::{Axis, Bar, Share, bars, figure, number};

pub(super) fn all(comparisons: &[Comparison]) -> Markup {
    html! {
        @if !comparisons.is_empty() {
            h2 { "Against others" }
            p {
                "Each in turn, over and over. A bar is the median, a dot one measurement, the line \
                 goes from the least to the most."
            }
            @for (index, comparison) in comparisons.iter().enumerate() { (one(index, comparison)) }
        }
    }
}

fn one(index: usize, comparison: &Comparison) -> Markup {
    let rows: Vec<Bar> = comparison.contestants.iter().map(row).collect();
    let most = rows.iter().flat_map(|bar| &bar.values).copied().fold(0.0, f64::max);
    html! {
        (figure(&format!("comparison-{index}"), &comparison.title, &[], Share::All, |width| {
            bars(&rows, &Axis::linear(most, width.units / 130.0, number), "Gb/s", width)
        }))
        @for missing in &comparison.missing {
            p { span.bad { (missing.name) " is missing: " } (missing.why) }
        }
    }
}

/// The engine's bars are blue, the bare loop's grey, and others' orange.
fn row(contestant: &Contestant) -> Bar {
    let Contestant { name, gbps } = contestant;
    let color = match name.as_str() {
        name if name.starts_with("pageferry") => 0,
        name if name.starts_with("bare") => 5,
        _ => 1,
    };
    Bar { color, name: name.clone(), values: gbps.clone() }
}
