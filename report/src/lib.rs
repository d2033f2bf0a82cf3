//! What measurements of pageferry have in common.
//!
//! - [`document`]: the JSON object that every measurement prints and every report is made of. Its
//!   schema is a contract, `docs/report.md`.
//! - [`latency`]: histograms of times, and the files they are kept in.
//! - [`recorder`]: what a migration did over time, recorded while it runs.
//! - [`heartbeat`]: when a guest was heard meanwhile, and when it was not.
//! - [`facts`]: the machine that all of it was measured on.
//! - [`trace`]: a document of the events that a program wrote to a file.
//! - [`page`]: one HTML file that shows a document, and needs nothing else to be looked at.
//!
//! It is a crate of its own since all programs write reports, and guests have heartbeats.

pub mod document;
pub mod facts;
pub mod heartbeat;
mod hgrm;
pub mod latency;
pub mod page;
mod plot;
pub mod recorder;
pub mod trace;
