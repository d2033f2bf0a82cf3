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
use crate::kept::Kept;
use crate::options::RdmaOptions;
use crate::reception::Arrival;
use crate::requests::Requests;

/// Dials a destination, as often as its migration loses the link. A name is looked up each time. Guest memory stays
/// registered from one link to the next, until this is dropped.
///
/// Each attempt is as [`connect()`](crate::connect()), or where the destination has several addresses as
/// [`RdmaConnector::connect_by_any`].
#[derive(Debug)]
pub struct RdmaDialler {
    addresses: Vec<String>,
    options: RdmaOptions,
    attempts: Arc<Attempts>,
    kept: Kept,
}

impl RdmaDialler {
    /// To the destination at that address, `host:7400`; or at these, `10.0.1.2:7400,10.0.2.2:7400`.
    pub fn new(address: impl Into<String>, options: RdmaOptions) -> Self {
        let addresses = address.into().split(',').map(|each| each.trim().to_owned()).collect();
        Self { addresses, options, attempts: Arc::default(), kept: Kept::default() }
    }
}

impl Connector for RdmaDialler {
    fn connect(&mut self, _: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        let connector = RdmaConnector::new(self.options.clone())?;
        let mut link =
            self.attempts.make(connector.interrupter(), || match &self.addresses[..] {
                [only] => connector.connect(only.as_str()),
                several => connector.connect_by_any(several),
            })?;
        link.keep_in(&self.kept);
        Ok(Box::new(link))
    }

    fn redials(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.attempts) as Arc<dyn Interrupt>
    }
}

/// Where the links of one migration come in: made by [`RdmaAcceptor::rendezvous`], and keeps its thread and port. Guest
/// memory stays registered from one link to the next, until this is dropped; what a source could reach it by ends with
/// its link.
#[derive(Debug)]
pub struct RdmaRendezvous {
    entrance: Entrance<Arrival, Requests<Request>>,
    kept: Kept,
}

impl RdmaAcceptor {
    /// Waits for the links of one migration, which may be several. Interrupted, the acceptor goes on.
    pub fn rendezvous(&self) -> RdmaRendezvous {
        RdmaRendezvous { entrance: Entrance::of(&self.desk), kept: Kept::default() }
    }
}

impl Rendezvous for RdmaRendezvous {
    fn accept(
        &mut self,
        _: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        let (arrival, seat) = self.entrance.accept(timeout)?;
        let mut link = RdmaDestinationLink::new(arrival, seat)?;
        link.keep_in(&self.kept);
        Ok(Box::new(link))
    }

    fn waits_again(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.entrance.interrupter()
    }
}
