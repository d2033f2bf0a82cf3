//! TLS 1.3 over the messages of a control channel: a handshake, then one record or more for each message.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pageferry::transport::{LinkId, TransportError};
use pageferry_identity::words;
use rustls::{Connection, Error};

use crate::frames::{REFUSED, SEALED};
use crate::pipe::SLOT_BYTES;
use crate::proof::LinkKey;

/// A session of TLS, whose records go as messages.
pub(crate) struct Seal {
    peer: SocketAddr,
    session: Mutex<Session>,
}

struct Session {
    tls: Connection,
    /// Something was opened since the handshake: so the other side takes this one for who it is.
    opened: bool,
    failed: bool,
}

/// Why a message cannot be opened.
#[derive(Debug)]
pub(crate) enum Unopened {
    /// TLS says so.
    Tls(Error),
    /// It is in plain text.
    Plain,
}

impl fmt::Display for Unopened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tls(error) => f.write_str(&words(error)),
            Self::Plain => f.write_str("a message in plain text, where TLS was agreed on"),
        }
    }
}

impl Seal {
    /// With who is there, before the first byte.
    pub(crate) fn new(session: impl Into<Connection>, peer: SocketAddr) -> Self {
        let session = Session { tls: session.into(), opened: false, failed: false };
        Self { peer, session: Mutex::new(session) }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        // A thread that panicked in there has left the session as it is; nothing of it is half changed.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    pub(crate) fn is_shaking_hands(&self) -> bool {
        self.session().tls.is_handshaking()
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.session().failed
    }

    /// Messages that are due: of the handshake, or to say why it failed. May be none.
    pub(crate) fn due(&self) -> Vec<Vec<u8>> {
        self.session().due()
    }

    /// Seals a message. What comes of it has to go out before anything else does.
    pub(crate) fn seal(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, TransportError> {
        let mut session = self.session();
        session
            .tls
            .writer()
            .write_all(message)
            .map_err(|cause| TransportError::Io { operation: "encrypt a control frame", cause })?;
        Ok(session.due())
    }

    /// What a message says; nothing where it is of TLS alone, or the beginning of a record.
    pub(crate) fn open(&self, message: &[u8]) -> Result<Vec<u8>, Unopened> {
        let mut session = self.session();
        let mut records = match message {
            [SEALED, records @ ..] => records,
            // Of a destination that turns a source away before it knows who that is. Anybody on the way may have said it.
            [REFUSED, ..] if matches!(session.tls, Connection::Client(_)) && !session.opened => {
                return Ok(message.to_vec());
            }
            _ => return Err(Unopened::Plain),
        };
        let mut plain = Vec::new();
        while !records.is_empty() {
            session.take_in(&mut records, &mut plain).map_err(|error| {
                session.failed = true;
                Unopened::Tls(error)
            })?;
        }
        session.opened |= !plain.is_empty();
        Ok(plain)
    }

    /// By which the link's other connections are known.
    pub(crate) fn key(&self, link: LinkId) -> Result<LinkKey, TransportError> {
        LinkKey::of(&self.session().tls, link).map_err(|error| TransportError::Io {
            operation: "derive the key of a link",
            cause: io::Error::other(error),
        })
    }

    /// For who cannot go on. Until something was opened it is about who the two are.
    pub(crate) fn explain(&self, unopened: &Unopened) -> TransportError {
        let session = self.session();
        let is_alert = matches!(unopened, Unopened::Tls(Error::AlertReceived(_)));
        if session.tls.is_handshaking() || (is_alert && !session.opened) {
            let (address, reason) = (self.peer.to_string(), unopened.to_string());
            return TransportError::Security { address, reason };
        }
        let cause = io::Error::new(io::ErrorKind::InvalidData, unopened.to_string());
        TransportError::Lost { operation: "decrypt a control frame", cause }
    }
}

impl Session {
    fn due(&mut self) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while self.tls.wants_write() {
            // Into memory, which always works.
            if self.tls.write_tls(&mut records).is_err() {
                break;
            }
        }
        let message = |piece: &[u8]| [&[SEALED], piece].concat();
        records.chunks(SLOT_BYTES - 1).map(message).collect()
    }

    /// Takes some of it in.
    fn take_in(&mut self, records: &mut &[u8], plain: &mut Vec<u8>) -> Result<(), Error> {
        let general = |error: io::Error| Error::General(error.to_string());
        let before = records.len();
        self.tls.read_tls(records).map_err(general)?;
        let state = self.tls.process_new_packets()?;
        // Nobody here says that he ends it: the frames have an end of their own. And rustls takes nothing in behind that.
        if state.peer_has_closed() || records.len() == before {
            return Err(Error::General("the other side ended its TLS session".to_owned()));
        }
        let there = state.plaintext_bytes_to_read();
        let read = plain.len();
        plain.resize(read + there, 0);
        self.tls.reader().read_exact(&mut plain[read..]).map_err(general)
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").field("peer", &self.peer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use pageferry_identity::testing::shared_key;
    use pageferry_identity::{ClientTls, Identity, Material, ServerTls, Tls};

    use super::*;
    use crate::proof::is_proven;

    const ID: LinkId = LinkId([5; 16]);

    fn ends(source: &Tls, destination: &Tls) -> (Seal, Seal) {
        let there = SocketAddr::from(([192, 0, 2, 7], 7400));
        let client = ClientTls::load(source, "192.0.2.7:7400").and_then(|tls| tls.session(there));
        let server = ServerTls::load(destination).and_then(|tls| tls.session());
        (Seal::new(client.expect("a key"), there), Seal::new(server.expect("a key"), there))
    }

    /// Says what is due, in turn, until neither has anything to say.
    fn shake(source: &Seal, destination: &Seal) -> Result<(), (bool, Unopened)> {
        loop {
            let said = source.due();
            let answered = said.iter().try_for_each(|it| destination.open(it).map(drop));
            let answers = destination.due();
            let heard = answers.iter().try_for_each(|it| source.open(it).map(drop));
            heard.map_err(|error| (true, error))?;
            answered.map_err(|error| (false, error))?;
            if said.is_empty() && answers.is_empty() {
                return Ok(());
            }
        }
    }

    #[test]
    fn messages_are_sealed_and_opened_and_both_sides_have_the_same_key() {
        let (source, destination) = ends(&shared_key(), &shared_key());
        shake(&source, &destination).expect("the same key");
        assert!(!source.is_shaking_hands() && !destination.is_shaking_hands());
        for (from, to) in [(&source, &destination), (&destination, &source)] {
            for length in [1, 100, SLOT_BYTES - 32, SLOT_BYTES] {
                let message = vec![7; length];
                let sealed = from.seal(&message).expect("sealed");
                assert!(sealed.iter().all(|piece| piece.len() <= SLOT_BYTES));
                let opened: Vec<u8> =
                    sealed.iter().flat_map(|piece| to.open(piece).expect("opened")).collect();
                assert_eq!(opened, message);
                // A few bytes are alike by chance.
                let shown = sealed[0].windows(50).any(|part| part == [7; 50]);
                assert!(!shown, "in plain text");
            }
        }
        let asked = [3; 16];
        let [one, other] = [&source, &destination]
            .map(|seal| seal.key(ID).expect("done").accepts(b"said", &asked, 1));
        assert!(is_proven(&one, &other));
        let another = source.key(LinkId([6; 16])).expect("done").accepts(b"said", &asked, 1);
        assert!(!is_proven(&one, &another), "of another link");
    }

    #[test]
    fn what_was_changed_or_is_said_again_or_in_plain_text_is_not_opened() {
        for plant in 0..3 {
            let (source, destination) = ends(&shared_key(), &shared_key());
            shake(&source, &destination).expect("the same key");
            let mut sealed = source.seal(b"\x01hello").expect("sealed").remove(0);
            match plant {
                0 => *sealed.last_mut().expect("bytes") ^= 1,
                1 => drop(destination.open(&sealed).expect("once")),
                _ => sealed = b"\x01hello".to_vec(),
            }
            let unopened = destination.open(&sealed).expect_err("not opened");
            let error = destination.explain(&unopened);
            assert!(matches!(error, TransportError::Lost { .. }), "{plant}: {error:?}");
        }
    }

    /// What comes behind that would never be taken in.
    #[test]
    fn who_ends_the_session_ends_the_link() {
        for at_once in [false, true] {
            let (source, destination) = ends(&shared_key(), &shared_key());
            shake(&source, &destination).expect("the same key");
            source.session().tls.send_close_notify();
            let mut ended = source.due().remove(0);
            if at_once {
                ended.extend_from_slice(&[23, 3, 3, 0, 1, 0]);
            }
            let unopened = destination.open(&ended).expect_err("an end");
            assert!(matches!(destination.explain(&unopened), TransportError::Lost { .. }));
            assert!(destination.open(&[SEALED, 23, 3, 3, 0, 1, 0]).is_err());
        }
    }

    #[test]
    fn a_source_is_turned_away_in_plain_text_until_it_has_heard_something_else() {
        let (source, destination) = ends(&shared_key(), &shared_key());
        let refused = [REFUSED, b'n', b'o'];
        assert_eq!(source.open(&refused).expect("as it is"), refused);
        assert!(destination.open(&refused).is_err(), "no source says it");
        shake(&source, &destination).expect("the same key");
        assert_eq!(source.open(&refused).expect("as it is"), refused);
        let welcome = destination.seal(b"welcome").expect("sealed").remove(0);
        assert_eq!(source.open(&welcome).expect("opened"), b"welcome");
        assert!(source.open(&refused).is_err(), "the destination would seal it");
    }

    #[test]
    fn who_has_another_key_is_told_so() {
        let other = Tls::new(Identity::SharedKey(Material::bytes([b'x'; 32])));
        let (source, destination) = ends(&shared_key(), &other);
        let (at_source, unopened) = shake(&source, &destination).expect_err("another key");
        assert!(at_source, "{unopened}");
        let error = source.explain(&unopened);
        let TransportError::Security { reason, .. } = &error else { panic!("{error:?}") };
        assert!(reason.contains("another shared key"), "{reason}");
        let alert = source.due();
        assert!(!alert.is_empty());
        let unopened = alert.iter().try_for_each(|it| destination.open(it).map(drop));
        let unopened = unopened.expect_err("it says no").to_string();
        assert!(unopened.contains("the other side says"), "{unopened}");
    }
}
