//! The text of a percentile distribution, as HdrHistogram writes it in every language, and as its
//! plotter reads it.

use std::io::{self, Write};

use hdrhistogram::Histogram;

/// Lines each time that the distance to 100 % halves.
const LINES: u32 = 5;
/// The text has microseconds, histograms have nanoseconds.
const UNIT_NS: f64 = 1e3;

pub(crate) fn write(histogram: &Histogram<u64>, into: &mut impl Write) -> io::Result<()> {
    writeln!(
        into,
        "{:>12} {:>14} {:>10} {:>14}",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    )?;
    writeln!(into)?;
    let mut total = 0;
    for step in histogram.iter_quantiles(LINES) {
        total += step.count_since_last_iteration();
        let value = step.value_iterated_to() as f64 / UNIT_NS;
        let quantile = step.quantile_iterated_to();
        if quantile < 1.0 {
            let inverse = 1.0 / (1.0 - quantile);
            writeln!(into, "{value:>12.3} {quantile:>14.12} {total:>10} {inverse:>14.2}")?;
        } else {
            writeln!(into, "{value:>12.3} {quantile:>14.12} {total:>10}")?;
        }
    }
    let (mean, deviation) = (histogram.mean() / UNIT_NS, histogram.stdev() / UNIT_NS);
    let (max, count) = (histogram.max() as f64 / UNIT_NS, histogram.len());
    writeln!(into, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]")?;
    writeln!(into, "#[Max     = {max:>12.3}, Total count    = {count:>12}]")?;
    writeln!(
        into,
        "#[Buckets = {:>12}, SubBuckets     = {:>12}]",
        histogram.buckets(),
        sub_buckets(histogram)
    )
}

/// The smallest power of two that keeps so many digits apart.
fn sub_buckets(histogram: &Histogram<u64>) -> u64 {
    (2 * 10_u64.pow(u32::from(histogram.sigfig()))).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a plotter makes of a line: value, percentile and count.
    fn parse(line: &str) -> Option<(f64, f64, u64)> {
        let mut columns = line.split_whitespace();
        let mut next = || columns.next();
        Some((next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?))
    }

    #[test]
    fn every_line_is_what_the_histogram_says() {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).unwrap();
        for step in 1..=10_000_u64 {
            histogram.record(step * 1001).unwrap();
        }
        let mut text = Vec::new();
        write(&histogram, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<_> = text.lines().filter_map(parse).collect();
        assert!(lines.len() > 40, "{text}");
        for (value, quantile, count) in &lines {
            let expected = histogram.value_at_quantile(*quantile) as f64 / UNIT_NS;
            // The text has three decimals, and a quantile may lie between two buckets.
            assert!(
                (value / expected - 1.0).abs() < 0.002,
                "{value} where {expected} is at {quantile}"
            );
            let below = histogram.count_between(0, histogram.value_at_quantile(*quantile));
            assert!(count.abs_diff(below) <= 10, "{count} where {below} are");
        }
        let last = lines.last().unwrap();
        assert_eq!((last.1, last.2), (1.0, 10_000));
        assert!(text.contains("Total count    =        10000]"), "{text}");
    }

    #[test]
    fn an_empty_histogram_is_a_text_without_lines() {
        let histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).unwrap();
        let mut text = Vec::new();
        write(&histogram, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("Total count    =            0]"), "{text}");
    }
}
