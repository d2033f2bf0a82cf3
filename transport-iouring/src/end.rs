//! What the source's end of a link and the destination's have in common: tcp's end of it, `T`, the rings, and
//! what is kept of guest memory.

use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::TransportError;

use crate::rings::Rings;
use crate::table::Table;

#[derive(Debug)]
pub(crate) struct End<T> {
    pub(crate) tcp: T,
    pub(crate) rings: Rings,
    registered: Option<Registered>,
}

#[derive(Debug, Clone)]
pub(crate) struct Registered {
    pub(crate) memory: Arc<GuestMemory>,
    /// If memory is registered with the kernel: held, so that all pages stay where they are.
    pub(crate) table: Option<Arc<Table>>,
}

impl<T> End<T> {
    pub(crate) fn new(tcp: T, rings: Rings) -> Self {
        Self { tcp, rings, registered: None }
    }

    pub(crate) fn register(&mut self, memory: &Arc<GuestMemory>, table: Option<Arc<Table>>) {
        self.registered = Some(Registered { memory: Arc::clone(memory), table });
    }

    pub(crate) fn registered(&self) -> Result<Registered, TransportError> {
        let missing = TransportError::OutOfOrder("guest memory is not registered");
        self.registered.clone().ok_or(missing)
    }
}
