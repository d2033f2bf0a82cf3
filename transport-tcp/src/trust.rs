//! What the two sides make of their settings. A source reads them for each link, a destination
//! when they have changed.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use pageferry::transport::TransportError;
use socket2::Socket;

use crate::options::{TcpOptions, stays_within_host};
use crate::security::{Material, Security, Stamp, Tls};
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
        match tls.session(peer) {
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
        // Who has lost its addresses has lost the connection.
        if stays_within_host(socket).unwrap_or(false) {
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
    /// What its other side is told, whoever that is.
    pub(crate) told: &'static str,
    /// Why, for this side.
    pub(crate) why: String,
}

/// A destination's. Reads its files again where they have changed.
#[derive(Debug)]
pub(crate) struct Doorkeeper {
    security: Security,
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    loaded: Result<ServerTls, String>,
    /// What the files were like.
    stamps: Vec<Option<Stamp>>,
    /// When they were read.
    read: SystemTime,
}

impl Kept {
    /// Whether it is what would be read now. A file that was written just before may have been written again since, with
    /// the same time.
    fn holds(&self, stamps: &[Option<Stamp>]) -> bool {
        const TICK: Duration = Duration::from_secs(1);
        let settled = |stamp: &Stamp| stamp.changed + TICK < self.read;
        // What failed may do so no longer, whatever the files are like.
        self.loaded.is_ok() && self.stamps == stamps && stamps.iter().flatten().all(settled)
    }
}

impl Doorkeeper {
    pub(crate) fn new(security: Security) -> Self {
        Self { security, kept: None }
    }

    /// What comes in over this socket.
    pub(crate) fn wire(&mut self, socket: Socket) -> Result<Wire, Distrusted> {
        match &self.security {
            Security::PlainText => Ok(Wire::plain(socket)),
            Security::WithinHost if stays_within_host(&socket).unwrap_or(false) => {
                Ok(Wire::plain(socket))
            }
            Security::WithinHost => {
                let told = "plain text from another host: both sides need TLS, or to be told that it will do (--insecure)";
                Err(Distrusted { socket, told, why: told.to_owned() })
            }
            Security::Tls(tls) => {
                let session =
                    load(&mut self.kept, tls).and_then(|tls| Ok((tls.session()?, tls.kernel)));
                match session {
                    Ok((session, kernel)) => Ok(Wire::sealed(socket, session, kernel)),
                    Err(why) => {
                        let told = "the destination cannot show who it is; its log says why";
                        Err(Distrusted { socket, told, why })
                    }
                }
            }
        }
    }
}

fn load(kept: &mut Option<Kept>, tls: &Tls) -> Result<ServerTls, String> {
    let stamps: Vec<_> = tls.identity.materials().map(Material::stamp).collect();
    if let Some(kept) = kept.as_ref().filter(|kept| kept.holds(&stamps)) {
        return kept.loaded.clone();
    }
    let (read, loaded) = (SystemTime::now(), ServerTls::load(tls));
    kept.insert(Kept { loaded, stamps, read }).loaded.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::{Identity, Material};

    /// Read then, of files that were changed so long before.
    fn kept(before: &[Duration]) -> (Kept, Vec<Option<Stamp>>) {
        let read = SystemTime::now();
        let stamps: Vec<_> =
            before.iter().map(|before| Some(Stamp::of((1, 2, 3), read - *before))).collect();
        let tls = Tls::new(Identity::SharedKey(Material::bytes([7; 32])));
        (Kept { loaded: ServerTls::load(&tls), stamps: stamps.clone(), read }, stamps)
    }

    #[test]
    fn what_was_read_holds_until_a_file_has_changed() {
        let (long, moment) = (Duration::from_secs(60), Duration::from_millis(10));
        let (old, stamps) = kept(&[long, long]);
        assert!(old.holds(&stamps));
        let other = |file| vec![stamps[0].clone(), Some(Stamp::of(file, old.read - long))];
        for file in [(9, 2, 3), (1, 9, 3), (1, 2, 9)] {
            assert!(!old.holds(&other(file)), "{file:?}");
        }
        let later = vec![stamps[0].clone(), Some(Stamp::of((1, 2, 3), old.read - moment))];
        assert!(!old.holds(&later), "written again");
        assert!(!old.holds(&[stamps[0].clone(), None]), "gone");
        let (fresh, stamps) = kept(&[long, moment]);
        assert!(!fresh.holds(&stamps), "it may have been written again within a tick");
        let (failed, stamps) = kept(&[long]);
        assert!(!Kept { loaded: Err("no descriptor".to_owned()), ..failed }.holds(&stamps));
    }
}
