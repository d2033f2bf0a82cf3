//! A migration as it runs: a driver on each side, the session between them, and the threads of the data
//! channels.

pub mod destination;
mod receiver;
pub(crate) mod sender;
pub(crate) mod session;
pub mod source;
