//! What the two sides make of their settings. A source reads them for each link, a destination
//! when they have changed.

use std::net::SocketAddr;

use pageferry::transport::TransportError;
use pageferry_identity::{ClientTls, Security, ServerFiles};
use socket2::Socket;

use crate::options::{TcpOptions, stays_within_host};
use crate::tls::Session;
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
                let loaded = ClientTls::load(tls, address);
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
        match tls.session(peer) {
            Ok(session) => Ok(Wire::sealed(socket, Session::new(session.into()), tls.kernel())),
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
        // Who has lost its addresses has lost the connection.
        if stays_within_host(socket).unwrap_or(false) {
            return Ok(());
        }
        let reason = "it is another host, and nothing would be encrypted: both sides need TLS, by certificates or a \
                      shared key, or have to be told that plain text will do (--insecure)";
        Err(TransportError::Security { address: peer.to_string(), reason: reason.to_owned() })
    }
}

/// A connection from outside that does not come in.
#[derive(Debug)]
pub(crate) struct Distrusted {
    pub(crate) socket: Socket,
    /// What its other side is told, whoever that is.
    pub(crate) told: &'static str,
    /// Why, for this side.
    pub(crate) why: String,
}

/// A destination's.
#[derive(Debug)]
pub(crate) enum Doorkeeper {
    WithinHost,
    PlainText,
    Tls(Box<ServerFiles>),
}

impl Doorkeeper {
    pub(crate) fn new(security: Security) -> Self {
        match security {
            Security::WithinHost => Self::WithinHost,
            Security::PlainText => Self::PlainText,
            Security::Tls(tls) => Self::Tls(Box::new(ServerFiles::new(tls))),
        }
    }

    /// What comes in over this socket.
    pub(crate) fn wire(&mut self, socket: Socket) -> Result<Wire, Distrusted> {
        match self {
            Self::PlainText => Ok(Wire::plain(socket)),
            Self::WithinHost if stays_within_host(&socket).unwrap_or(false) => {
                Ok(Wire::plain(socket))
            }
            Self::WithinHost => {
                let told = "plain text from another host: both sides need TLS, or to be told that it will do (--insecure)";
                Err(Distrusted { socket, told, why: told.to_owned() })
            }
            Self::Tls(files) => {
                let session = files.current().and_then(|tls| Ok((tls.session()?, tls.kernel())));
                match session {
                    Ok((session, kernel)) => {
                        Ok(Wire::sealed(socket, Session::new(session.into()), kernel))
                    }
                    Err(why) => {
                        let told = "the destination cannot show who it is; its log says why";
                        Err(Distrusted { socket, told, why })
                    }
                }
            }
        }
    }
}
