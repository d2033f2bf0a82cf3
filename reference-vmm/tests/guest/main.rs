//! Guests of both kinds, by themselves and moved.

mod alone;
mod common;
mod migrated;
mod moving;
mod oracle;
mod snapshots;
mod throttled;
mod tracked;
