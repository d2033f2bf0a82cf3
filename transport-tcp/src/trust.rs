//! What the two sides make of their settings. A source reads them once for all connections of a link, a destination
//! for each connection.

use std::net::SocketAddr;

use pageferry::transport::TransportError;
use socket2::Socket;

use crate::options::{TcpOptions, stays_within_host};
use crate::security::Security;
use crate::tls::{ClientTls, ServerTls};
use crate::wire::Wire;

/// A source's.
#[derive(Debug, Clone)]
pub(crate) enum Trust {
    /// Nobody is on the way.
    WithinHost,
    /// Whoever is on the way may read.
    PlainText,
    Tls(ClientTls),
}

impl Trust {
    /// For a link to somebody at that address, as it was written.
    pub(crate) fn new(options: &TcpOptions, address: &str) -> Result<Self, TransportError> {
        Ok(match &options.security {
            Security::WithinHost => Self::WithinHost,
            Security::PlainText => Self::PlainText,
            Security::Tls(tls) => {
                let loaded = ClientTls::load(tls, host(address));
                Self::Tls(loaded.map_err(|reason| TransportError::Security {
                    address: address.to_owned(),
                    reason,
                })?)
            }
        })
    }

    /// What goes over this socket.
    pub(crate) fn wire(&self, socket: Socket, peer: SocketAddr) -> Result<Wire, TransportError> {
        let Self::Tls(tls) = self else { return Ok(Wire::plain(socket)) };
        match tls.session() {
            Ok(session) => Ok(Wire::sealed(socket, session, tls.kernel)),
            Err(reason) => Err(TransportError::Security { address: peer.to_string(), reason }),
        }
    }

    /// Fails where it is connected to another host, and should not be in plain text.
    pub(crate) fn check_path(
        &self,
        socket: &Socket,
        peer: SocketAddr,
    ) -> Result<(), TransportError> {
        let Self::WithinHost = self else { return Ok(()) };
        // Who has lost its addresses has lost the connection; and what has none does not leave the host, or is
        // the host's own matter.
        if stays_within_host(socket).unwrap_or(true) {
            return Ok(());
        }
        let reason = "it is another host, and nothing would be encrypted: both sides need TLS, by certificates or a \
                      shared key, or have to be told that plain text will do (--insecure)";
        Err(TransportError::Security { address: peer.to_string(), reason: reason.to_owned() })
    }
}

/// The host of an address with a port.
fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// A connection from outside that does not come in.
#[derive(Debug)]
pub(crate) struct Distrusted {
    pub(crate) socket: Socket,
    pub(crate) reason: String,
}

/// What comes in over this socket.
pub(crate) fn incoming(security: &Security, socket: Socket) -> Result<Wire, Distrusted> {
    match security {
        Security::PlainText => Ok(Wire::plain(socket)),
        Security::WithinHost if stays_within_host(&socket).unwrap_or(true) => {
            Ok(Wire::plain(socket))
        }
        Security::WithinHost => {
            let reason = "plain text from another host: both sides need TLS, or to be told that it will do (--insecure)";
            Err(Distrusted { socket, reason: reason.to_owned() })
        }
        Security::Tls(tls) => {
            match ServerTls::load(tls).and_then(|tls| Ok((tls.session()?, tls.kernel))) {
                Ok((session, kernel)) => Ok(Wire::sealed(socket, session, kernel)),
                Err(reason) => Err(Distrusted { socket, reason }),
            }
        }
    }
}
