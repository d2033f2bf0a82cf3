//! Who is let in where there is TLS, and what others can do: where there is an RDMA device (`ci/lab run --rxe`). In the
//! crate, since strangers say what no source does.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::testing::TestMemory;
use pageferry::transport::{
    Admission, DestinationLink, Link, LinkId, Received, SourceLink, TransportError,
};
use pageferry_identity::testing::{Authority, shared_key};
use pageferry_identity::{Identity, Material, Security, Tls};

use crate::cm::RemoteAccess;
use crate::preamble::{Purpose, SAID_BYTES};
use crate::proof::{Ends, LinkKey};
use crate::strangers::{GETS_IN, SOON, acceptor, from_elsewhere, stranger_with};
use crate::{RdmaAcceptor, RdmaDestinationLink, RdmaOptions, RdmaSourceLink, connect};

fn with(tls: Tls) -> RdmaOptions {
    let security = Security::Tls(tls);
    RdmaOptions { security, admission: Admission::Anyone, ..RdmaOptions::default() }
}

fn keyed() -> RdmaOptions {
    with(shared_key())
}

/// As the device's other acceptors, with a key.
fn sealed_acceptor(options: RdmaOptions) -> Option<RdmaAcceptor> {
    let here = acceptor()?.local_addr().ip();
    Some(RdmaAcceptor::bind((here, 0), options).expect("listens"))
}

fn linked(acceptor: &RdmaAcceptor, options: &RdmaOptions) -> (RdmaSourceLink, RdmaDestinationLink) {
    let to = acceptor.local_addr();
    thread::scope(|scope| {
        let source = scope.spawn(move || connect(to, options.clone()));
        let destination = acceptor.accept(Some(SOON)).expect("a source came");
        (source.join().expect("no panic").expect("it is let in"), destination)
    })
}

/// Why a source finds out that it is not let in, at the latest by the first thing that it is told.
fn kept_out(to: SocketAddr, options: &RdmaOptions) -> TransportError {
    let heard = connect(to, options.clone()).and_then(|mut source| {
        let mut control = source.control()?;
        control.sender.send(b"hello", SOON)?;
        control.receiver.receive(Some(SOON))
    });
    heard.map(drop).expect_err("it is not let in")
}

fn assert_insecure(error: &TransportError, why: &str) {
    let TransportError::Security { reason, .. } = error else { panic!("not for that: {error:?}") };
    assert!(reason.contains(why), "{reason}");
}

#[test]
fn sides_that_do_not_agree_are_told_what_they_lack() {
    let Some(plain) = acceptor() else { return };
    let Some(sealed) = sealed_acceptor(keyed()) else { return };
    let told = |to: &RdmaAcceptor, options| match kept_out(to.local_addr(), &options) {
        TransportError::Refused { reason, .. } => reason,
        other => panic!("not refused: {other:?}"),
    };
    let reason = told(&sealed, RdmaOptions::default());
    assert!(reason.contains("it wants TLS"), "{reason}");
    let reason = told(&plain, keyed());
    assert!(reason.contains("no TLS"), "{reason}");
    let another = Tls::new(Identity::SharedKey(Material::bytes([b'x'; 32])));
    assert_insecure(&kept_out(sealed.local_addr(), &with(another)), "another shared key");
    // None of them has the place.
    drop(linked(&sealed, &keyed()));
}

#[test]
fn certificates_are_checked_both_ways() {
    let ours = Authority::new("ours");
    let theirs = Authority::new("theirs");
    let Some(plain) = acceptor() else { return };
    let here = plain.local_addr().ip().to_string();
    let there = ours.issue(&[&here]);
    let Some(sealed) = sealed_acceptor(with(ours.tls(&there))) else { return };
    let to = sealed.local_addr();
    let source = ours.issue(&["host-a.example"]);
    drop(linked(&sealed, &with(ours.tls(&source))));
    // The destination looks at the source's, and the source at the destination's.
    let stranger = theirs.issue(&["host-a.example"]);
    let mut certificates = ours.certificates(&stranger);
    certificates.authority = Material::bytes(ours.pem());
    let unsigned = Tls::new(Identity::Certificates(certificates));
    assert_insecure(&kept_out(to, &with(unsigned)), "the other side says");
    assert_insecure(&kept_out(to, &with(theirs.tls(&stranger))), "not signed by");
    let named = Tls { peer_name: Some("host-c.example".to_owned()), ..ours.tls(&source) };
    assert_insecure(&kept_out(to, &with(named)), "for another name");
    let expired = ours.issue_until(&["host-a.example"], 2021);
    assert_insecure(&kept_out(to, &with(ours.tls(&expired))), "not valid now");
    drop(linked(&sealed, &with(ours.tls(&source))));
}

/// Who knows the id of a link, and what its source has said, opens none of its connections.
#[test]
fn who_knows_an_id_cannot_join() {
    let Some(acceptor) = sealed_acceptor(keyed()) else { return };
    let to = acceptor.local_addr();
    let (mut source, mut destination) = linked(&acceptor, &keyed());
    let link = source.link_id();
    let refused = |purpose, key: Option<&LinkKey>, queue_pair: Option<u32>| {
        let mut workshop = stranger_with(to, keyed());
        let mut said = workshop.preamble(purpose, link);
        match (key, queue_pair) {
            // What was heard of another connection.
            (Some(key), Some(queue_pair)) => {
                let way = workshop.way().expect("a way");
                let ends = Ends::at_destination(&way, queue_pair);
                let (said, proof) = said.split_at_mut(SAID_BYTES);
                proof.copy_from_slice(&key.asks(said, ends));
            }
            (key, _) => workshop.key = key.cloned(),
        }
        match workshop.dial_outlet(&said, RemoteAccess::Nothing) {
            Err(TransportError::Refused { reason, .. }) => reason,
            other => panic!("not refused: {other:?}"),
        }
    };
    let unknown = "no migration with this id is being served";
    let ours = source.end.workshop.key.clone().expect("it has a key");
    let other = {
        let (other, _destination) = {
            let Some(elsewhere) = sealed_acceptor(keyed()) else { return };
            linked(&elsewhere, &keyed())
        };
        other.end.workshop.key.clone().expect("it has a key")
    };
    for purpose in [
        Purpose::Table { rail: 0 },
        Purpose::Pages { channel: 0, rail: 0 },
        Purpose::Lane { lane: 0 },
    ] {
        assert_eq!(refused(purpose, None, None), unknown, "without a proof");
        assert_eq!(refused(purpose, Some(&other), None), unknown, "by another link's key");
        assert_eq!(refused(purpose, Some(&ours), Some(1)), unknown, "of another queue pair");
    }
    // And its own source does, whatever the others have tried.
    let (here, there) = (TestMemory::new(&[16]), TestMemory::new(&[16]));
    here.fill(1);
    source.register(here.memory()).expect("registered");
    destination.register(there.memory()).expect("registered");
    thread::scope(|scope| {
        let opening = scope.spawn(|| source.open_senders(1));
        let mut receivers = destination.open_receivers(1, SOON).expect("it opens them");
        let mut senders = opening.join().expect("no panic").expect("it opens them");
        let finished = scope.spawn(move || senders[0].finish());
        assert!(matches!(receivers[0].receive().expect("its end"), Received::End));
        finished.join().expect("no panic").expect("in order");
    });
}

/// Whoever accepts a connection of the link has to be its destination: pages go there.
#[test]
fn a_source_sends_nothing_to_who_accepts_without_the_key() {
    let Some(acceptor) = sealed_acceptor(keyed()) else { return };
    for stolen in [false, true] {
        let (mut source, mut destination) = linked(&acceptor, &keyed());
        let memory = [(); 2].map(|()| TestMemory::new(&[16]));
        source.register(memory[0].memory()).expect("registered");
        destination.register(memory[1].memory()).expect("registered");
        // As one answers who has no key, and who has seen another link.
        destination.end.workshop.key = stolen.then(|| {
            let Some(elsewhere) = sealed_acceptor(keyed()) else { panic!("there was one") };
            linked(&elsewhere, &keyed()).0.end.workshop.key.clone().expect("it has a key")
        });
        thread::scope(|scope| {
            let receiving = scope.spawn(|| destination.open_receivers(1, SOON).map(drop));
            let error = source.open_senders(1).map(drop).expect_err("it is not the destination");
            assert_insecure(&error, "not its destination");
            drop(source);
            receiving.join().expect("no panic").expect_err("nobody came");
        });
    }
}

/// Anybody can ask for a migration's other half; whoever gets it can say nothing that is believed.
#[test]
fn who_does_not_shake_hands_has_no_place_and_is_forgotten() {
    let options = RdmaOptions { connect_timeout: Duration::from_secs(2), ..keyed() };
    let Some(acceptor) = sealed_acceptor(options) else { return };
    let to = acceptor.local_addr();
    let mut kept = Vec::new();
    for silent in 0..4 {
        let migration = LinkId([silent; 16]);
        let workshop = stranger_with(to, keyed());
        let said = |purpose| workshop.preamble(purpose, migration);
        let outlet = workshop.dial_outlet(&said(Purpose::Control), RemoteAccess::Nothing);
        let mut outlet = outlet.expect("accepted");
        let inlet = workshop.dial_inlet(&said(Purpose::ControlBack)).expect("accepted");
        if silent % 2 == 0 {
            // No TLS, and what would be a greeting without it.
            outlet.message(&[1, 1, 0, 0, 0, 7], None).expect("it goes out");
        }
        kept.push((outlet, inlet));
    }
    let began = Instant::now();
    drop(linked(&acceptor, &keyed()));
    assert!(began.elapsed() < GETS_IN, "it took {:?}", began.elapsed());
    for (_, inlet) in &mut kept {
        // Words, and then an end.
        let ended = (0..8).find_map(|_| inlet.next(Some(Instant::now() + SOON)).err());
        ended.expect("it is turned away");
    }
}

#[test]
fn pages_go_to_another_host_only_where_both_sides_were_told_that_plain_text_will_do() {
    let Some(plain) = acceptor() else { return };
    let Some(elsewhere) = from_elsewhere(&plain) else { return };
    let here = plain.local_addr().ip();
    let keyed_from = |told| RdmaOptions {
        security: keyed().security,
        plain_text_pages: told,
        ..elsewhere.clone()
    };
    let at = |told| {
        let options = RdmaOptions { plain_text_pages: told, ..keyed() };
        RdmaAcceptor::bind((here, 0), options).expect("listens")
    };
    let (careful, careless) = (at(false), at(true));
    assert_insecure(&kept_out(careless.local_addr(), &keyed_from(false)), "--plaintext-data");
    let error = kept_out(careful.local_addr(), &keyed_from(true));
    let TransportError::Refused { reason, .. } = &error else { panic!("{error:?}") };
    assert!(reason.contains("--plaintext-data"), "{reason}");
    drop(linked(&careless, &keyed_from(true)));
    // Within one host nobody is on the way.
    drop(linked(&careful, &keyed()));
}
