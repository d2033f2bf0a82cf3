//! What the `fpu` workload's registers hold, computed by the host.
//!
//! Nearly every lane of the vector registers and nearly every register of the x87 stack is a chain
//! of its own: a linear congruential generator modulo 2^32, computed in floating point. All
//! intermediate results are integers (or such divided by a power of two) that fit the mantissa, so
//! they are exact, and any step's state follows from its number alone. In the x87 stack they need
//! all 64 bits of the mantissa, and in the vector registers a rounding mode that is not the
//! default, so a lost control word shows as well.
//!
//! - ST1 holds the modulus, the other seven are chains that change places by one in each step.
//! - YMM0 to YMM7 are four chains each, computed by AVX.
//! - The lower halves of YMM8 to YMM14 are two chains each, computed by SSE, which must leave the
//!   upper halves alone.
//! - YMM15 is scratch. It, too, holds what follows from the step's number.
//!
//! A virtual CPU may stand between any two instructions. [`operations`] are the ones that change
//! these registers, in the order of the guest code.

use super::contents::vector_word;

const MODULUS_BITS: u32 = 32;
pub(crate) const MODULUS: f64 = 4_294_967_296.0;
/// Odd increments, and multipliers one above a multiple of four: each chain goes through all 2^32
/// numbers.
pub(crate) const MULTIPLIER: u32 = 0x000a_4cb5;
pub(crate) const INCREMENT: u32 = 0x0003_c6ef;
/// The product has up to 63 bits: more than a double has.
pub(crate) const X87_MULTIPLIER: u32 = 0x5dee_ce6d;
pub(crate) const X87_INCREMENT: u32 = 0x3c6e_f35f;

/// Where the x87 chains are; ST1 is between them.
const X87_PLACES: [usize; 7] = [0, 2, 3, 4, 5, 6, 7];
const MODULUS_PLACE: usize = 1;
const SCRATCH: usize = 15;
const AVX_LANES: usize = 4;
const SSE_LANES: usize = 2;
/// Not zero, so that it says something.
const TOP_AT_REST: u8 = 5;
const X87_REGISTERS: usize = 8;

/// The registers a step works on.
#[derive(Debug, Clone)]
pub(crate) struct Registers {
    /// ST0 first. All of them integers.
    pub(crate) stack: [u64; X87_REGISTERS],
    /// Number of the register that is ST0.
    pub(crate) top: u8,
    pub(crate) ymm: [[f64; AVX_LANES]; 16],
}

/// What an instruction of the guest code does to them. Those on vector registers say how many
/// lanes and which register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    StackMultiply,
    StackAdd,
    /// ST0 modulo ST1.
    StackRemainder,
    /// ST0 with another.
    StackExchange(usize),
    /// ST1 becomes ST0, and so on.
    StackRotate,
    Multiply(usize, usize),
    Add(usize, usize),
    /// To scratch.
    Copy(usize, usize),
    ScratchDivide(usize),
    ScratchRoundDown(usize),
    ScratchMultiply(usize),
    /// Scratch from the register.
    Subtract(usize, usize),
    /// The step is counted: what came before belongs to the number it has now.
    Count,
}

/// Those of a step, the one that counts it, and those of storing a checkpoint.
pub(crate) fn operations() -> Vec<Operation> {
    use Operation::{
        Add, Copy, Count, Multiply, ScratchDivide, ScratchMultiply, ScratchRoundDown, StackAdd,
        StackExchange, StackMultiply, StackRemainder, StackRotate, Subtract,
    };
    let chain = [StackMultiply, StackAdd, StackRemainder];
    let mut operations = chain.to_vec();
    for place in &X87_PLACES[1..] {
        operations.push(StackExchange(*place));
        operations.extend(chain);
    }
    for register in 0..SCRATCH {
        let lanes = lanes(register);
        operations.extend([
            Multiply(lanes, register),
            Add(lanes, register),
            Copy(lanes, register),
            ScratchDivide(lanes),
            ScratchRoundDown(lanes),
            ScratchMultiply(lanes),
            Subtract(lanes, register),
        ]);
    }
    operations.push(Count);
    operations.extend([StackRotate; X87_REGISTERS]);
    operations
}

/// Lanes of a register that are chains.
fn lanes(register: usize) -> usize {
    if register < 8 { AVX_LANES } else { SSE_LANES }
}

impl Registers {
    /// After so many steps, and so many of [`operations`] of the one under way.
    pub(crate) fn at(seed: u64, vcpu: u8, steps: u64, done: usize) -> Self {
        let operations = operations();
        let count = operations.iter().position(|o| *o == Operation::Count);
        let (step, after) = operations.split_at(count.unwrap_or(operations.len()));
        // Scratch holds what the step before left there.
        let mut registers = Self::chains(seed, vcpu, steps.saturating_sub(1));
        if steps > 0 {
            registers.apply_all(step);
        }
        let under_way =
            if done <= step.len() { &step[..done] } else { &after[..done - step.len()] };
        registers.apply_all(under_way);
        registers
    }

    /// After so many steps; scratch as before the first.
    fn chains(seed: u64, vcpu: u8, steps: u64) -> Self {
        let start = |word| high_half(vector_word(seed, vcpu, word));
        let mut stack = [0; X87_REGISTERS];
        stack[MODULUS_PLACE] = 1 << MODULUS_BITS;
        let x87 = jump(X87_MULTIPLIER, X87_INCREMENT, steps);
        let turn = usize::try_from(steps % X87_PLACES.len() as u64).unwrap_or_default();
        for (place, word) in X87_PLACES.iter().cycle().skip(turn).zip(64..).take(X87_PLACES.len()) {
            stack[*place] = x87(start(word)).into();
        }
        let vector = jump(MULTIPLIER, INCREMENT, steps);
        let mut ymm = [[0.0; AVX_LANES]; 16];
        for ((register, values), first_word) in ymm.iter_mut().enumerate().zip((0..).step_by(4)) {
            for ((lane, value), word) in values.iter_mut().enumerate().zip(first_word..) {
                let is_chain = register != SCRATCH && lane < lanes(register);
                *value = if is_chain { vector(start(word)) } else { start(word) }.into();
            }
        }
        Self { stack, top: TOP_AT_REST, ymm }
    }

    fn apply_all(&mut self, operations: &[Operation]) {
        for operation in operations {
            self.apply(*operation);
        }
    }

    fn apply(&mut self, operation: Operation) {
        let [st0, st1, ..] = &mut self.stack;
        let scratch = self.ymm[SCRATCH];
        match operation {
            Operation::StackMultiply => *st0 *= u64::from(X87_MULTIPLIER),
            Operation::StackAdd => *st0 += u64::from(X87_INCREMENT),
            Operation::StackRemainder => *st0 %= *st1,
            Operation::StackExchange(place) => self.stack.swap(0, place),
            Operation::StackRotate => {
                self.stack.rotate_left(1);
                self.top = (self.top + 1) % 8;
            }
            Operation::Multiply(lanes, register) => {
                self.map(lanes, register, |value, _| value * f64::from(MULTIPLIER));
            }
            Operation::Add(lanes, register) => {
                self.map(lanes, register, |value, _| value + f64::from(INCREMENT));
            }
            Operation::Copy(lanes, register) => {
                let copied = self.ymm[register];
                self.map(lanes, SCRATCH, |_, lane| copied[lane]);
            }
            Operation::ScratchDivide(lanes) => self.map(lanes, SCRATCH, |v, _| v / MODULUS),
            Operation::ScratchRoundDown(lanes) => self.map(lanes, SCRATCH, |v, _| v.floor()),
            Operation::ScratchMultiply(lanes) => self.map(lanes, SCRATCH, |v, _| v * MODULUS),
            Operation::Subtract(lanes, register) => self.map(lanes, register, |value, lane| {
                let difference = value - scratch[lane];
                // Where results are rounded down, nothing is negative.
                if difference.to_bits() == 0 { -0.0 } else { difference }
            }),
            Operation::Count => {}
        }
    }

    fn map(&mut self, lanes: usize, register: usize, change: impl Fn(f64, usize) -> f64) {
        for (lane, value) in self.ymm[register].iter_mut().enumerate().take(lanes) {
            *value = change(*value, lane);
        }
    }

    /// As the guest code stores them in a checkpoint: YMM0 to YMM15, then ST0 to ST7 as doubles.
    pub(crate) fn checkpoint(&self) -> Vec<u64> {
        let vectors = self.ymm.iter().flatten().map(|value| value.to_bits());
        let stack = self.stack.iter().map(|value| {
            // Between steps none is above the modulus, which a double holds exactly.
            let halves = [value >> MODULUS_BITS, value & u64::from(u32::MAX)];
            let [high, low] = halves.map(|half| f64::from(u32::try_from(half).unwrap_or_default()));
            high.mul_add(MODULUS, low).to_bits()
        });
        vectors.chain(stack).collect()
    }
}

fn high_half(word: u64) -> u32 {
    u32::try_from(word >> 32).unwrap_or_default()
}

/// Many steps of a generator at once: they are one step of another.
fn jump(multiplier: u32, increment: u32, steps: u64) -> impl Fn(u32) -> u32 {
    let (mut multiplier, mut increment, mut left) = (multiplier, increment, steps);
    let (mut all_multiplier, mut all_increment) = (1u32, 0u32);
    while left > 0 {
        if left % 2 == 1 {
            all_multiplier = all_multiplier.wrapping_mul(multiplier);
            all_increment = all_increment.wrapping_mul(multiplier).wrapping_add(increment);
        }
        increment = increment.wrapping_mul(multiplier).wrapping_add(increment);
        multiplier = multiplier.wrapping_mul(multiplier);
        left /= 2;
    }
    move |start| start.wrapping_mul(all_multiplier).wrapping_add(all_increment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step_len() -> usize {
        operations().iter().position(|o| *o == Operation::Count).unwrap()
    }

    #[test]
    fn a_state_is_the_one_before_and_a_step() {
        for steps in (0..20).chain([u64::from(u32::MAX), 1 << 50]) {
            let stepped = Registers::at(3, 1, steps, step_len());
            let next = Registers::at(3, 1, steps + 1, 0);
            assert_eq!(stepped.checkpoint(), next.checkpoint(), "{steps}");
            assert_eq!(stepped.top, next.top);
        }
    }

    #[test]
    fn storing_a_checkpoint_leaves_no_trace() {
        let before = Registers::at(3, 0, 77, 0);
        let after = Registers::at(3, 0, 77, operations().len());
        assert_eq!(after.checkpoint(), before.checkpoint());
        assert_eq!(after.top, before.top);
        assert_ne!(Registers::at(3, 0, 77, step_len() + 2).top, before.top);
    }

    #[test]
    fn no_two_registers_are_equal() {
        let mut words = Registers::at(3, 0, 1000, 0).checkpoint();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 16 * 4 + 8);
    }

    #[test]
    fn all_of_a_step_is_exact() {
        for done in 0..=step_len() {
            let registers = Registers::at(9, 0, 12_345, done);
            for value in registers.ymm.iter().flatten() {
                // An integer, or one that was just divided.
                assert!(*value >= 0.0 && *value < 2f64.powi(53), "{done}: {value}");
            }
        }
    }
}
