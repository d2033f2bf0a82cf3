//! Axes: where a value is, and which ones are named.

use std::ops::RangeInclusive;

/// An axis from its beginning to its end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    min: f64,
    max: f64,
    log: bool,
    /// Values that are named, with their names.
    pub(crate) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From 0 to a round number not below `max`, with names for about so many values.
    pub(crate) fn linear(max: f64, about: f64, name: impl Fn(f64) -> String) -> Self {
        let max = if max.is_finite() && max > 0.0 { max } else { 1.0 };
        let step = round_step(max / about);
        let steps = (max / step).ceil().max(1.0);
        let ticks = counted(steps).map(|tick| (tick * step, name(tick * step))).collect();
        Self { min: 0.0, max: steps * step, log: false, ticks }
    }

    /// From 0 to just `max`: time ends where it ends.
    pub(crate) fn time(max: f64, about: f64, name: impl Fn(f64) -> String) -> Self {
        let mut axis = Self::linear(max, about, name);
        if max.is_finite() && max > 0.0 {
            axis.max = max;
            axis.ticks.retain(|(tick, _)| *tick <= max);
        }
        axis
    }

    /// By powers of ten that hold the range, each named.
    pub(crate) fn log(range: RangeInclusive<f64>, name: impl Fn(f64) -> String) -> Self {
        let (low, high) = (range.start().max(1e-9).log10().floor(), range.end().max(1e-9).log10());
        let high = high.ceil().max(low + 1.0);
        let ticks = counted(high - low)
            .map(|step| 10_f64.powf(low + step))
            .map(|tick| (tick, name(tick)))
            .collect();
        Self { min: 10_f64.powf(low), max: 10_f64.powf(high), log: true, ticks }
    }

    /// By the distance to 100 %, each tenth of it named: 0, 90, 99, 99.9, up to one in `count`.
    pub(crate) fn percentiles(count: u64) -> Self {
        let max = (count.max(10) as f64).log10();
        let ticks =
            counted(max.floor()).map(|nines| (10_f64.powf(nines), percent(nines))).collect();
        Self { min: 1.0, max: 10_f64.powf(max), log: true, ticks }
    }

    /// Where a value is, from 0 (the beginning) to 1 (the end).
    pub(crate) fn place(&self, value: f64) -> f64 {
        let (min, max, value) = if self.log {
            (self.min.log10(), self.max.log10(), value.max(self.min).log10())
        } else {
            (self.min, self.max, value)
        };
        ((value - min) / (max - min)).clamp(0.0, 1.0)
    }
}

/// 0, 1, 2, … up to `last`, and not more than any axis has room for.
fn counted(last: f64) -> impl Iterator<Item = f64> {
    (0..=100_u32).map(f64::from).take_while(move |step| *step <= last + 1e-9)
}

/// 1, 2 or 5 times a power of ten, not below `least`.
fn round_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

/// "99.9 %" for three nines.
fn percent(nines: f64) -> String {
    let percent = 100.0 * (1.0 - 10_f64.powf(-nines));
    let decimals = if nines > 2.0 { nines - 2.0 } else { 0.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few")]
    let decimals = decimals as usize;
    format!("{percent:.decimals$} %")
}

/// With as many decimals as say something: 0, 0.25, 3.5, 12, 1200, 20 k.
pub(crate) fn number(value: f64) -> String {
    // Of no figure that was measured.
    if value.abs() >= 1e15 {
        return format!("{value:e}");
    }
    for (unit, name) in [(1e6, "M"), (1e3, "k")] {
        if value.abs() >= 10.0 * unit {
            return format!("{} {name}", number(value / unit));
        }
    }
    let decimals = match value.abs() {
        large if large >= 100.0 => 0,
        middle if middle >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// "64 MiB".
pub(crate) fn bytes(value: f64) -> String {
    let units = [(f64::from(1 << 30), "GiB"), (f64::from(1 << 20), "MiB"), (1024.0, "KiB")];
    match units.into_iter().find(|(unit, _)| value >= *unit) {
        Some((unit, name)) => format!("{} {name}", number(value / unit)),
        None => format!("{} B", number(value)),
    }
}

/// "1.5 ms".
pub(crate) fn duration_ns(value: f64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "µs")];
    match units.into_iter().find(|(unit, _)| value >= *unit) {
        Some((unit, name)) => format!("{} {name}", number(value / unit)),
        None => format!("{} ns", number(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn axes_begin_at_nothing_and_end_at_a_round_number() {
        let axis = Axis::linear(13.0, 4.0, number);
        assert_eq!(names(&axis), ["0", "5", "10", "15"]);
        assert!((axis.place(7.5) - 0.5).abs() < 1e-9);
        assert_eq!(names(&Axis::linear(0.0, 4.0, number)), ["0", "0.5", "1"]);
        assert_eq!(names(&Axis::linear(f64::NAN, 4.0, number)).len(), 3);
        assert_eq!(names(&Axis::time(130.0, 4.0, number)), ["0", "50", "100"]);
    }

    #[test]
    fn any_number_has_a_name() {
        for value in [0.0, 1e14, 1e15, 1e308, f64::MAX, f64::INFINITY, f64::NAN] {
            for value in [value, -value] {
                assert!(number(value).len() < 30, "{value}: {}", number(value));
            }
            let axis = Axis::linear(value, 4.0, number);
            assert!((1..=101).contains(&names(&axis).len()), "{value}: {axis:?}");
            assert!(names(&Axis::time(value, 4.0, number)).len() <= 101, "{value}");
        }
    }

    #[test]
    fn percentiles_are_named_by_their_nines() {
        let axis = Axis::percentiles(20_000);
        assert_eq!(names(&axis), ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
        assert!(axis.place(1.0) < 1e-9 && (axis.place(1e9) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn powers_of_ten_hold_the_range() {
        let axis = Axis::log(4e3..=2e6, duration_ns);
        assert_eq!(names(&axis), ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms"]);
        assert!((axis.place(1e5) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn figures_are_short() {
        let numbers = [0.0, 0.25, 3.0, 12.34, 1234.5].map(number);
        assert_eq!(numbers, ["0", "0.25", "3", "12.3", "1234"]);
        assert_eq!([20_000.0, 1.25e7].map(number), ["20 k", "12.5 M"]);
        assert_eq!(bytes(1536.0), "1.5 KiB");
        assert_eq!(duration_ns(2.5e6), "2.5 ms");
    }
}
