//! perftest's bandwidth tests, over the device that was named, or the first one.

use pageferry_cli::outcome::Failure;

use super::process::find as find_program;
use super::{CompareArgs, Mover};
use crate::links::slice_bytes;
use crate::perftest::Device;

struct Perftest {
    program: &'static str,
    device: Device,
    message_bytes: u32,
    messages: u64,
    queue_pairs: u16,
}

pub(super) fn find(args: &CompareArgs, program: &'static str) -> Result<Box<dyn Mover>, Failure> {
    find_program(program, "perftest")?;
    let device = args.rdma.rdma_address.map_or_else(Device::first, Device::of)?;
    let message_bytes = match args.rdma.rdma_slice {
        Some(_) => slice_bytes(args.rdma),
        None => 64 << 10,
    };
    let messages = args.memory / u64::from(message_bytes) / u64::from(args.channels);
    let queue_pairs = args.channels;
    Ok(Box::new(Perftest { program, device, message_bytes, messages, queue_pairs }))
}

impl Mover for Perftest {
    fn name(&self) -> String {
        format!("{} on {}", self.program, self.device.name())
    }

    fn measure(&mut self) -> Result<f64, Failure> {
        self.device.gbps(self.program, self.message_bytes, self.queue_pairs, self.messages)
    }
}
