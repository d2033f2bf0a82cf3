//! A single page written by RDMA, against perftest's ib_write_lat.

#[cfg(feature = "rdma")]
mod there_and_back;

use std::net::IpAddr;

use pageferry_cli::outcome::Failure;
use pageferry_cli::say;
#[cfg(not(feature = "rdma"))]
use pageferry_cli::transport::WITHOUT_RDMA;
use pageferry_report::document::{PageWritePair, PageWrites};

use crate::links::rdma_address;
use crate::perftest::Device;
use crate::words::RdmaArgs;

const PAGE_BYTES: u32 = 4096;

/// Measures both, in turn.
pub(crate) fn measure(args: RdmaArgs, writes: u32, count: u16) -> Result<PageWrites, Failure> {
    let address = rdma_address(args)?;
    let device = Device::of(address)?;
    let mut pairs = Vec::new();
    for index in 0..count {
        let engine = || engine_us(args, address, writes);
        let perftest = || device.write_latency_us(PAGE_BYTES, writes);
        let pair = if index.is_multiple_of(2) {
            let engine = engine()?;
            PageWritePair::new(engine, perftest()?)
        } else {
            let perftest = perftest()?;
            PageWritePair::new(engine()?, perftest)
        };
        let PageWritePair { engine_us, perftest_us, .. } = pair;
        say!(
            "pair {} of {count}: engine {engine_us:.2} us, ib_write_lat {perftest_us:.2} us",
            index + 1
        );
        pairs.push(pair);
    }
    Ok(PageWrites::new(PAGE_BYTES.into(), writes, pairs))
}

#[cfg(feature = "rdma")]
fn engine_us(args: RdmaArgs, address: IpAddr, writes: u32) -> Result<f64, Failure> {
    there_and_back::measure(address, &crate::links::rdma_options(args), writes)
}

/// The command line does not let anybody come here.
#[cfg(not(feature = "rdma"))]
fn engine_us(_: RdmaArgs, _: IpAddr, _: u32) -> Result<f64, Failure> {
    Err(WITHOUT_RDMA.into())
}
