//! Random numbers, the same in every run.

/// Random 64-bit numbers (xorshift64*), fast and good enough that nothing compresses them.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Spreads the bits of small seeds, and is never zero.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, near enough to even.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        let product = u128::from(self.next()) * u128::from(end);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.as_chunks_mut().0 {
            *word = self.next().to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_stay_below_their_end() {
        let mut random = Random::new(1);
        let seen: Vec<_> = (0..100).map(|_| random.below(3)).collect();
        assert!(seen.iter().all(|number| *number < 3));
        assert!((0..3).all(|number| seen.contains(&number)));
    }
}
