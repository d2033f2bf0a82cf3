//! What the two sides make of [`RdmaOptions::security`].

use std::net::SocketAddr;

use pageferry::transport::TransportError;
use pageferry_identity::{ClientTls, Security, ServerFiles};

use crate::cm::Id;
use crate::options::RdmaOptions;
use crate::seal::Seal;

/// A source's.
#[derive(Debug)]
pub(crate) struct Trust {
    tls: Option<ClientTls>,
}

impl Trust {
    /// For a link to somebody at that address, as it was written.
    pub(crate) fn new(options: &RdmaOptions, address: &str) -> Result<Self, TransportError> {
        let Security::Tls(tls) = &options.security else { return Ok(Self { tls: None }) };
        let loaded = ClientTls::load(tls, address);
        let unusable = |reason| TransportError::Security { address: address.to_owned(), reason };
        Ok(Self { tls: Some(loaded.map_err(unusable)?) })
    }

    /// What control frames go through.
    pub(crate) fn seal(&self, peer: SocketAddr) -> Result<Option<Seal>, TransportError> {
        let Some(tls) = &self.tls else { return Ok(None) };
        match tls.session(peer) {
            Ok(session) => Ok(Some(Seal::new(session, peer))),
            Err(reason) => Err(TransportError::Security { address: peer.to_string(), reason }),
        }
    }
}

/// Fails where an id leads to another host, and what would pass should not in plain text; with what to do, short enough
/// for the other side.
pub(crate) fn check_path(options: &RdmaOptions, id: &Id) -> Result<(), &'static str> {
    match &options.security {
        Security::PlainText => Ok(()),
        Security::Tls(_) if options.plain_text_pages => Ok(()),
        Security::WithinHost | Security::Tls(_) if id.is_within_host() => Ok(()),
        Security::WithinHost => Err(
            "plain text from or to another host: both sides need --insecure, or a shared key or certificates and \
                 --plaintext-data",
        ),
        Security::Tls(_) => Err(
            "pages in plain text from or to another host, since rdma encrypts none: both sides need --plaintext-data",
        ),
    }
}

/// A destination's.
#[derive(Debug)]
pub(crate) struct Doorkeeper {
    files: Option<ServerFiles>,
}

impl Doorkeeper {
    pub(crate) fn new(security: &Security) -> Self {
        let files = match security {
            Security::Tls(tls) => Some(ServerFiles::new(tls.clone())),
            Security::WithinHost | Security::PlainText => None,
        };
        Self { files }
    }

    /// Why somebody is refused who has TLS, or has none; in words for the other side.
    pub(crate) fn check(&self, sealed: bool) -> Result<(), &'static str> {
        match (&self.files, sealed) {
            (Some(_), true) | (None, false) => Ok(()),
            (Some(_), false) => Err(
                "it wants TLS: this side needs a shared key or certificates, as the destination has them",
            ),
            (None, true) => Err("it has neither a shared key nor certificates, and no TLS"),
        }
    }

    /// What the control frames of somebody who has come go through; else why not, for this side.
    pub(crate) fn seal(&mut self, peer: SocketAddr) -> Result<Option<Seal>, String> {
        let Some(files) = &mut self.files else { return Ok(None) };
        let session = files.current()?.session()?;
        Ok(Some(Seal::new(session, peer)))
    }
}
