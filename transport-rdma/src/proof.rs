//! What shows that a connection belongs to a link whose two sides have shown who they are.
//!
//! The control connections carry a session of TLS, and both sides derive a key of it that nobody else can know (RFC 8446,
//! section 7.5). Each other connection is asked for, and accepted, with a code made by that key (HMAC-SHA-256, its first
//! 16 bytes) of what is said and of the two ends of the connection. So who has heard an id cannot join, and what was
//! heard of one connection is of no use for another one. (iWARP tells the two sides nothing of their ends that they have in
//! common: there what was heard can be said again, as long as the link is there.)

use std::fmt;

use pageferry::transport::LinkId;
use ring::hmac;
use rustls::{Connection, Error};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::cm::{Gid, Id};
use crate::verbs::{Context, QueuePair};

pub(crate) const PROOF_BYTES: usize = 16;

/// A code; zeros where there is no TLS.
pub(crate) type Proof = [u8; PROOF_BYTES];

/// Which of the two sides a code is of, so that neither can be given back its own.
const OF_SOURCE: &[u8] = b"asks";
const OF_DESTINATION: &[u8] = b"accepts";

/// The ends of a connection, as both sides know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    /// GIDs of the source's port and the destination's.
    source: Gid,
    destination: Gid,
    /// The number of the source's queue pair.
    queue_pair: u32,
}

impl Ends {
    /// Of a connection that a source asks for.
    pub(crate) fn at_source(id: &Id, queue_pair: &QueuePair) -> Self {
        let (source, destination) = id.gids();
        Self { source, destination, queue_pair: queue_pair.number() }.told(id)
    }

    /// Of one that a destination is asked for.
    pub(crate) fn at_destination(id: &Id, queue_pair: u32) -> Self {
        let (destination, source) = id.gids();
        Self { source, destination, queue_pair }.told(id)
    }

    /// As far as both sides are told. Over iWARP a connection is one of TCP, and there are neither GIDs nor numbers.
    fn told(self, id: &Id) -> Self {
        let is_iwarp = id.context().is_some_and(Context::is_iwarp);
        if is_iwarp { Self { source: [0; 16], destination: [0; 16], queue_pair: 0 } } else { self }
    }
}

/// Known to both sides of one link, and to nobody else.
#[derive(Clone)]
pub(crate) struct LinkKey(hmac::Key);

impl LinkKey {
    /// Of a session whose handshake is done.
    pub(crate) fn of(session: &Connection, link: LinkId) -> Result<Self, Error> {
        // "EXPERIMENTAL" is for labels that nobody has registered (RFC 5705, section 4).
        const LABEL: &[u8] = b"EXPERIMENTAL pageferry rdma link 1";
        let secret = Zeroizing::new([0; 32]);
        let secret = match session {
            Connection::Client(client) => {
                client.export_keying_material(secret, LABEL, Some(&link.0))
            }
            Connection::Server(server) => {
                server.export_keying_material(secret, LABEL, Some(&link.0))
            }
        }?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &*secret)))
    }

    fn code(&self, parts: &[&[u8]]) -> Proof {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            context.update(part);
        }
        let mut code = Proof::default();
        code.copy_from_slice(&context.sign().as_ref()[..PROOF_BYTES]);
        code
    }

    /// Of a source that says so, and asks for a connection between these ends.
    pub(crate) fn asks(&self, said: &[u8], ends: Ends) -> Proof {
        let Ends { source, destination, queue_pair } = ends;
        self.code(&[OF_SOURCE, said, &source, &destination, &queue_pair.to_le_bytes()])
    }

    /// Of a destination that says so, and accepts what was asked for with that code, by that queue pair.
    pub(crate) fn accepts(&self, said: &[u8], asked: &Proof, queue_pair: u32) -> Proof {
        self.code(&[OF_DESTINATION, said, asked, &queue_pair.to_le_bytes()])
    }
}

/// Whether a code is the one that it has to be.
pub(crate) fn is_proven(wanted: &Proof, shown: &Proof) -> bool {
    wanted.ct_eq(shown).into()
}

impl fmt::Debug for LinkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkKey").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: u8) -> LinkKey {
        LinkKey(hmac::Key::new(hmac::HMAC_SHA256, &[secret; 32]))
    }

    const ENDS: Ends = Ends { source: [1; 16], destination: [2; 16], queue_pair: 7 };

    #[test]
    fn a_code_is_good_for_what_was_said_between_its_ends_and_for_nothing_else() {
        let asked = key(1).asks(b"said", ENDS);
        assert!(is_proven(&asked, &key(1).asks(b"said", ENDS)));
        for other in [
            key(2).asks(b"said", ENDS),
            key(1).asks(b"sais", ENDS),
            key(1).asks(b"said", Ends { source: [3; 16], ..ENDS }),
            key(1).asks(b"said", Ends { destination: [1; 16], ..ENDS }),
            key(1).asks(b"said", Ends { queue_pair: 8, ..ENDS }),
            Proof::default(),
        ] {
            assert!(!is_proven(&asked, &other));
        }
        let accepted = key(1).accepts(b"said", &asked, 9);
        assert!(is_proven(&accepted, &key(1).accepts(b"said", &asked, 9)));
        for other in [
            asked,
            key(2).accepts(b"said", &asked, 9),
            key(1).accepts(b"said", &asked, 8),
            key(1).accepts(b"said", &accepted, 9),
            key(1).accepts(b"sais", &asked, 9),
        ] {
            assert!(!is_proven(&accepted, &other));
        }
    }
}
