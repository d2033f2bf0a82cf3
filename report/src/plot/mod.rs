//! Plots as inline SVG. Colours are classes of the page's style, so that one drawing serves light
//! and dark. Each is drawn twice, for wide and for narrow screens: text that is scaled with its
//! drawing would be too small to read on the one or too large on the other.

mod axis;
mod bars;
mod lines;

use maud::{Markup, html};

pub(crate) use axis::{Axis, bytes, duration_ns, number};
pub(crate) use bars::{Bar, Stack, bars, stacks};
pub(crate) use lines::{Lines, Series};

/// Width of a drawing, in units of about a pixel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Width {
    pub(crate) units: f64,
    class: &'static str,
}

/// How much of a wide page a plot takes. On a narrow one it takes all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Share {
    All,
    Half,
}

impl Share {
    fn widths(self) -> [Width; 2] {
        let units = match self {
            Self::All => 1000.0,
            Self::Half => 500.0,
        };
        [Width { units, class: "wide" }, Width { units: 350.0, class: "narrow" }]
    }
}

/// Height of a line of text, and width of a letter in a font with wide ones.
const LINE: f64 = 16.0;
const LETTER: f64 = 7.6;

/// Something to look at: a caption, what the colours mean, and the drawing.
pub(crate) fn figure(
    name: &str,
    caption: &str,
    legend: &[(usize, &str)],
    share: Share,
    draw: impl Fn(Width) -> Drawing,
) -> Markup {
    html! {
        figure.plot data-plot=(name) {
            figcaption { (caption) }
            @if !legend.is_empty() {
                ul.legend {
                    @for (color, name) in legend {
                        li { span class={ "key c" (color) } {} (name) }
                    }
                }
            }
            @for width in share.widths() {
                @let Drawing { height, content } = draw(width);
                svg class=(width.class) viewBox={ "0 0 " (width.units) " " (f(height)) }
                    role="img" aria-label=(caption) {
                    (content)
                }
            }
        }
    }
}

/// What is inside an SVG.
#[derive(Debug)]
pub(crate) struct Drawing {
    pub(crate) height: f64,
    pub(crate) content: Markup,
}

/// A coordinate, as short as it is exact.
pub(crate) fn f(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or_else(|| text.clone(), str::to_owned)
}

/// A name in lines that fit into a drawing; broken where a comma is.
pub(crate) fn wrap(name: &str, width: Width) -> Vec<String> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few hundred")]
    let letters = (width.units / LETTER) as usize;
    let mut lines: Vec<String> = Vec::new();
    for part in name.split_inclusive(", ") {
        match lines.last_mut() {
            Some(line) if line.len() + part.trim_end().len() <= letters => line.push_str(part),
            _ => lines.push(part.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_broken_at_commas() {
        let name =
            "iouring, 2 channels, anonymous, sequential at 20000/s, guest load 1, host load 1";
        let [wide, narrow] = Share::All.widths();
        assert_eq!(wrap(name, wide), [name]);
        let lines = wrap(name, narrow);
        assert_eq!(lines.concat(), name);
        assert!(lines.len() > 1 && lines.iter().all(|line| line.len() <= 48), "{lines:?}");
    }

    #[test]
    fn coordinates_are_short() {
        assert_eq!((f(1.0), f(1.25), f(-0.5)), ("1".into(), "1.2".into(), "-0.5".into()));
    }
}
