//! The source asks for connections.

use std::io;

use pageferry::transport::TransportError;

use super::Workshop;
use super::event::event;
use super::search::resolve;
use crate::after;
use crate::cm::{Event, Id, PathSettings, RemoteAccess};
use crate::connection::Connection;
use crate::pipe::{Inlet, Outlet};
use crate::preamble::decode_acceptance;

impl Workshop {
    /// Asks for a connection that says so, into which the source puts messages.
    pub(crate) fn ask_for_outlet(
        &self,
        id: Id,
        say: &[u8],
        remote_access: RemoteAccess,
    ) -> Result<Outlet, TransportError> {
        let path = self.path(remote_access, self.mtu);
        let outlet = self.outlet(id, path)?;
        self.ask(&outlet.connection, say, path)?;
        Ok(outlet)
    }

    /// A connection that says so, into which the source puts messages.
    pub(crate) fn dial_outlet(
        &self,
        say: &[u8],
        remote_access: RemoteAccess,
    ) -> Result<Outlet, TransportError> {
        let mut outlet = self.ask_for_outlet(self.way()?, say, remote_access)?;
        self.await_answer(&mut outlet.connection, remote_access)?;
        Ok(outlet)
    }

    /// A connection that says so, into which the destination puts messages.
    pub(crate) fn dial_inlet(&self, say: &[u8]) -> Result<Inlet, TransportError> {
        let path = self.path(RemoteAccess::Nothing, self.mtu);
        let mut inlet = self.inlet(self.way()?, path)?;
        self.ask(&inlet.connection, say, path)?;
        self.await_answer(&mut inlet.connection, RemoteAccess::Nothing)?;
        Ok(inlet)
    }

    pub(crate) fn way(&self) -> Result<Id, TransportError> {
        resolve(self.peer, &self.options, &self.state)
    }

    pub(crate) fn ask(
        &self,
        connection: &Connection,
        say: &[u8],
        path: PathSettings,
    ) -> Result<(), TransportError> {
        connection.id.connect(&connection.qp, path, say).map_err(self.failed())
    }

    pub(crate) fn await_answer(
        &self,
        connection: &mut Connection,
        remote_access: RemoteAccess,
    ) -> Result<(), TransportError> {
        let deadline = after(self.options.connect_timeout);
        let answer = event(&connection.id, &self.state, deadline, "connect")?;
        self.take_answer(connection, remote_access, answer)
    }

    /// Takes in what came of asking for a connection; connected after it.
    pub(crate) fn take_answer(
        &self,
        connection: &mut Connection,
        remote_access: RemoteAccess,
        answer: Event,
    ) -> Result<(), TransportError> {
        let failed = self.failed();
        let path = self.path(remote_access, self.mtu);
        let (id, qp) = (&connection.id, &connection.qp);
        match answer {
            Event::Accepted { said } => {
                let mtu = decode_acceptance(&said, path.mtu)
                    .ok_or(TransportError::Violation("an acceptance that makes no sense"))?;
                self.check_gid(id).map_err(&failed)?;
                id.establish(qp, PathSettings { mtu, ..path }).map_err(&failed)?;
                connection.mtu = mtu;
                Ok(())
            }
            Event::Rejected { said } => {
                let said = String::from_utf8_lossy(&said);
                let said = said.trim_end_matches('\0');
                if said.is_empty() {
                    return Err(failed(io::ErrorKind::ConnectionRefused.into()));
                }
                let address = self.peer.to_string();
                Err(TransportError::Refused { address, reason: said.to_owned() })
            }
            Event::Failed { what, cause } => {
                Err(failed(io::Error::new(cause.kind(), format!("{what}: {cause}"))))
            }
            other => Err(failed(io::Error::other(format!("unexpected {other:?}")))),
        }
    }
}
