//! `throughput`: the engine against a bare loop of system calls, or over RDMA against perftest, in
//! turn, over as much memory.

mod args;
mod report;

use crate::host;
use crate::links::{Way, rdma_address, slice_bytes};
use crate::perftest::{Device, WRITE};
use crate::sides::{self, SideName};
use crate::transfer::{self, Answer, Contestant, Order, Setup, prepared, transfer};
use crate::words::Transport;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use report::{Other, Pair, Report};

pub(crate) use args::{EXAMPLES, METHOD, ThroughputArgs};

/// Measures, and prints the result.
pub(crate) fn run(args: &ThroughputArgs) -> Result<Outcome, Failure> {
    host::check_room_for_two(args.memory, args.backing)?;
    let setup = Setup {
        memory_bytes: args.memory,
        backing: args.backing,
        zero_share: args.zero_share,
        dirty_rate: args.dirty_rate,
        way: Way { transport: args.transport, rdma: args.rdma },
        channels: args.channels,
        zero_copy: args.zero_copy,
        batch_bytes: args.batch,
        populate_threads: args.populate,
    };
    let measured = measure(&setup, args.pairs);
    sides::outcome(measured.and_then(|pairs| Report::new(&setup, &pairs).print(args.json)))
}

fn measure(setup: &Setup, count: u16) -> Result<Vec<Pair>, Failure> {
    let rival = Rival::of(setup)?;
    let mut sides = prepared(setup)?;
    // Not counted: the first to touch memory that nobody used before pays for it, in a virtual
    // machine to its host.
    match &rival {
        Rival::Bare => {
            transfer(&mut sides, Contestant::Bare)?;
            verify(&mut sides, Contestant::Bare)?;
        }
        Rival::Perftest { .. } => {
            transfer(&mut sides, Contestant::Engine)?;
            verify(&mut sides, Contestant::Engine)?;
        }
    }
    let mut pairs = Vec::new();
    for index in 0..count {
        // In turn, so that what changes slowly on this host changes for both.
        let pair = if index.is_multiple_of(2) {
            let engine = transfer(&mut sides, Contestant::Engine)?;
            if index == 0 {
                verify(&mut sides, Contestant::Engine)?;
            }
            Pair { engine, other: rival.measure(&mut sides)? }
        } else {
            let other = rival.measure(&mut sides)?;
            Pair { engine: transfer(&mut sides, Contestant::Engine)?, other }
        };
        let (engine, other) = (pair.engine.gbps(), pair.other.gbps());
        let name = rival.name();
        say!("pair {} of {count}: engine {engine:.2} Gb/s, {name} {other:.2} Gb/s", index + 1);
        pairs.push(pair);
    }
    Ok(pairs)
}

/// What the engine is measured against.
enum Rival {
    /// The bare loop of system calls, by the same two processes.
    Bare,
    /// ib_write_bw, by processes of its own.
    Perftest { device: Device, bytes: u32, queue_pairs: u16, writes: u64 },
}

impl Rival {
    fn of(setup: &Setup) -> Result<Self, Failure> {
        if setup.way.transport != Transport::Rdma {
            return Ok(Self::Bare);
        }
        let address = rdma_address(setup.way.rdma)?;
        let bytes = slice_bytes(setup.way.rdma);
        let writes = setup.memory_bytes / u64::from(bytes) / u64::from(setup.channels);
        Ok(Self::Perftest {
            device: Device::of(address)?,
            bytes,
            queue_pairs: setup.channels,
            writes,
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Bare => "bare loop",
            Self::Perftest { .. } => WRITE,
        }
    }

    fn measure(&self, sides: &mut transfer::Pair) -> Result<Other, Failure> {
        Ok(match self {
            Self::Bare => Other::Bare(transfer(sides, Contestant::Bare)?),
            Self::Perftest { device, bytes, queue_pairs, writes } => {
                Other::Perftest { gbps: device.gbps(WRITE, *bytes, *queue_pairs, *writes)? }
            }
        })
    }
}

/// Whether both sides have the same memory now.
fn verify(sides: &mut transfer::Pair, mover: Contestant) -> Result<(), Failure> {
    let both = [SideName::Source, SideName::Destination];
    let mut digests = Vec::new();
    for side in both {
        sides.tell(side, &Order::Digest)?;
    }
    for side in both {
        digests.push(sides.answer(side, |answer| match answer {
            Answer::Digest(digest) => Some(digest),
            _ => None,
        })?);
    }
    if digests[0] != digests[1] {
        return Err(format!(
            "failed to move memory by the {mover}: the source has {} and the destination {}",
            digests[0], digests[1]
        )
        .into());
    }
    say!("moved by the {mover}: the destination's memory is the source's, by digest");
    Ok(())
}
