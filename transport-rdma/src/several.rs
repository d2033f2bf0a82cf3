//! Several links for one migration, one after the other.

use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::reception::Entrance;
use pageferry::transport::{
    Attempts, Connector, DestinationLink, Interrupt, LinkPurpose, Rendezvous, SourceLink,
    TransportError,
};

use crate::acceptor::RdmaAcceptor;
use crate::connector::RdmaConnector;
use crate::destination::RdmaDestinationLink;
use crate::dial::Request;
use crate::options::RdmaOptions;
use crate::reception::Arrival;
use crate::requests::Requests;

/// Dials a destination, as often as its migration loses the link. A name is looked up each time.
///
/// Each attempt is as [`connect()`](crate::connect()).
#[derive(Debug)]
pub struct RdmaDialler {
    address: String,
    options: RdmaOptions,
    attempts: Arc<Attempts>,
}

impl RdmaDialler {
    /// To the destination at that address: `host:7400`.
    pub fn new(address: impl Into<String>, options: RdmaOptions) -> Self {
        Self { address: address.into(), options, attempts: Arc::default() }
    }
}

impl Connector for RdmaDialler {
    fn connect(&mut self, _: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        let connector = RdmaConnector::new(self.options.clone())?;
        let link =
            self.attempts.make(connector.interrupter(), || connector.connect(&self.address))?;
        Ok(Box::new(link))
    }

    fn redials(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.attempts) as Arc<dyn Interrupt>
    }
}

/// Where the links of one migration come in: made by [`RdmaAcceptor::rendezvous`], and keeps its thread and port.
#[derive(Debug)]
pub struct RdmaRendezvous(Entrance<Arrival, Requests<Request>>);

impl RdmaAcceptor {
    /// Waits for the links of one migration, which may be several. Interrupted, the acceptor goes on.
    pub fn rendezvous(&self) -> RdmaRendezvous {
        RdmaRendezvous(Entrance::of(&self.desk))
    }
}

impl Rendezvous for RdmaRendezvous {
    fn accept(
        &mut self,
        _: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        let (arrival, seat) = self.0.accept(timeout)?;
        Ok(Box::new(RdmaDestinationLink::new(arrival, seat)?))
    }

    fn waits_again(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.0.interrupter()
    }
}
