//! A page of everything, opened in a browser: plots must be drawn, in light and dark, on wide and
//! narrow screens, and nothing may come from elsewhere.
//!
//! With `PAGEFERRY_SCREENSHOTS=DIR` the pictures are kept, for who wants to see them. With
//! `PAGEFERRY_PAGE=FILE.html` that page is opened in place of the made-up one.

mod chromium;
mod picture;
mod sample;

use std::path::PathBuf;

use chromium::Chromium;
use picture::Picture;
use serde_json::Value;

/// What the page says about its plots: for each that is shown its name, its place, the colours of
/// what is drawn in it, and how much of that there is.
const PLOTS: &str = r"
[...document.querySelectorAll('figure.plot')].filter(figure => figure.checkVisibility()).map(figure => {
  const svg = [...figure.querySelectorAll('svg')].find(svg => svg.getBoundingClientRect().width > 0);
  if (!svg) return null;
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path.line, rect.bar')];
  const length = mark => mark.tagName === 'path' ? mark.getTotalLength() : mark.getBoundingClientRect().width;
  const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const inside = at => at.left >= box.left - 1 && at.right <= box.right + 1 && at.top >= box.top - 1 && at.bottom <= box.bottom + 1;
  return {
    name: figure.dataset.plot,
    x: box.left, y: box.top + scrollY, width: box.width, height: box.height,
    drawn: marks.map(length).reduce((sum, one) => sum + one, 0),
    colors: [...new Set(marks.filter(mark => length(mark) > 8).map(mark => {
      const style = getComputedStyle(mark);
      return mark.tagName === 'path' ? style.stroke : style.fill;
    }))],
    outside: texts.filter(at => !inside(at)).length,
    smallest: Math.min(...[...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect().height)),
  };
}).filter(plot => plot && plot.width > 0)
";

const WIDE: u32 = 1280;
const NARROW: u32 = 390;

#[test]
fn plots_are_drawn_light_and_dark_wide_and_narrow() {
    let Some(program) = chromium::find() else {
        assert!(std::env::var_os("PAGEFERRY_BROWSER").is_none(), "there is no chromium");
        eprintln!("plots in a browser skipped, because there is no chromium");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let given = std::env::var_os("PAGEFERRY_PAGE").map(PathBuf::from);
    let file = given.clone().unwrap_or_else(|| directory.path().join("page.html"));
    if given.is_none() {
        std::fs::write(&file, pageferry_report::page::render(&sample::document())).expect("a page");
    }
    let pictures = std::env::var_os("PAGEFERRY_SCREENSHOTS").map(PathBuf::from);
    let mut browser = Chromium::start(&program);
    for (width, dark) in [(WIDE, false), (WIDE, true), (NARROW, false), (NARROW, true)] {
        let name = format!(
            "{}-{}",
            if width == WIDE { "wide" } else { "narrow" },
            if dark { "dark" } else { "light" }
        );
        browser.show(&file, width, dark);
        let page_width = browser.evaluate("document.documentElement.scrollWidth");
        assert_eq!(page_width, width, "{name}: one must scroll sideways");
        let loaded = browser.evaluate("performance.getEntriesByType('resource').length");
        assert_eq!(loaded, 0, "{name}: something comes from elsewhere");
        let height = browser.evaluate("document.documentElement.scrollHeight");
        let height = u32::try_from(height.as_u64().expect("a height")).expect("a sane one");
        let png = browser.screenshot(width, height);
        if let Some(directory) = &pictures {
            std::fs::write(directory.join(format!("{name}.png")), &png).expect("keep a picture");
        }
        let picture = Picture::decode(&png);
        assert_eq!(picture.is_dark(), dark, "{name}");
        let plots = browser.evaluate(PLOTS);
        let plots = plots.as_array().expect("plots");
        if given.is_none() {
            let names: Vec<_> = plots.iter().map(|plot| plot["name"].as_str().unwrap()).collect();
            for expected in sample::PLOTS {
                assert!(names.contains(expected), "{name}: no {expected} among {names:?}");
            }
        }
        assert!(!plots.is_empty(), "{name}: no plots");
        for plot in plots {
            assert_drawn(&name, plot, &picture);
        }
    }
}

/// What is to be seen in a plot is in the picture, in the plot's place.
fn assert_drawn(name: &str, plot: &Value, picture: &Picture) {
    let number = |field: &str| plot[field].as_f64().unwrap_or_else(|| panic!("{field}: {plot}"));
    assert!(number("drawn") > 20.0, "{name}: nothing is drawn in {plot}");
    assert_eq!(plot["outside"], 0, "{name}: text is cut off in {plot}");
    assert!(number("smallest") >= 10.0, "{name}: text is too small in {plot}");
    let colors = plot["colors"].as_array().expect("colours");
    assert!(!colors.is_empty(), "{name}: {plot}");
    for color in colors {
        let color = color.as_str().expect("a colour");
        let place = ["x", "y", "width", "height"].map(number);
        let seen = picture.count(place, color);
        assert!(seen >= 10, "{name}: {seen} pixels of {color} in {plot}");
    }
}
