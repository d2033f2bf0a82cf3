//! The source asks for connections.

use std::io;

use pageferry::transport::TransportError;
use pageferry::transport::ways::Way;

use super::Workshop;
use super::event::event;
use super::search::resolve;
use crate::after;
use crate::cm::{Event, Id, PathSettings, RemoteAccess};
use crate::connection::Connection;
use crate::frames::shown;
use crate::pipe::{Inlet, Outlet};
use crate::preamble::{ACCEPTANCE_SAID_BYTES, SAID_BYTES, decode_acceptance};
use crate::proof::{Ends, is_proven};

impl Workshop {
    /// Asks for a connection that says so, into which the source puts messages.
    pub(crate) fn ask_for_outlet(
        &self,
        id: Id,
        say: &[u8],
        remote_access: RemoteAccess,
    ) -> Result<Outlet, TransportError> {
        let path = self.path(remote_access, self.mtu);
        let mut outlet = self.outlet(id, path)?;
        self.ask(&mut outlet.connection, say, path)?;
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
        self.ask(&mut inlet.connection, say, path)?;
        self.await_answer(&mut inlet.connection, RemoteAccess::Nothing)?;
        Ok(inlet)
    }

    pub(crate) fn way(&self) -> Result<Id, TransportError> {
        resolve(Way { to: self.peer, from: self.from }, &self.options, &self.state)
    }

    pub(crate) fn ask(
        &self,
        connection: &mut Connection,
        say: &[u8],
        path: PathSettings,
    ) -> Result<(), TransportError> {
        let mut say = say.to_vec();
        if let (Some(key), Some((said, proof))) = (&self.key, say.split_at_mut_checked(SAID_BYTES))
        {
            connection.asked = key.asks(said, Ends::at_source(&connection.id, &connection.qp));
            proof.copy_from_slice(&connection.asked);
        }
        connection.id.connect(&connection.qp, path, &say).map_err(self.failed())
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
            Event::Accepted { said, queue_pair } => {
                let (mtu, proof) = decode_acceptance(&said, path.mtu)
                    .ok_or(TransportError::Violation("an acceptance that makes no sense"))?;
                if let Some(key) = &self.key {
                    let queue_pair = id.told_of(queue_pair);
                    let accepts =
                        key.accepts(&said[..ACCEPTANCE_SAID_BYTES], &connection.asked, queue_pair);
                    if !is_proven(&accepts, &proof) {
                        let reason = "who accepts a connection of the link is not its destination";
                        let (address, reason) = (self.peer.to_string(), reason.to_owned());
                        return Err(TransportError::Security { address, reason });
                    }
                }
                self.check_gid(id).map_err(&failed)?;
                id.establish(qp, PathSettings { mtu, ..path }).map_err(&failed)?;
                connection.mtu = mtu;
                Ok(())
            }
            Event::Rejected { said } => {
                let end = said.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                let said = shown(&said[..end]);
                if said.is_empty() {
                    return Err(failed(io::ErrorKind::ConnectionRefused.into()));
                }
                let address = self.peer.to_string();
                Err(TransportError::Refused { address, reason: said })
            }
            Event::Failed { what, cause } => {
                Err(failed(io::Error::new(cause.kind(), format!("{what}: {cause}"))))
            }
            other => Err(failed(io::Error::other(format!("unexpected {other:?}")))),
        }
    }
}
