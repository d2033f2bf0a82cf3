//! Who runs the guest: two pure state machines with an explicit point of no return.
//!
//! ```text
//!   source                                     destination
//!   Running ── pause ──▶ Stopped               Receiving
//!                          │  ── prepare ──▶      │ load
//!                          │  ◀── prepared ──   Prepared
//!   Running ◀─ resume ─────┤  ── called off ──▶ Receiving     (and once more from the start)
//!   ═══ point of no return │  ── commit ───▶      │
//!                        Committed              Owner ── resume ──▶ Running
//!                          │  ◀── resumed ──      │
//!                        HandedOver               │
//!                          │  ◀── gave back ─   GaveBack (resume failed)
//! ```
//!
//! A switchover may be called off before the point of no return: the guest goes on at the source,
//! and another one follows. Switchovers are numbered, since what the destination says of one may
//! arrive when it was called off, or even in the middle of the next.
//!
//! Before the point of no return any failure leaves the guest to the source. After it the
//! destination owns it. If the link is lost in between, so that one side cannot know, nobody
//! resumes by himself: both are *uncertain* and keep their copy.
//!
//! A link that is lost may be made anew. A source that has not committed has called off what was under way by then, and
//! says so; one that has committed asks what became of the guest, which is the commit too if that never came:
//!
//! ```text
//!   source                                     destination
//!   Running    ── rejoin ───▶                  Receiving, or Prepared ── unload ──▶ Receiving
//!   Committed  ── rejoin, committed ───▶       Prepared ──▶ Owner;  Running ── resumed ──▶;  GaveBack ── gave back ──▶
//! ```
//!
//! The tests of this module explore every interleaving of both machines, with a link that may break at any point and be
//! made anew, and a crash of either side and the end of its patience at every step.

mod destination;
mod source;
#[cfg(test)]
mod tests;

pub use destination::{DestinationAction, DestinationHandover, DestinationInput, DestinationState};
pub use source::{SourceAction, SourceHandover, SourceInput, SourceState};
