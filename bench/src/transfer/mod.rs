//! A transfer: guest memory moved from a process to another one on this host, by the engine or by a bare loop
//! of system calls.

mod bare;
mod bare_sealed;
mod machine;
mod memory;
mod side;
mod wire;
mod writer;

use indicatif::HumanBytes;
use pageferry_cli::outcome::Failure;
use pageferry_cli::say;

use crate::sides::{SideName, Sides};

pub(crate) use side::serve;
pub(crate) use wire::{Answer, Contestant, Measured, Order, Setup};

const MEASUREMENT: &str = "transfer";
const GIB: f64 = (1_u64 << 30) as f64;

/// The source and the destination of transfers.
pub(crate) type Pair = Sides<Answer>;

/// What both sides saw of one transfer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) source: Measured,
    pub(crate) destination: Measured,
}

impl Transfer {
    /// Bits of pages a second, in 10⁹.
    pub(crate) fn gbps(&self) -> f64 {
        let seconds = self.source.nanoseconds as f64 / 1e9;
        if seconds > 0.0 { self.source.payload_bytes as f64 * 8.0 / seconds / 1e9 } else { 0.0 }
    }

    /// A figure for each GiB of pages sent; `None` if none was.
    pub(crate) fn per_gib(&self, figure: u64) -> Option<f64> {
        let bytes = self.source.payload_bytes as f64;
        (bytes > 0.0).then(|| figure as f64 * GIB / bytes)
    }
}

/// Both sides, with the source's memory filled.
pub(crate) fn prepared(setup: &Setup) -> Result<Pair, Failure> {
    let mut sides = Pair::start(MEASUREMENT)?;
    say!("filling {} of {} memory", HumanBytes(setup.memory_bytes), setup.backing);
    for side in [SideName::Source, SideName::Destination] {
        sides.tell(side, &Order::Prepare(setup.clone()))?;
        sides.answer(side, |answer| matches!(answer, Answer::Ready).then_some(()))?;
    }
    Ok(sides)
}

/// One measurement.
pub(crate) fn transfer(sides: &mut Pair, contestant: Contestant) -> Result<Transfer, Failure> {
    let measured = |answer| match answer {
        Answer::Measured(measured) => Some(measured),
        _ => None,
    };
    sides.tell(SideName::Destination, &Order::Receive(contestant))?;
    let address = sides.answer(SideName::Destination, |answer| match answer {
        Answer::Listening(address) => Some(address),
        _ => None,
    })?;
    sides.tell(SideName::Source, &Order::Send(contestant, address))?;
    let source = sides.answer(SideName::Source, measured)?;
    let destination = sides.answer(SideName::Destination, measured)?;
    Ok(Transfer { source, destination })
}
