//! Horizontal bars, each below its name.

use maud::{Markup, html};

use super::{Axis, Drawing, LINE, Width, f, wrap};
use crate::document::median;

const BAR: f64 = 18.0;
const GAP: f64 = 12.0;
const MARGIN: f64 = 4.0;

/// Figures of one kind, each measured several times.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) color: usize,
    pub(crate) name: String,
    pub(crate) values: Vec<f64>,
}

/// Parts that make up a whole.
#[derive(Debug)]
pub(crate) struct Stack {
    pub(crate) name: String,
    /// Colour, name and length.
    pub(crate) parts: Vec<(usize, &'static str, f64)>,
    /// What the whole is called.
    pub(crate) total: String,
}

/// Bars as long as their medians, with a line from the least to the most and a dot for each.
pub(crate) fn bars(bars: &[Bar], x: &Axis, unit: &str, width: Width) -> Drawing {
    rows(
        bars,
        x,
        unit,
        width,
        |bar| &bar.name,
        |bar, place, top| {
            let middle = median(bar.values.iter().copied()).unwrap_or(0.0);
            let least = bar.values.iter().copied().reduce(f64::min).unwrap_or(0.0);
            let most = bar.values.iter().copied().reduce(f64::max).unwrap_or(0.0);
            let center = f(top + BAR / 2.0);
            html! {
                g class={ "c" (bar.color) } {
                    rect.bar x=(f(MARGIN)) y=(f(top)) width=(f((place(middle) - MARGIN).max(1.0)))
                        height=(f(BAR)) rx="2" {
                        title { (format!("{}: median {middle:.2} {unit}, {least:.2} to {most:.2}", bar.name)) }
                    }
                }
                line.spread x1=(f(place(least))) x2=(f(place(most))) y1=(center) y2=(center) {}
                @for value in &bar.values {
                    circle.dot cx=(f(place(*value))) cy=(center) r="3" {}
                }
            }
        },
        |bar| {
            let middle = median(bar.values.iter().copied()).unwrap_or(0.0);
            format!("{} {unit}", super::number(middle))
        },
    )
}

/// Parts side by side.
pub(crate) fn stacks(stacks: &[Stack], x: &Axis, unit: &str, width: Width) -> Drawing {
    rows(
        stacks,
        x,
        unit,
        width,
        |stack| &stack.name,
        |stack, place, top| {
            let mut sum = 0.0;
            html! {
                @for (color, name, length) in &stack.parts {
                    @let from = place(sum);
                    @let to = { sum += length; place(sum) };
                    @if to - from > 0.05 {
                        g class={ "c" (color) } {
                            rect.bar x=(f(from)) y=(f(top)) width=(f((to - from).max(0.5))) height=(f(BAR)) {
                                title { (format!("{}: {name} {length:.2} {unit}", stack.name)) }
                            }
                        }
                    }
                }
            }
        },
        |stack| stack.total.clone(),
    )
}

/// A row for each item: its name with its figure to the right, and below it what `draw` makes.
fn rows<T>(
    items: &[T],
    x: &Axis,
    unit: &str,
    width: Width,
    name: impl Fn(&T) -> &str,
    draw: impl Fn(&T, &dyn Fn(f64) -> f64, f64) -> Markup,
    figure: impl Fn(&T) -> String,
) -> Drawing {
    let place = |value: f64| MARGIN + x.place(value) * (width.units - 2.0 * MARGIN - 16.0);
    // Room for the figure that stands to the right of a name.
    let for_names = Width { units: width.units - 76.0, ..width };
    let mut tops = Vec::new();
    let mut height = 4.0;
    for item in items {
        let lines = wrap(name(item), for_names);
        tops.push((height, lines.clone()));
        height += lines.len() as f64 * LINE + BAR + GAP;
    }
    let bottom = height - GAP + 4.0;
    let content = html! {
        @for (value, label) in &x.ticks {
            @let at = f(place(*value));
            line.grid x1=(at) x2=(at) y1="4" y2=(f(bottom)) {}
            text.tick x=(at) y=(f(bottom + LINE))
                text-anchor=(if *value == 0.0 { "start" } else { "middle" }) { (label) }
        }
        text.title x=(f(width.units - MARGIN)) y=(f(bottom + 2.0 * LINE)) text-anchor="end" { (unit) }
        @for (item, (top, lines)) in items.iter().zip(&tops) {
            @for (number, line) in lines.iter().enumerate() {
                text.name x=(f(MARGIN)) y=(f(top + (number + 1) as f64 * LINE - 4.0)) { (line) }
            }
            text.figure x=(f(width.units - MARGIN)) y=(f(top + LINE - 4.0)) text-anchor="end" {
                (figure(item))
            }
            (draw(item, &place, top + lines.len() as f64 * LINE))
        }
    };
    Drawing { height: bottom + 2.0 * LINE + 6.0, content }
}
