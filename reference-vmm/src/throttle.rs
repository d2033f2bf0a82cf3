//! Which virtual CPU is slowed down by how much.

/// Virtual CPUs that are slowed down together, by what each of them dirties.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// All together.
    percent: u8,
    /// Set last, each.
    percents: Vec<u8>,
    /// Pages each had dirtied by then, where that is known.
    dirtied: Option<Vec<u64>>,
}

impl Throttle {
    pub(crate) fn new(vcpus: u8) -> Self {
        Self { percent: 0, percents: vec![0; vcpus.into()], dirtied: None }
    }

    /// By how much all together are slowed down.
    pub(crate) fn percent(&self) -> u8 {
        self.percent
    }

    /// What each is to be slowed down by so that all together dirty `percent` less. `dirtied` is
    /// what each has dirtied so far; without it they are all treated alike.
    pub(crate) fn set(&mut self, percent: u8, dirtied: Option<Vec<u64>>) -> &[u8] {
        let rates = match (&self.dirtied, &dirtied) {
            (Some(before), Some(now)) => self.rates(before, now),
            _ => None,
        };
        // What was dirtied since the last time is told from the first time on.
        self.percents = match rates {
            Some(rates) if percent > 0 => capped(percent, &rates),
            _ => vec![percent; self.percents.len()],
        };
        (self.percent, self.dirtied) = (percent, dirtied);
        &self.percents
    }

    /// What each would dirty at its own speed, in any unit. `None` if nobody dirtied anything.
    fn rates(&self, before: &[u64], now: &[u64]) -> Option<Vec<f64>> {
        let rates: Vec<f64> = now
            .iter()
            .zip(before)
            .zip(&self.percents)
            .map(|((now, before), percent)| {
                now.saturating_sub(*before) as f64 / f64::from(100 - (*percent).min(99))
            })
            .collect();
        let known = rates.len() == self.percents.len() && rates.iter().any(|rate| *rate > 0.0);
        known.then_some(rates)
    }
}

/// Puts a cap on rates so that their sum sinks by `percent`: who dirties little is left alone.
fn capped(percent: u8, rates: &[f64]) -> Vec<u8> {
    let allowed = rates.iter().sum::<f64>() * f64::from(100 - percent.min(99)) / 100.0;
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (mut left, mut cap) = (allowed, 0.0);
    for (index, rate) in sorted.iter().enumerate() {
        let others = (sorted.len() - index) as f64;
        cap = left / others;
        if *rate > cap {
            break;
        }
        left -= rate;
    }
    let percent_of = |rate: &f64| {
        let kept = if *rate > cap { cap / rate } else { 1.0 };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and 99"
        )]
        {
            ((1.0 - kept) * 100.0).round().clamp(0.0, 99.0) as u8
        }
    };
    rates.iter().map(percent_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_knowing_better_all_are_treated_alike() {
        let mut throttle = Throttle::new(3);
        assert_eq!(throttle.set(40, None), [40, 40, 40]);
        assert_eq!(throttle.set(40, Some(vec![1, 2, 3])), [40, 40, 40]);
        assert_eq!(throttle.set(50, Some(vec![1, 2, 3])), [50, 50, 50]);
    }

    #[test]
    fn who_dirties_most_is_slowed_down_most() {
        let mut throttle = Throttle::new(3);
        throttle.set(0, Some(vec![0, 0, 0]));
        // 1000, 100, none: half of it is left if the first one keeps 450.
        assert_eq!(throttle.set(50, Some(vec![1000, 100, 0])), [55, 0, 0]);
        // The same guest, the first one at 45 %.
        assert_eq!(throttle.set(50, Some(vec![1450, 200, 0])), [55, 0, 0]);
        assert_eq!(throttle.set(0, Some(vec![1900, 300, 0])), [0, 0, 0]);
    }

    #[test]
    fn equals_are_slowed_down_equally() {
        let mut throttle = Throttle::new(2);
        throttle.set(0, Some(vec![7, 7]));
        assert_eq!(throttle.set(99, Some(vec![107, 107])), [99, 99]);
    }

    #[test]
    fn counts_of_another_machine_are_no_panic() {
        let mut throttle = Throttle::new(2);
        throttle.set(20, Some(vec![9]));
        assert_eq!(throttle.set(30, Some(vec![1, 2, 3])), [30, 30]);
        assert_eq!(throttle.set(200, Some(vec![0, 0, 0])), [200, 200]);
    }
}
