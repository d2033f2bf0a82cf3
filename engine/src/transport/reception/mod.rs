//! What acceptors are made of, whatever moves the bytes: who comes, who has the place, and who is told to
//! come later.
//!
//! An acceptor has a thread of its own that owns its listener, hears what connections are for, and never waits
//! for a stranger. A source is who has [greeted](Admission); it waits for its place in a [`WaitingRoom`], as
//! long as the one that has it keeps that ([`Standing`]). The [`Board`] is between that thread, whoever calls
//! *accept*, and the links that came of it; the [`Desk`] holds them together.

mod admission;
mod bell;
mod board;
mod desk;
mod origin;
mod standing;
mod turned_away;
mod waiting;
mod warnings;

pub use admission::{Admission, MAX_GREETING_BYTES, check_greeting};
pub use bell::Bell;
pub use board::{Arrived, Board, Served};
pub use desk::{Desk, Entrance, Seat, spawn_named};
pub use standing::{Holder, Place, Standing, Turn};
pub use turned_away::TurnedAway;
pub use waiting::{Greeted, WaitingRoom, first_of_the_most};
pub use warnings::Warnings;
