//! Random figures of the kinds that a model needs.

use std::f64::consts::TAU;

use crate::random::Random;

#[derive(Debug)]
pub(super) struct Dice(Random);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    /// From 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.0.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn between(&mut self, least: f64, most: f64) -> f64 {
        least + (most - least) * self.unit()
    }

    /// Any order of magnitude in between is as likely as any other.
    pub(super) fn magnitude(&mut self, least: f64, most: f64) -> f64 {
        self.between(least.ln(), most.ln()).exp()
    }

    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    pub(super) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let index = self.0.below(choices.len() as u64);
        choices[usize::try_from(index).unwrap_or(0)]
    }

    /// Of mean 0 and deviation 1.
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (TAU * self.unit()).cos()
    }

    /// A figure, off by about that share of it.
    pub(super) fn about(&mut self, figure: f64, share: f64) -> f64 {
        figure * (self.normal() * share).exp()
    }

    /// The time until what happens so often a second happens next.
    pub(super) fn wait(&mut self, per_second: f64) -> f64 {
        -(1.0 - self.unit()).ln() / per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_their_kinds() {
        let mut dice = Dice::new(1);
        let many = |figure: &mut dyn FnMut() -> f64| -> Vec<f64> {
            (0..10_000).map(|_| figure()).collect()
        };
        let mean = |figures: &[f64]| figures.iter().sum::<f64>() / figures.len() as f64;
        let units = many(&mut || dice.unit());
        assert!(units.iter().all(|unit| (0.0..1.0).contains(unit)));
        assert!((mean(&units) - 0.5).abs() < 0.02);
        let normals = many(&mut || dice.normal());
        assert!(mean(&normals).abs() < 0.05);
        let squares: Vec<_> = normals.iter().map(|normal| normal * normal).collect();
        assert!((mean(&squares) - 1.0).abs() < 0.1);
        assert!((mean(&many(&mut || dice.wait(4.0))) - 0.25).abs() < 0.02);
        let magnitudes = many(&mut || dice.magnitude(1.0, 10_000.0).log10());
        assert!((mean(&magnitudes) - 2.0).abs() < 0.1);
        assert!(many(&mut || dice.about(0.0, 1.0)).iter().all(|none| *none == 0.0));
    }
}
