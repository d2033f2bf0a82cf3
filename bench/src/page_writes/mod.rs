//! `latency`: a single page written by RDMA, against perftest's ib_write_lat.

#[cfg(feature = "rdma")]
mod there_and_back;

use std::net::IpAddr;

use comfy_table::Cell;
use serde::Serialize;

use crate::args::{LatencyArgs, Transport};
use crate::outcome::{Failure, Outcome};
use crate::output::{self, SCHEMA, median};
use crate::perftest::Device;

/// What the engine's transport took, in microseconds.
#[derive(Debug, Clone, Copy)]
struct Took {
    /// From the call that sends a page until who waits at the other side's memory sees it there.
    write_us: f64,
    /// From that call until the source knows that it has landed.
    landed_us: f64,
}

#[derive(Debug, Serialize)]
struct PairReport {
    engine_us: f64,
    perftest_us: f64,
    ratio: f64,
    landed_us: f64,
}

/// The JSON object. Times are medians, in microseconds.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    transport: Transport,
    page_bytes: u64,
    writes: u32,
    pairs: Vec<PairReport>,
    engine_us_median: Option<f64>,
    perftest_us_median: Option<f64>,
    ratio_median: Option<f64>,
    landed_us_median: Option<f64>,
}

/// Measures, and prints the result.
pub(crate) fn run(args: &LatencyArgs) -> Result<Outcome, Failure> {
    let address = args.rdma.rdma_address.ok_or("there is no address of an RDMA device")?;
    let device = Device::of(address)?;
    let mut pairs = Vec::new();
    for index in 0..args.pairs {
        let engine = || measure(args, address);
        let perftest = || device.write_latency_us(PAGE_BYTES, args.writes);
        let (engine, perftest) = if index.is_multiple_of(2) {
            let engine = engine()?;
            (engine, perftest()?)
        } else {
            let perftest = perftest()?;
            (engine()?, perftest)
        };
        say!(
            "pair {} of {}: engine {:.2} us, ib_write_lat {perftest:.2} us",
            index + 1,
            args.pairs,
            engine.write_us
        );
        pairs.push(PairReport {
            engine_us: engine.write_us,
            perftest_us: perftest,
            ratio: engine.write_us / perftest,
            landed_us: engine.landed_us,
        });
    }
    Report::new(args, pairs).print(args.json)?;
    Ok(Outcome::Completed)
}

const PAGE_BYTES: u32 = 4096;

#[cfg(feature = "rdma")]
fn measure(args: &LatencyArgs, address: IpAddr) -> Result<Took, Failure> {
    there_and_back::measure(address, &crate::throughput::rdma_options(&args.rdma), args.writes)
}

/// The command line does not let anybody come here.
#[cfg(not(feature = "rdma"))]
fn measure(_: &LatencyArgs, _: IpAddr) -> Result<Took, Failure> {
    Err("this program was built without RDMA".into())
}

impl Report {
    fn new(args: &LatencyArgs, pairs: Vec<PairReport>) -> Self {
        let of = |figure: fn(&PairReport) -> f64| median(pairs.iter().map(figure));
        Self {
            schema: SCHEMA,
            transport: args.transport,
            page_bytes: PAGE_BYTES.into(),
            writes: args.writes,
            engine_us_median: of(|pair| pair.engine_us),
            perftest_us_median: of(|pair| pair.perftest_us),
            ratio_median: of(|pair| pair.ratio),
            landed_us_median: of(|pair| pair.landed_us),
            pairs,
        }
    }

    fn print(&self, json: bool) -> Result<(), Failure> {
        let mut table = output::table();
        let figure = |figure: Option<f64>| figure.map_or("-".into(), |it| format!("{it:.2}"));
        for (name, value) in [
            ("a page is there, us", self.engine_us_median),
            ("ib_write_lat, us", self.perftest_us_median),
            ("engine / ib_write_lat", self.ratio_median),
            ("the source knows, us", self.landed_us_median),
        ] {
            table.add_row([Cell::new(name), Cell::new(figure(value))]);
        }
        output::report(self, &table, json)
    }
}
