//! What the tests share.

pub(crate) mod host;
pub(crate) mod lines;
pub(crate) mod long_way;
pub(crate) mod peer;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod report;
pub(crate) mod sides;

use std::time::Duration;

/// How long anything may take that is expected to happen. Generous: only a failure waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
