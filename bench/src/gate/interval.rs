//! What is known of a ratio that was measured often.

use pageferry_report::document::median;

use crate::random::Random;

/// How often the ratios are drawn anew, and which of the medians are left out at either end.
const RESAMPLES: usize = 2000;
const LEFT_OUT: f64 = 0.025;

/// The median, and the interval that most medians of resampled ratios are in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Interval {
    pub(super) low: f64,
    pub(super) median: f64,
    pub(super) high: f64,
}

pub(super) fn interval(ratios: &[f64]) -> Option<Interval> {
    let middle = median(ratios.iter().copied())?;
    // The same draws for the same ratios.
    let mut random = Random::new(1);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let draw = |_| {
                let index = random.below(ratios.len() as u64);
                usize::try_from(index).ok().and_then(|index| ratios.get(index)).copied()
            };
            median((0..ratios.len()).filter_map(draw))
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few dozen")]
    let left_out = (medians.len() as f64 * LEFT_OUT) as usize;
    let low = *medians.get(left_out)?;
    let high = *medians.get(medians.len().checked_sub(1 + left_out)?)?;
    Some(Interval { low, median: middle, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_its_median_and_narrows_with_what_agrees() {
        let agreed = interval(&[1.1; 11]).unwrap();
        assert_eq!(agreed, Interval { low: 1.1, median: 1.1, high: 1.1 });
        let noisy = interval(&[0.7, 1.5, 0.9, 1.2, 1.0, 1.1, 0.8, 1.4, 1.0]).unwrap();
        assert!(noisy.low < 1.0 && noisy.high > 1.0, "{noisy:?}");
        assert!((noisy.median - 1.0).abs() < 1e-9);
        assert_eq!(interval(&[]), None);
    }
}
