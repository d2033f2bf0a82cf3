//! A link that is there, and what makes those that follow it.

use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::{
    Connector, DestinationLink, Interrupt, LinkPurpose, Rendezvous, SourceLink, TransportError,
};

/// Of a migration whose first link is there already.
pub(crate) struct Begun<L: ?Sized, M: ?Sized> {
    first: Option<Box<L>>,
    more: Box<M>,
}

impl<L: ?Sized, M: ?Sized> Begun<L, M> {
    pub(crate) fn with(first: Box<L>, more: Box<M>) -> Self {
        Self { first: Some(first), more }
    }
}

impl Connector for Begun<dyn SourceLink, dyn Connector> {
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        self.first.take().map_or_else(|| self.more.connect(purpose), Ok)
    }

    fn redials(&self) -> bool {
        self.more.redials()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.more.interrupter()
    }
}

impl Rendezvous for Begun<dyn DestinationLink, dyn Rendezvous> {
    fn accept(
        &mut self,
        purpose: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        self.first.take().map_or_else(|| self.more.accept(purpose, timeout), Ok)
    }

    fn waits_again(&self) -> bool {
        self.more.waits_again()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.more.interrupter()
    }
}
