//! A document that has something of everything, made up, the same every time.

use std::time::Duration;

use pageferry_report::document::{
    Comparison, Contestant, Document, Downtime, Gap, Kind, Migration, Missing, PageWritePair,
    PageWrites, Setting,
};
use pageferry_report::document::{Round, Sample};
use pageferry_report::facts::{Facts, TransportFacts};
use pageferry_report::latency::{Latencies, What};

/// What must be drawn of it.
pub(crate) const PLOTS: &[&str] = &[
    "downtime",
    "comparison-0",
    "latency-batch",
    "latency-control",
    "throughput-0",
    "dirty-rate-0",
    "remaining-0",
    "heartbeat-0",
];

pub(crate) fn document() -> Document {
    let facts = Facts {
        version: "0.0.0".to_owned(),
        cpu: "A CPU with a name that is long enough to be broken on a narrow screen".to_owned(),
        cpus: 2,
        kernel: "6.0".to_owned(),
        memory_bytes: 8 << 30,
        thp: "madvise".to_owned(),
        transports: [("tcp", "sendmsg", true), ("rdma", "no RDMA device", false)]
            .map(|(name, can, available)| TransportFacts {
                name: name.to_owned(),
                can: can.to_owned(),
                available,
                failed: false,
            })
            .into(),
        ..Facts::default()
    };
    let mut document = Document::new(Kind::Report, facts);
    let cases = [("tcp", 0, 0), ("iouring", 1, 2), ("rdma", 0, 0)];
    document.migrations =
        cases.map(|(transport, guest, host)| migration(transport, guest, host)).into();
    for transport in ["tcp", "iouring"] {
        for what in [What::Batch, What::Page, What::Control, What::Commit] {
            document.latencies.push(latencies(transport).summary(what, transport, None));
        }
    }
    document.comparisons.push(Comparison {
        title: "1 GiB of anonymous memory, 2 channels".to_owned(),
        contestants: [("pageferry, tcp", 30.0), ("bare loop", 31.0), ("iperf3", 25.0)]
            .map(|(name, gbps)| Contestant {
                name: name.to_owned(),
                gbps: [0.75, 1.0, 1.25].map(|factor| gbps * factor).into(),
            })
            .into(),
        missing: vec![Missing { name: "ib_write_bw".to_owned(), why: "no device".to_owned() }],
    });
    let pairs = vec![PageWritePair::new(2.5, 2.0), PageWritePair::new(2.25, 2.25)];
    document.page_writes = Some(PageWrites::new(4096, 1000, pairs));
    document
}

fn latencies(transport: &str) -> Latencies {
    let factor = if transport == "tcp" { 1.0 } else { 0.7 };
    let mut latencies = Latencies::new();
    for number in 1..=20_000_u32 {
        // A tail: the longer, the rarer.
        let time = 2e-4 * factor / (1.0 - f64::from(number) / 20_001.0).powf(0.4);
        latencies.record(Duration::from_secs_f64(time));
    }
    latencies
}

fn migration(transport: &str, guest_load: u16, host_load: u16) -> Migration {
    let setting = Setting {
        transport: transport.to_owned(),
        channels: 2,
        backing: "anonymous".to_owned(),
        guest: "kvm".to_owned(),
        workload: "sequential".to_owned(),
        memory_bytes: 512 << 20,
        dirty_rate: Some(20_000),
        guest_load,
        host_load,
        ..Setting::default()
    };
    let sample = |step: u32| Sample {
        ms: f64::from(step) * 5.0,
        landed_bytes: u64::from(step.min(30)) * (16 << 20),
        remaining_bytes: u64::from(30 - step % 31) * (16 << 20),
    };
    let round = |(round, ms, dirty_pages)| Round { round, ms, dirty_pages };
    let gap = |(ms, gap_ms)| Gap { ms, gap_ms };
    Migration {
        setting,
        outcome: "completed".to_owned(),
        oracle_ok: Some(true),
        total_ms: 190.0,
        downtime_ms: 21.6,
        downtime: Downtime {
            pause: 0.4,
            final_harvest: 0.2,
            final_pages: 14.0,
            device_state: 4.0,
            commit: 2.0,
            resume: 1.0,
        },
        verify_ms: 0.2,
        throughput_gbps: 24.0,
        wire_bytes: 500 << 20,
        rounds: [(1, 10.0, 131_072), (2, 120.0, 16_384), (3, 165.0, 4096)].map(round).into(),
        samples: (0..38).map(sample).collect(),
        heartbeat_gap_ms: Some(22.0),
        heartbeat_gaps: [(50.0, 0.4), (100.0, 0.9), (187.0, 22.0), (195.0, 0.3)].map(gap).into(),
        ..Migration::default()
    }
}
