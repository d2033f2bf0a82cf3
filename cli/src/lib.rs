//! What pageferry's programs have in common on a terminal and in scripts, whatever guest they move.
//!
//! - [`units`]: sizes, rates and times as a command line has them.
//! - [`transport`]: transports by name, their options, and links by them.
//! - [`outcome`]: how a program ended, and its exit status.
//! - [`migration`]: options of a migration.
//! - [`signals`]: what Ctrl-C and others mean to it.
//! - [`wishes`]: what is wanted of it by signals and lines on stdin while it migrates.
//! - [`watch`], [`events`] and [`metrics`]: a migration shown while it runs, to people, to programs and to scrapers;
//!   [`observers`]: the last two together.
//! - [`departure`] and [`arrival`]: all of that together, at either side, for any machine.
//! - [`report`]: what it did, as JSON, a table and a page of plots.
//! - [`output`], [`say!`] and [`log`]: what it says.
//! - [`child`]: processes that end with it.
//! - [`cpu`]: what it takes of the CPUs.
//! - [`room`]: whether a guest fits this host.
//!
//! It knows no guest: a program that moves another kind of them has the same home.

/// As `eprintln!`, but in one write, since several processes may share stderr; and if nobody reads
/// it any more, that is no reason to end.
#[macro_export]
macro_rules! say {
    ($($message:tt)+) => {{
        let line = format!("{}\n", format_args!($($message)+));
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    }};
}

pub mod arrival;
pub mod child;
pub mod cpu;
pub mod departure;
pub mod events;
pub mod log;
pub mod metrics;
pub mod migration;
pub mod observers;
pub mod outcome;
pub mod output;
pub mod report;
pub mod room;
pub mod signals;
pub mod transport;
pub mod units;
pub mod watch;
pub mod wishes;
