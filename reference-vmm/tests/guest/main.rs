//! Guests of both kinds, by themselves and moved.

mod alone;
mod common;
#[path = "../shared/documented.rs"]
mod documented;
mod filtered;
mod migrated;
mod moving;
mod oracle;
mod snapshots;
mod throttled;
mod tracked;
