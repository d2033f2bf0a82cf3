//! Several links for one migration, one after the other.

use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::reception::Entrance;
use pageferry::transport::{
    Attempts, Connector, DestinationLink, Interrupt, LinkPurpose, Rendezvous, SourceLink,
    TransportError,
};

use crate::acceptor::TcpAcceptor;
use crate::channels::Joined;
use crate::connector::TcpConnector;
use crate::destination::TcpDestinationLink;
use crate::newcomer::Newcomer;
use crate::options::TcpOptions;
use crate::source::TcpSourceLink;

/// Dials a destination, as often as its migration loses the link. A name is looked up each time.
///
/// Each attempt is as [`connect()`](crate::connect()), or where the destination has several addresses as
/// [`TcpConnector::connect_by_any`].
#[derive(Debug)]
pub struct TcpDialler {
    addresses: Vec<String>,
    options: TcpOptions,
    attempts: Arc<Attempts>,
}

impl TcpDialler {
    /// To the destination at that address, `host:7400`; or at these, `10.0.1.2:7400,10.0.2.2:7400`.
    pub fn new(address: impl Into<String>, options: TcpOptions) -> Self {
        let addresses = address.into().split(',').map(|each| each.trim().to_owned()).collect();
        Self { addresses, options, attempts: Arc::default() }
    }

    /// Makes a link.
    pub fn dial(&self) -> Result<TcpSourceLink, TransportError> {
        let connector = TcpConnector::new(self.options.clone());
        self.attempts.make(connector.interrupter(), || match &self.addresses[..] {
            [only] => connector.connect(only.as_str()),
            several => connector.connect_by_any(several),
        })
    }
}

impl Connector for TcpDialler {
    fn connect(&mut self, _: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        Ok(Box::new(self.dial()?))
    }

    fn redials(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.attempts) as Arc<dyn Interrupt>
    }
}

/// Where the links of one migration come in: made by [`TcpAcceptor::rendezvous`], and keeps its thread and port.
#[derive(Debug)]
pub struct TcpRendezvous(Entrance<Newcomer, Joined>);

impl TcpAcceptor {
    /// Waits for the links of one migration, which may be several. Interrupted, the acceptor goes on.
    pub fn rendezvous(&self) -> TcpRendezvous {
        TcpRendezvous(Entrance::of(&self.desk))
    }
}

impl TcpRendezvous {
    /// Waits for a source, as [`TcpAcceptor::accept`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<TcpDestinationLink, TransportError> {
        let (newcomer, seat) = self.0.accept(timeout)?;
        TcpDestinationLink::new(newcomer, seat)
    }
}

impl Rendezvous for TcpRendezvous {
    fn accept(
        &mut self,
        _: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        Ok(Box::new(self.wait(timeout)?))
    }

    fn waits_again(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.0.interrupter()
    }
}
