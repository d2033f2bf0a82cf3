//! The destination accepts connections.

use std::io;

use pageferry::transport::TransportError;

use super::event::event;
use super::{Request, Workshop};
use crate::after;
use crate::cm::{Event, PathSettings, RemoteAccess};
use crate::connection::Connection;
use crate::pipe::{Inlet, Outlet};
use crate::preamble::{ACCEPTANCE_SAID_BYTES, agree_on_mtu, encode_acceptance};
use crate::proof::Proof;

impl Workshop {
    /// Accepts a connection into which the source puts messages. The source is
    /// there once the connection is established.
    pub(crate) fn begin_inlet(
        &self,
        request: Request,
        remote_access: RemoteAccess,
    ) -> Result<Inlet, TransportError> {
        let path = self.path(remote_access, self.agree(&request)?);
        let asked = request.preamble.proof;
        let mut inlet = self.inlet(request.id, path)?;
        self.accept(&mut inlet.connection, path, &asked)?;
        Ok(inlet)
    }

    /// As [`Self::begin_inlet`], a connection into which the destination puts
    /// messages.
    pub(crate) fn begin_outlet(&self, request: Request) -> Result<Outlet, TransportError> {
        let path = self.path(RemoteAccess::Nothing, self.agree(&request)?);
        let asked = request.preamble.proof;
        let mut outlet = self.outlet(request.id, path)?;
        self.accept(&mut outlet.connection, path, &asked)?;
        Ok(outlet)
    }

    /// Accepts a connection, and waits until the source is there.
    pub(crate) fn accept_inlet(
        &self,
        request: Request,
        remote_access: RemoteAccess,
    ) -> Result<Inlet, TransportError> {
        let inlet = self.begin_inlet(request, remote_access)?;
        self.await_source(&inlet.connection)?;
        Ok(inlet)
    }

    /// As [`Self::accept_inlet`], for an outlet.
    pub(crate) fn accept_outlet(&self, request: Request) -> Result<Outlet, TransportError> {
        let outlet = self.begin_outlet(request)?;
        self.await_source(&outlet.connection)?;
        Ok(outlet)
    }

    /// The path MTU of a request; the other side is told why where there is none.
    fn agree(&self, request: &Request) -> Result<u32, TransportError> {
        let agreed = self.check_gid(&request.id).and_then(|()| {
            let way = request.id.way()?;
            let agreed = agree_on_mtu(request.preamble.mtu, self.mtu, way.mtu);
            agreed.ok_or_else(|| io::Error::other("a path MTU that there is not was asked for"))
        });
        agreed.map_err(|cause| {
            request.id.reject(cause.to_string().as_bytes());
            self.failed()(cause)
        })
    }

    fn accept(
        &self,
        connection: &mut Connection,
        path: PathSettings,
        asked: &Proof,
    ) -> Result<(), TransportError> {
        let (id, qp) = (&connection.id, &connection.qp);
        let mut say = encode_acceptance(path.mtu);
        if let (Some(key), Some((said, proof))) =
            (&self.key, say.split_at_mut_checked(ACCEPTANCE_SAID_BYTES))
        {
            proof.copy_from_slice(&key.accepts(said, asked, id.told_of(qp.number())));
        }
        id.accept(qp, path, &say).map_err(self.failed())?;
        connection.mtu = path.mtu;
        Ok(())
    }

    fn await_source(&self, connection: &Connection) -> Result<(), TransportError> {
        let deadline = after(self.options.connect_timeout);
        match event(&connection.id, &self.state, deadline, "accept a connection")? {
            Event::Established => Ok(()),
            other => Err(self.failed()(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                format!("the source went away while it connected: {other:?}"),
            ))),
        }
    }
}
