//! The control plane: what the two sides say to each other, and what is decided when. Pure: no socket, no
//! thread.

pub(crate) mod balance;
pub mod convergence;
pub(crate) mod gathering;
pub mod handover;
pub(crate) mod limit;
pub(crate) mod pace;
pub mod protocol;
