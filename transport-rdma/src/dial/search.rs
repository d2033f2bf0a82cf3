//! The way to a destination's address.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use pageferry::transport::TransportError;
use pageferry::transport::ways::Way;

use super::event::event;
use crate::addresses::advise;
use crate::after;
use crate::cm::{Event, Id};
use crate::options::RdmaOptions;
use crate::state::LinkState;

/// The search for the way to an address, from an address here that is asked for, or the one of a GID.
#[derive(Debug)]
pub(crate) struct Search {
    pub(crate) id: Id,
    address: SocketAddr,
    from: Option<SocketAddr>,
    /// Whether the device is known, and the route looked for.
    has_device: bool,
}

/// How far a search is.
#[derive(Debug)]
pub(crate) enum Found {
    NotYet(Search),
    Way(Id),
}

impl Search {
    pub(crate) fn begin(way: Way, options: &RdmaOptions) -> Result<Self, TransportError> {
        let from = way.from.map(|from| SocketAddr::new(from, 0));
        Self::begin_from(from, way.to, options)
    }

    fn begin_from(
        from: Option<SocketAddr>,
        address: SocketAddr,
        options: &RdmaOptions,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Connect { address: address.to_string(), cause };
        let id = Id::new().map_err(failed)?;
        if let Some(class) = options.traffic_class {
            id.set_traffic_class(class).map_err(failed)?;
        }
        let search = Self { id, address, from, has_device: false };
        search
            .id
            .resolve_address(from, address, options.connect_timeout)
            .map_err(|cause| search.no_way(cause))?;
        Ok(search)
    }

    /// Takes in what happened to its id.
    pub(crate) fn go_on(
        mut self,
        event: Event,
        options: &RdmaOptions,
    ) -> Result<Found, TransportError> {
        match event {
            Event::AddressResolved if !self.has_device => {
                // Loopback addresses come that far, without a device.
                let asked = self.id.resolve_route(options.connect_timeout);
                asked.map_err(|cause| self.no_way(cause))?;
                self.has_device = true;
                Ok(Found::NotYet(self))
            }
            Event::RouteResolved if self.has_device => match self.other_from(options)? {
                None => Ok(Found::Way(self.id)),
                from => Self::begin_from(from, self.address, options).map(Found::NotYet),
            },
            Event::Failed { what, cause } => {
                let explain = |cause: io::Error| {
                    self.failed(io::Error::new(cause.kind(), format!("{what}: {cause}")))
                };
                Err(explain(if self.has_device { cause } else { self.explained(cause) }))
            }
            other => Err(self.failed(io::Error::other(format!("unexpected {other:?}")))),
        }
    }

    /// The address of the GID that is asked for, where the way found is from another one.
    fn other_from(&self, options: &RdmaOptions) -> Result<Option<SocketAddr>, TransportError> {
        let Some(index) = options.gid_index.filter(|_| self.from.is_none()) else {
            return Ok(None);
        };
        let context =
            self.id.context().ok_or_else(|| self.failed(io::ErrorKind::NotFound.into()))?;
        let wanted =
            context.gid_address(self.id.port(), index).map_err(|cause| self.failed(cause))?;
        let here = self.id.local().map(|local| local.ip());
        Ok(wanted.filter(|wanted| here != Some(*wanted)).map(|wanted| match wanted {
            IpAddr::V6(ip) => {
                // A link-local one is of the same interface as the destination's.
                let scope = if let SocketAddr::V6(to) = self.address { to.scope_id() } else { 0 };
                SocketAddrV6::new(ip, 0, 0, scope).into()
            }
            IpAddr::V4(_) => SocketAddr::new(wanted, 0),
        }))
    }

    fn failed(&self, cause: io::Error) -> TransportError {
        TransportError::Connect { address: self.address.to_string(), cause }
    }

    fn no_way(&self, cause: io::Error) -> TransportError {
        self.failed(self.explained(cause))
    }

    fn explained(&self, cause: io::Error) -> io::Error {
        match self.from {
            Some(from) => io::Error::new(cause.kind(), format!("from {}: {cause}", from.ip())),
            None => advise(cause),
        }
    }
}

/// Finds the way to an address.
pub(crate) fn resolve(
    way: Way,
    options: &RdmaOptions,
    state: &LinkState,
) -> Result<Id, TransportError> {
    let deadline = after(options.connect_timeout);
    let mut search = Search::begin(way, options)?;
    loop {
        let event = event(&search.id, state, deadline, "find the way to the destination")?;
        match search.go_on(event, options)? {
            Found::NotYet(next) => search = next,
            Found::Way(id) => return Ok(id),
        }
    }
}
