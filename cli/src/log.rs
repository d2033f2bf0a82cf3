//! What the libraries log, for programs.

use std::io;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::prelude::*;

/// Writes it to stderr: warnings, spans with the time they took as they end, or what `RUST_LOG` says, in the form `LEVEL` or
/// `TARGET=LEVEL,…` ([`Targets`]). If that is neither, it says so and writes warnings.
///
/// # Panics
///
/// If something else takes the log already.
pub fn to_stderr() {
    let wanted =
        std::env::var_os("RUST_LOG").map(|wanted| wanted.to_string_lossy().parse::<Targets>());
    let (wanted, complaint) = match wanted {
        Some(Ok(wanted)) => (wanted, None),
        none => (Targets::new().with_default(LevelFilter::WARN), none.and_then(Result::err)),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .log_internal_errors(false)
        .with_target(false)
        .with_span_events(FmtSpan::CLOSE)
        // Of its own there is none, but spans have theirs.
        .with_timer(())
        .with_filter(wanted);
    tracing_subscriber::registry().with(lines).init();
    if let Some(complaint) = complaint {
        tracing::warn!(
            "RUST_LOG is neither a level nor levels by target, and is ignored: {complaint}"
        );
    }
}
