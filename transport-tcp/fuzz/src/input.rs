//! An input as what a peer does, one thing after the other.

/// What is left of an input. At its end everything is 0.
#[derive(Debug, Clone)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// At most so many.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// With some of its bytes changed.
    pub fn mutate(&mut self, bytes: &mut [u8]) {
        for _ in 0..1 + self.byte() % 4 {
            let at = usize::from(self.short());
            let change = self.byte();
            if !bytes.is_empty() {
                let at = at % bytes.len();
                bytes[at] ^= change;
            }
        }
    }
}
