//! Makes connections: asks for them, and accepts them.

mod accepting;
mod asking;
mod device;
mod event;
mod search;
mod workshop;

use std::time::Duration;

use pageferry::transport::LinkId;

use crate::cm::Id;
use crate::pipe::Outlet;
use crate::preamble::Preamble;
use crate::seal::Seal;

pub(crate) use device::check_device;
pub(crate) use search::{Found, Search, resolve};
pub(crate) use workshop::Workshop;

/// Somebody who wants to connect, and is not answered yet. Dropped, it is refused.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: Id,
    pub(crate) preamble: Preamble,
    /// The number of its queue pair.
    pub(crate) queue_pair: u32,
}

/// The first control connection of a link.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) workshop: Workshop,
    pub(crate) migration: LinkId,
    pub(crate) outlet: Outlet,
    /// Where there is TLS.
    pub(crate) seal: Option<Seal>,
}

/// How long ends of pipes have to be heard of before a connection is closed.
pub(crate) const LINGER: Duration = Duration::from_secs(2);
