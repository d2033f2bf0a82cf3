//! How far migrations are, for Prometheus and whatever else scrapes its text.

mod http;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use clap::Args;
use pageferry::{MigrationHandle, Phase, Snapshot};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::prometheus_text::{CONTENT_TYPE, encode};
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::outcome::{Failure, Outcome};

/// Where they are served.
#[derive(Debug, Clone, Default, Args)]
pub struct MetricsArgs {
    /// Serve metrics for Prometheus at http://ADDR/metrics as long as this command runs: 127.0.0.1:9400, say, or port 0
    /// for one that is free. Whoever reaches that address reads them.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
}

impl MetricsArgs {
    /// Begins to serve them, if they are wanted.
    pub fn open(&self) -> Result<Metrics, Failure> {
        let Some(address) = &self.metrics else { return Ok(Metrics::default()) };
        Metrics::serve(address).map_err(|error| format!("--metrics {address}: {error}").into())
    }
}

/// Which end of a migration this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The guest leaves.
    Source,
    /// It comes.
    Destination,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Source => SOURCE,
            Self::Destination => "destination",
        }
    }
}

/// Who is told of migrations, if anybody wants to know. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    shelf: Option<Arc<Shelf>>,
}

impl Metrics {
    fn serve(address: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let shelf = Arc::new(Shelf::default());
        let mut registry = Registry::with_prefix("pageferry");
        registry.register_collector(Box::new(Arc::clone(&shelf)));
        let page = move || {
            let mut page = String::new();
            match encode(&mut page, &registry) {
                Ok(()) => page,
                // Of what was written before that.
                Err(fmt::Error) => String::new(),
            }
        };
        let body = move || {
            if let Err(error) = http::serve(&listener, CONTENT_TYPE, page) {
                tracing::error!(%error, "metrics are no longer served");
            }
        };
        thread::Builder::new().name("metrics".into()).spawn(body)?;
        say!("metrics at http://{address}/metrics");
        Ok(Self { shelf: Some(shelf) })
    }

    /// From now on this migration is the one of that side.
    pub(crate) fn watch(&self, side: Side, handle: MigrationHandle) {
        if let Some(shelf) = &self.shelf {
            shelf.lock().watched.insert(side, handle);
        }
    }

    /// One has ended, and its guest stood still for so long.
    pub(crate) fn ended(&self, side: Side, outcome: Outcome, downtime_ms: f64) {
        if let Some(shelf) = &self.shelf {
            let mut kept = shelf.lock();
            *kept.ended.entry((side, outcome)).or_default() += 1;
            // It is measured there.
            if (side, outcome) == (Side::Source, Outcome::Completed) {
                kept.downtime_seconds = Some(downtime_ms / 1e3);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shelf(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// The latest one of each side.
    watched: BTreeMap<Side, MigrationHandle>,
    ended: BTreeMap<(Side, Outcome), u64>,
    /// Of the latest that completed, at the source.
    downtime_seconds: Option<f64>,
}

impl Shelf {
    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A figure of a migration, and `None` where there is none yet.
struct Figure {
    name: &'static str,
    help: &'static str,
    /// Whether only the source knows it.
    of_source: bool,
    of: fn(&Snapshot) -> Option<f64>,
}

const SOURCE: &str = "source";

/// What each side's migration has one of.
const FIGURES: [Figure; 11] = [
    Figure {
        name: "elapsed_seconds",
        help: "Since it began, until it ended",
        of_source: false,
        of: |now| Some(now.elapsed.as_secs_f64()),
    },
    Figure {
        name: "round",
        help: "The round, from 1",
        of_source: false,
        of: |now| Some(now.round.into()),
    },
    Figure {
        name: "round_pages",
        help: "Pages to look at in this round",
        of_source: false,
        of: |now| Some(now.round_pages as f64),
    },
    Figure {
        name: "left_pages",
        help: "Those of them that were not looked at yet",
        of_source: true,
        of: |now| Some(now.left_pages as f64),
    },
    Figure {
        name: "left_bytes",
        help: "Bytes of guest memory that this round has not looked at yet",
        of_source: true,
        of: |now| Some(now.left_bytes() as f64),
    },
    Figure {
        name: "dirty_pages_per_second",
        help: "Unique pages that the guest dirties a second",
        of_source: true,
        of: |now| now.expected_downtime.map(|_| now.dirty_pages_per_second),
    },
    Figure {
        name: "bytes_per_second",
        help: "Page bytes that land a second, as decisions count on it",
        of_source: true,
        of: |now| now.expected_downtime.map(|_| now.bytes_per_second),
    },
    Figure {
        name: "expected_downtime_seconds",
        help: "The downtime to expect if the guest were paused now",
        of_source: true,
        of: |now| now.expected_downtime.map(|expected| expected.as_secs_f64()),
    },
    Figure {
        name: "least_downtime_seconds",
        help: "The downtime that further rounds lead to",
        of_source: true,
        of: |now| now.forecast.map(|forecast| forecast.least.as_secs_f64()),
    },
    Figure {
        name: "throttle_ratio",
        help: "By how much the guest is slowed down, 0 to 1",
        of_source: true,
        of: |now| Some(f64::from(now.throttle_percent) / 100.0),
    },
    Figure {
        name: "called_off",
        help: "Switchovers that were called off",
        of_source: false,
        of: |now| Some(now.called_off.into()),
    },
];

impl Collector for Shelf {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let kept = self.lock();
        let migrations: Vec<_> =
            kept.watched.iter().map(|(side, handle)| (side.name(), handle.snapshot())).collect();
        let encoder = &mut encoder;

        for Figure { name, help, of_source, of } in &FIGURES {
            let mut family = family(encoder, name, help, MetricType::Gauge)?;
            for (side, snapshot) in &migrations {
                if let Some(value) = of(snapshot).filter(|_| !of_source || *side == SOURCE) {
                    gauge(&mut family, &[("side", side)], value)?;
                }
            }
        }
        let mut phases =
            family(encoder, "phase", "Where it stands: 1 there, and 0", MetricType::Gauge)?;
        for (side, snapshot) in &migrations {
            for phase in Phase::ALL {
                let labels = [("side", *side), ("phase", &phase.to_string())];
                gauge(&mut phases, &labels, f64::from(u8::from(phase == snapshot.phase)))?;
            }
        }
        let mut pages =
            family(encoder, "pages", "Pages looked at in all rounds", MetricType::Counter)?;
        for (side, snapshot) in &migrations {
            counter(&mut pages, &[("side", side), ("kind", "data")], snapshot.pages.data)?;
            counter(&mut pages, &[("side", side), ("kind", "zero")], snapshot.pages.zero)?;
        }
        let mut landed = family(
            encoder,
            "landed_bytes",
            "Page bytes known to have landed",
            MetricType::Counter,
        )?;
        for_channels(&migrations, |labels, channel| {
            counter(&mut landed, labels, channel.landed_bytes)
        })?;
        let mut wire = family(
            encoder,
            "wire_bytes",
            "Bytes on the wire of data channels",
            MetricType::Counter,
        )?;
        for_channels(&migrations, |labels, channel| {
            counter(&mut wire, labels, channel.wire_bytes)
        })?;
        let mut lost = family(
            encoder,
            "channel_lost",
            "1 where others do its work, and 0",
            MetricType::Gauge,
        )?;
        for_channels(&migrations, |labels, channel| {
            gauge(&mut lost, labels, f64::from(u8::from(channel.lost)))
        })?;

        let help = "The downtime limit that is set";
        let mut limit = family(encoder, "downtime_limit_seconds", help, MetricType::Gauge)?;
        if let Some(handle) = kept.watched.get(&Side::Source) {
            let seconds = handle.settings().downtime_limit.as_secs_f64();
            gauge(&mut limit, &[("side", Side::Source.name())], seconds)?;
        }
        let help = "How long the guest stood still by the latest migration that completed";
        let mut downtime = family(encoder, "downtime_seconds", help, MetricType::Gauge)?;
        if let Some(seconds) = kept.downtime_seconds {
            gauge(&mut downtime, &[("side", Side::Source.name())], seconds)?;
        }
        let mut ended =
            family(encoder, "migrations", "Migrations that ended", MetricType::Counter)?;
        for ((side, outcome), count) in &kept.ended {
            let labels = [("side", side.name()), ("outcome", &outcome.to_string())];
            counter(&mut ended, &labels, *count)?;
        }
        Ok(())
    }
}

/// Each channel of each side, with its labels.
fn for_channels(
    migrations: &[(&'static str, Snapshot)],
    mut each: impl FnMut(&[(&str, &str); 2], &pageferry::ChannelSnapshot) -> fmt::Result,
) -> fmt::Result {
    for (side, snapshot) in migrations {
        for (number, channel) in snapshot.channels.iter().enumerate() {
            each(&[("side", side), ("channel", &number.to_string())], channel)?;
        }
    }
    Ok(())
}

fn family<'e>(
    encoder: &'e mut DescriptorEncoder<'_>,
    name: &'e str,
    help: &str,
    kind: MetricType,
) -> Result<MetricEncoder<'e>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, kind)
}

fn gauge<const N: usize>(
    family: &mut MetricEncoder<'_>,
    labels: &[(&str, &str); N],
    value: f64,
) -> fmt::Result {
    ConstGauge::new(value).encode(family.encode_family(labels)?)
}

fn counter<const N: usize>(
    family: &mut MetricEncoder<'_>,
    labels: &[(&str, &str); N],
    value: u64,
) -> fmt::Result {
    ConstCounter::new(value).encode(family.encode_family(labels)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(metrics: &Metrics) -> String {
        let mut registry = Registry::with_prefix("pageferry");
        registry.register_collector(Box::new(Arc::clone(metrics.shelf.as_ref().expect("served"))));
        let mut page = String::new();
        encode(&mut page, &registry).expect("text");
        page
    }

    /// Nobody has to guess what a name means.
    #[test]
    fn every_metric_is_in_the_documentation() {
        let metrics = Metrics { shelf: Some(Arc::default()) };
        let documentation = include_str!("../../../docs/report.md");
        let (_, documentation) = documentation.split_once("\n## Metrics\n").expect("a section");
        let page = page(&metrics);
        let names: Vec<_> = page
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .filter_map(|line| line.split(' ').next())
            .collect();
        assert!(names.len() > FIGURES.len(), "{names:?}");
        for name in names {
            assert!(documentation.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn what_is_watched_is_served() {
        let metrics = Metrics::serve("127.0.0.1:0").expect("served");
        assert!(!page(&metrics).contains("side="), "nothing yet");
        let source = pageferry::Source::new();
        metrics.watch(Side::Source, source.handle());
        let there = page(&metrics);
        assert!(there.contains("pageferry_phase{side=\"source\",phase=\"setup\"} 1"), "{there}");
        assert!(there.contains("pageferry_phase{side=\"source\",phase=\"ended\"} 0"), "{there}");
        assert!(there.contains("pageferry_downtime_limit_seconds{side=\"source\"} 0.3"), "{there}");
        assert!(!there.contains("pageferry_least_downtime_seconds{"), "nobody knows yet: {there}");
        metrics.ended(Side::Source, Outcome::Failed, 0.0);
        metrics.ended(Side::Source, Outcome::Completed, 20.0);
        metrics.ended(Side::Source, Outcome::Failed, 0.0);
        let there = page(&metrics);
        for line in [
            "pageferry_migrations_total{side=\"source\",outcome=\"failed\"} 2",
            "pageferry_migrations_total{side=\"source\",outcome=\"completed\"} 1",
            "pageferry_downtime_seconds{side=\"source\"} 0.02",
        ] {
            assert!(there.contains(line), "{line}: {there}");
        }
    }

    #[test]
    fn an_address_that_is_taken_is_an_error_that_names_the_flag() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("an address").to_string();
        let args = MetricsArgs { metrics: Some(address.clone()) };
        let why = args.open().expect_err("taken").to_string();
        assert!(why.starts_with(&format!("--metrics {address}: ")), "{why}");
    }
}
