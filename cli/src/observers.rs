//! Who watches a program's migrations from outside: a file of events, a page of metrics.

use clap::Args;

use crate::events::{EventArgs, Events};
use crate::metrics::{Metrics, MetricsArgs, Side};
use crate::outcome::Failure;
use crate::report::Report;

/// Who does.
#[derive(Debug, Clone, Default, Args)]
pub struct ObserverArgs {
    #[command(flatten)]
    events: EventArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

impl ObserverArgs {
    /// Opens the file and the port, as far as they are wanted.
    pub fn open(&self) -> Result<Observers, Failure> {
        Ok(Observers { events: self.events.open()?, metrics: self.metrics.open()? })
    }
}

/// They are told, and nothing waits for them. Cheap to clone; the default is nobody.
#[derive(Debug, Clone, Default)]
pub struct Observers {
    /// Lines of what happens.
    pub events: Events,
    /// How far it is.
    pub metrics: Metrics,
}

impl Observers {
    /// How a migration ended at this side.
    pub(crate) fn ended(&self, side: Side, report: &Report) {
        self.metrics.ended(side, report.outcome, report.downtime_ms);
        self.events.ended(report);
    }
}
