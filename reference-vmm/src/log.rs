//! What the library and the engine log, for programs.

use std::io;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

/// Writes it to stderr: warnings, or what `RUST_LOG` says, in the form `LEVEL` or
/// `TARGET=LEVEL,…` ([`Targets`]).
///
/// # Panics
///
/// If something else takes the log already.
pub fn to_stderr() {
    let wanted = std::env::var("RUST_LOG").ok().and_then(|wanted| wanted.parse::<Targets>().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .log_internal_errors(false)
        .with_target(false)
        .without_time()
        .with_filter(wanted.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN)));
    tracing_subscriber::registry().with(lines).init();
}
