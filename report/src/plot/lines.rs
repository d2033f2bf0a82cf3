//! Lines over an axis.

use maud::{Markup, html};

use super::{Axis, Drawing, LETTER, LINE, Width, f};

/// One line.
#[derive(Debug)]
pub(crate) struct Series {
    /// Number of its colour.
    pub(crate) color: usize,
    /// Its name, for who points at it.
    pub(crate) name: String,
    /// From left to right.
    pub(crate) points: Vec<(f64, f64)>,
    /// Whether what is below it is filled.
    pub(crate) filled: bool,
}

/// A plot of lines.
#[derive(Debug)]
pub(crate) struct Lines<'a> {
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    /// What is to the right.
    pub(crate) x_title: &'a str,
    pub(crate) series: Vec<Series>,
    /// Moments that are marked, with their names.
    pub(crate) marks: Vec<(f64, String)>,
    pub(crate) height: f64,
}

/// Where the axes are.
struct Place {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Lines<'_> {
    pub(crate) fn draw(&self, width: Width) -> Drawing {
        let longest = self.y.ticks.iter().map(|(_, name)| name.chars().count()).max();
        let place = Place {
            left: longest.unwrap_or(0) as f64 * LETTER + 12.0,
            right: width.units - 14.0,
            top: if self.marks.is_empty() { 10.0 } else { 10.0 + LINE },
            bottom: self.height - 2.0 * LINE - 8.0,
        };
        let x = |value| place.left + self.x.place(value) * (place.right - place.left);
        let y = |value| place.bottom - self.y.place(value) * (place.bottom - place.top);
        let content = html! {
            (self.grid(&place, x, y))
            @for series in &self.series {
                @let path = path(&series.points, x, y);
                g class={ "c" (series.color) } {
                    @if let Some(first) = series.points.first().filter(|_| series.filled) {
                        path.area d={ (path) "V" (f(place.bottom)) "H" (f(x(first.0))) "Z" } {}
                    }
                    path.line d=(path) { title { (series.name) } }
                }
            }
        };
        Drawing { height: self.height, content }
    }

    fn grid(&self, place: &Place, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> Markup {
        html! {
            @for (value, name) in &self.y.ticks {
                @let at = f(y(*value));
                line.grid x1=(f(place.left)) x2=(f(place.right)) y1=(at) y2=(at) {}
                text.tick x=(f(place.left - 6.0)) y=(f(y(*value) + 4.0)) text-anchor="end" { (name) }
            }
            @for (index, (value, name)) in apart(&self.x.ticks, &x).iter().enumerate() {
                // The first name begins at its place, so that it does not leave the drawing.
                text.tick x=(f(x(*value))) y=(f(place.bottom + LINE + 2.0))
                    text-anchor=(if index == 0 { "start" } else if x(*value) > place.right - 16.0 { "end" } else { "middle" }) { (name) }
            }
            text.title x=(f(place.right)) y=(f(place.bottom + 2.0 * LINE + 2.0)) text-anchor="end" {
                (self.x_title)
            }
            @for (value, _) in &self.marks {
                @let at = f(x(*value));
                line.mark x1=(at) x2=(at) y1=(f(place.top - 4.0)) y2=(f(place.bottom)) {}
            }
            @for (value, name) in apart(&self.marks, &x) {
                text.tick x=(f(x(value))) y=(f(place.top - 8.0))
                    text-anchor=(if x(value) > place.right - 16.0 { "end" } else { "middle" }) { (name) }
            }
        }
    }
}

/// Those names that have room, from left to right.
fn apart(ticks: &[(f64, String)], x: impl Fn(f64) -> f64) -> Vec<(f64, String)> {
    let mut end = f64::NEG_INFINITY;
    let mut kept = Vec::new();
    for (value, name) in ticks {
        let half = name.chars().count() as f64 * LETTER / 2.0;
        if x(*value) - half >= end {
            end = x(*value) + half + LETTER;
            kept.push((*value, name.clone()));
        }
    }
    kept
}

fn path(points: &[(f64, f64)], x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> String {
    let mut path = String::new();
    for (index, (at, value)) in points.iter().enumerate() {
        let command = if index == 0 { 'M' } else { 'L' };
        path.extend([command.to_string(), f(x(*at)), " ".to_owned(), f(y(*value))]);
    }
    path
}
