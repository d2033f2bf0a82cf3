//! How long a driver waits.

use std::time::{Duration, Instant};

use crate::error::Error;

/// What is waited for, and may not come because the link is dead.
pub(crate) const LANDINGS: &str = "pages to land";
pub(crate) const PONG: &str = "the destination to answer a ping";
pub(crate) const COMMIT: &str = "the commit";
pub(crate) const FATE: &str = "the answer to the commit";
pub(crate) const HEARD: &str = "the source to know what became of the guest";
pub(crate) const SOURCE: &str = "a sign of life of the source";
pub(crate) const COMPARED: &str = "the destination to compare memory";
pub(super) const OF_THE_LINK: [&str; 7] = [LANDINGS, PONG, COMMIT, FATE, HEARD, SOURCE, COMPARED];

/// What came in time may be looked at for so much longer: a driver that was held up takes what is there,
/// and a peer that never stops talking does not hold it.
pub(crate) const OVERTIME: Duration = Duration::from_secs(1);

/// How long to wait, and for what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) what: &'static str,
    pub(crate) since: Instant,
    pub(crate) at_most: Duration,
    /// What is said that it was, if it is over.
    told: Duration,
}

impl Patience {
    pub(crate) fn now(what: &'static str, at_most: Duration) -> Self {
        Self::since(what, Instant::now(), at_most)
    }

    pub(crate) fn since(what: &'static str, since: Instant, at_most: Duration) -> Self {
        Self { what, since, at_most, told: at_most }
    }

    /// When it is over: who was held up itself, by a signal or a host that slept, finds that what it waited for has
    /// come meanwhile.
    pub(crate) fn last_look(&self) -> Self {
        Self { told: self.told, ..Self::now(self.what, OVERTIME) }
    }

    pub(super) fn error(&self) -> Error {
        Error::TimedOut { what: self.what, after: self.told }
    }

    pub(crate) fn left(&self) -> Duration {
        self.at_most.saturating_sub(self.since.elapsed())
    }

    /// Fails when it is over, however much there is to hear.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.since.elapsed() <= self.at_most.saturating_add(OVERTIME) {
            return Ok(());
        }
        Err(self.error())
    }
}
