//! The engine and the bare loop, as `throughput` has them move memory.

use pageferry_cli::outcome::Failure;
use pageferry_cli::transport::ZeroCopyChoice;

use super::{CompareArgs, Mover};
use crate::links::Way;
use crate::transfer::{Contestant, Pair, Setup, prepared, transfer};
use crate::words::Transport;

/// Both, since a pair of processes can do either.
struct Own {
    sides: Pair,
    contestant: Contestant,
    name: String,
}

impl Mover for Own {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn measure(&mut self) -> Result<f64, Failure> {
        Ok(transfer(&mut self.sides, self.contestant)?.gbps())
    }
}

pub(super) fn engine(args: &CompareArgs, transport: Transport) -> Result<Box<dyn Mover>, Failure> {
    let sides = prepared(&setup(args, transport))?;
    let name = format!("pageferry, {transport}");
    Ok(Box::new(Own { sides, contestant: Contestant::Engine, name }))
}

pub(super) fn bare(args: &CompareArgs) -> Result<Box<dyn Mover>, Failure> {
    let sides = prepared(&setup(args, Transport::Tcp))?;
    Ok(Box::new(Own { sides, contestant: Contestant::Bare, name: "bare loop".to_owned() }))
}

fn setup(args: &CompareArgs, transport: Transport) -> Setup {
    Setup {
        memory_bytes: args.memory,
        backing: args.backing,
        zero_share: 0.0,
        dirty_rate: 0,
        way: Way { transport, rdma: args.rdma },
        channels: args.channels,
        zero_copy: ZeroCopyChoice::Auto,
        batch_bytes: None,
        populate_threads: 0,
    }
}
