//! Plots, as one page that needs nothing else: inline SVG, no script, no font of its own.

use std::fmt::Write;

use super::SimulateArgs;
use super::contenders::ALL;
use super::migration::Outcome;
use super::report::{Report, Row, quantile};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 56.0;

/// Told apart by those who see few colours, too.
const COLOURS: [&str; 10] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999", "#b8a600",
    "#000000", "#7f3c8d",
];

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}\
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .6em;text-align:right;\
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
svg{display:block;margin:1em 0 2em;max-width:100%;height:auto}svg text{font:12px sans-serif}";

/// The page.
pub(super) fn page(report: &Report, outcomes: &[Vec<Outcome>], args: &SimulateArgs) -> String {
    let mut page = String::from("<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">");
    let _ = write!(page, "<title>Simulated migrations</title><style>{STYLE}</style>");
    let _ = write!(
        page,
        "<h1>Simulated migrations</h1><p>{} scenarios from seed {}, each with every contender: \
         <code>pageferry-bench simulate --scenarios {} --seed {}</code></p>",
        args.scenarios, args.seed, args.scenarios, args.seed
    );
    page.push_str(&table(&report.rows));
    page.push_str("<h2>Predicted and measured downtime, default estimator</h2>");
    page.push_str(&scatter(&outcomes[0]));
    page.push_str("<h2>Prediction error</h2><p>Share of switchovers with less.</p>");
    page.push_str(&curves(outcomes, 0.5, "error", Outcome::error));
    page.push_str("<h2>Downtime by its limit</h2><p>Share of guests that left with less.</p>");
    page.push_str(&curves(outcomes, 2.0, "downtime / limit", |outcome| {
        Some(outcome.downtime? / outcome.limit)
    }));
    page.push_str("<h2>Switchovers called off</h2>");
    page.push_str(&bars(&report.rows, |row| row.called_off as f64));
    page.push_str("<h2>Downtimes over the limit</h2>");
    page.push_str(&bars(&report.rows, |row| row.overruns as f64));
    page.push_str("<h2>Total time, as a multiple of sending everything once</h2>");
    page.push_str(&curves(outcomes, 8.0, "multiple", |outcome| {
        outcome.downtime.map(|_| outcome.effort)
    }));
    page.push_str("</html>\n");
    page
}

fn table(rows: &[Row]) -> String {
    let mut table = String::from(
        "<table><tr><th></th><th>left</th><th>of them slowed</th><th>post-copy</th><th>stayed</th>\
         <th>called off</th><th>over the limit</th><th>error p95</th><th>effort p50</th></tr>",
    );
    for row in rows {
        let _ = write!(
            table,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td>{:.1} %</td><td>{:.2}</td></tr>",
            row.description,
            row.converged + row.throttled,
            row.throttled,
            row.post_copy,
            row.gave_up,
            row.called_off,
            row.overruns,
            row.prediction_error_p95 * 100.0,
            row.effort_p50
        );
    }
    table + "</table>"
}

/// An empty plot with its axes' names, to be closed.
fn frame(across: &str, up: &str) -> String {
    let (right, bottom) = (WIDTH - 10.0, HEIGHT - MARGIN);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\
         <path d=\"M{MARGIN} 10V{bottom}H{right}\" fill=\"none\" stroke=\"#333\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{across}</text>\
         <text x=\"14\" y=\"{}\" text-anchor=\"middle\" transform=\"rotate(-90 14 {})\">{up}</text>",
        f64::midpoint(MARGIN, right),
        HEIGHT - 8.0,
        bottom / 2.0,
        bottom / 2.0
    )
}

/// Where a share of the axes' lengths is.
fn place(across: f64, up: f64) -> (f64, f64) {
    let x = MARGIN + across.clamp(0.0, 1.0) * (WIDTH - 10.0 - MARGIN);
    let y = HEIGHT - MARGIN - up.clamp(0.0, 1.0) * (HEIGHT - MARGIN - 10.0);
    (x, y)
}

fn tick_across(plot: &mut String, at: f64, text: &str) {
    let (x, y) = place(at, 0.0);
    let _ = write!(
        plot,
        "<path d=\"M{x:.1} {y:.1}v5\" stroke=\"#333\"/>\
         <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
        y + 18.0
    );
}

fn tick_up(plot: &mut String, at: f64, text: &str) {
    let (x, y) = place(0.0, at);
    let _ = write!(
        plot,
        "<path d=\"M{x:.1} {y:.1}h-5\" stroke=\"#333\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
        x - 8.0,
        y + 4.0
    );
}

/// Both axes by orders of magnitude, from 1 ms to 1 s.
fn scatter(outcomes: &[Outcome]) -> String {
    let mut plot = frame("measured", "predicted");
    let at = |seconds: f64| (seconds * 1e3).log10() / 3.0;
    for (ms, text) in [(1.0, "1 ms"), (10.0, "10 ms"), (100.0, "100 ms"), (1000.0, "1 s")] {
        tick_across(&mut plot, at(ms * 1e-3), text);
        tick_up(&mut plot, at(ms * 1e-3), text);
    }
    let ((x1, y1), (x2, y2)) = (place(0.0, 0.0), place(1.0, 1.0));
    let _ = write!(plot, "<path d=\"M{x1} {y1}L{x2} {y2}\" stroke=\"#aaa\"/>");
    for outcome in outcomes {
        if let (Some(downtime), Some(predicted)) = (outcome.downtime, outcome.predicted) {
            let (x, y) = place(at(downtime), at(predicted));
            let colour = COLOURS[0];
            let _ = write!(
                plot,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"1.6\" fill=\"{colour}\" \
                 fill-opacity=\".45\"/>"
            );
        }
    }
    plot + "</svg>"
}

/// For each contender, the share of figures below each value up to `most`.
fn curves(
    outcomes: &[Vec<Outcome>],
    most: f64,
    across: &str,
    figure: impl Fn(&Outcome) -> Option<f64>,
) -> String {
    const STEPS: u32 = 100;
    let mut plot = frame(across, "share");
    for quarter in 0..=4 {
        let share = f64::from(quarter) / 4.0;
        tick_across(&mut plot, share, &format!("{}", share * most));
        tick_up(&mut plot, share, &format!("{:.0} %", share * 100.0));
    }
    for (number, (contender, outcomes)) in ALL.iter().zip(outcomes).enumerate() {
        let figures: Vec<f64> = outcomes.iter().filter_map(&figure).collect();
        if figures.is_empty() {
            continue;
        }
        let mut path = String::new();
        for step in 0..=STEPS {
            let share = f64::from(step) / f64::from(STEPS);
            let (x, y) = place(quantile(figures.iter().copied(), share) / most, share);
            let _ = write!(path, "{}{x:.1} {y:.1}", if step == 0 { 'M' } else { 'L' });
        }
        let colour = COLOURS[number % COLOURS.len()];
        let (x, _) = place(0.62, 0.0);
        let y = 24.0 + 15.0 * number as f64;
        let _ = write!(
            plot,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
            y + HEIGHT * 0.36,
            contender.name
        );
    }
    plot + "</svg>"
}

fn bars(rows: &[Row], figure: impl Fn(&Row) -> f64) -> String {
    let most = rows.iter().map(&figure).fold(1.0, f64::max);
    let step = 28.0;
    let height = step * rows.len() as f64 + 10.0;
    let mut plot =
        format!("<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">");
    for (number, row) in rows.iter().enumerate() {
        let (value, y) = (figure(row), step * number as f64 + 5.0);
        let colour = COLOURS[number % COLOURS.len()];
        let _ = write!(
            plot,
            "<text x=\"180\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"188\" y=\"{y:.1}\" width=\"{:.1}\" height=\"20\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{value}</text>",
            y + 15.0,
            row.contender,
            value / most * 380.0,
            194.0 + value / most * 380.0,
            y + 15.0
        );
    }
    plot + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::run_all;

    #[test]
    fn the_page_has_a_plot_for_everything_and_needs_nothing_else() {
        let outcomes: Vec<_> = ALL.iter().map(|contender| run_all(contender, 1, 10)).collect();
        let args = SimulateArgs { scenarios: 10, seed: 1, html: None, json: false };
        let page = page(&Report::new(1, 10, 0.0, &outcomes), &outcomes, &args);
        assert_eq!(page.matches("<svg").count(), 6);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.matches("<circle").count() > 0);
        for part in ["http", "<script", "NaN", "inf"] {
            assert!(!page.contains(part), "{part} in the page");
        }
        for contender in ALL {
            assert!(page.contains(contender.name));
        }
    }
}
