//! Who is let in, by whom, and what both sides hear where somebody is not.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};
use std::thread;
use std::time::Instant;

use pageferry::testing::greeting;
use pageferry::transport::{Link, SourceLink, TransportError};
use pageferry_tcp::preamble::{Kind, Status};
use pageferry_tcp::testing::{self, Authority};
use pageferry_tcp::{
    Certificates, Identity, KernelTls, Material, Security, TcpAcceptor, TcpOptions, TcpSourceLink,
    Tls, ZeroCopy, connect,
};

use crate::support::memory::guest_memory;
use crate::support::{PATIENCE, log, pair, raw};

const HERE: &str = "127.0.0.1";

fn with(tls: Tls) -> TcpOptions {
    TcpOptions { security: Security::Tls(tls), ..TcpOptions::default() }
}

fn shared_key(key: &[u8]) -> TcpOptions {
    with(Tls::new(Identity::SharedKey(Material::bytes(key))))
}

/// A key that nobody guesses, but for one bit.
fn key(flipped: u8) -> Vec<u8> {
    let mut key: Vec<u8> = (0..32).collect();
    key[31] ^= flipped;
    key
}

fn try_to(acceptor: &TcpAcceptor, options: &TcpOptions) -> Result<TcpSourceLink, TransportError> {
    connect(acceptor.local_addr(), options.clone())
}

/// What the source hears.
fn heard(result: Result<TcpSourceLink, TransportError>) -> String {
    match result {
        Err(TransportError::Security { reason, .. }) => reason,
        Err(other) => panic!("not for its security: {other:?}"),
        Ok(_) => panic!("let in"),
    }
}

/// A source that is let in, whatever happened before.
fn assert_serves(acceptor: &TcpAcceptor, options: &TcpOptions) {
    let mut source = try_to(acceptor, options).unwrap();
    let mut control = source.control().unwrap();
    control.sender.send(&greeting(vec![7]), PATIENCE).unwrap();
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(link.link_id(), source.link_id());
    let mut there = link.control().unwrap();
    assert_eq!(there.receiver.receive(Some(PATIENCE)).unwrap(), greeting(vec![7]));
}

/// Each is turned away, hears why, is named in the log with why, and keeps nobody out who belongs here.
fn assert_turned_away(
    there: &TcpOptions,
    welcome: &TcpOptions,
    here: &TcpOptions,
    told: [&str; 2],
) {
    log::capture();
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there.clone()).unwrap();
    let reason = heard(try_to(&acceptor, here));
    assert!(reason.contains(told[0]), "{reason}");
    // Told before it was logged.
    let deadline = Instant::now() + PATIENCE;
    while !log::has_line(&["127.0.0.1", told[1]]) {
        assert!(Instant::now() < deadline, "not in the log: {}", told[1]);
        thread::yield_now();
    }
    assert_serves(&acceptor, welcome);
}

#[test]
fn who_has_another_authority_is_turned_away_by_both() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let good = with(ours.tls(&ours.issue(&[HERE])));
    let foreign = with(theirs.tls(&theirs.issue(&[HERE])));
    // The source sees the destination's certificate first.
    assert_turned_away(
        &good,
        &good,
        &foreign,
        [
            "other side's certificate is not signed by an authority that this side trusts",
            "says: this side's certificate is not signed",
        ],
    );
    // One of the same name is no other case.
    let pretender = Authority::new("ours");
    let pretends = with(pretender.tls(&pretender.issue(&[HERE])));
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", good.clone()).unwrap();
    let reason = heard(try_to(&acceptor, &pretends));
    assert!(reason.contains("not signed by the authority whose name it bears"), "{reason}");
    // It trusts both, and so the destination has to say no.
    let both = Material::bytes(ours.pem() + &theirs.pem());
    let Identity::Certificates(certificates) = theirs.tls(&theirs.issue(&[HERE])).identity else {
        panic!("no certificates");
    };
    let trusting = Certificates { authority: both, ..certificates };
    assert_turned_away(
        &good,
        &good,
        &with(Tls::new(Identity::Certificates(trusting))),
        [
            "says: this side's certificate is not signed by an authority that it trusts",
            "not signed by an authority that this side trusts",
        ],
    );
}

#[test]
fn what_has_expired_is_turned_away_by_both() {
    let ours = Authority::new("ours");
    let good = with(ours.tls(&ours.issue(&[HERE])));
    let old = with(ours.tls(&ours.issue_until(&[HERE], 2021)));
    assert_turned_away(
        &good,
        &good,
        &old,
        ["says: this side's certificate is not valid now", "has expired"],
    );
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", old).unwrap();
    let reason = heard(try_to(&acceptor, &good));
    assert!(reason.contains("other side's certificate has expired"), "{reason}");
}

#[test]
fn names_are_checked_by_both() {
    let ours = Authority::new("ours");
    let here = ours.tls(&ours.issue(&[HERE, "here.example"]));
    let there = ours.tls(&ours.issue(&["there.example"]));
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", with(there.clone())).unwrap();
    // By the address that it connects to.
    let reason = heard(try_to(&acceptor, &with(here.clone())));
    assert!(reason.contains("other side's certificate is for another name"), "{reason}");
    // By the name that it was told.
    let named = Tls { peer_name: Some("there.example".to_owned()), ..here.clone() };
    assert_serves(&acceptor, &with(named.clone()));
    // A destination that wants one of its own.
    for (name, served) in [("here.example", true), ("elsewhere.example", false)] {
        let there = Tls { peer_name: Some(name.to_owned()), ..there.clone() };
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", with(there)).unwrap();
        if served {
            assert_serves(&acceptor, &with(named.clone()));
        } else {
            let reason = heard(try_to(&acceptor, &with(named.clone())));
            assert!(reason.contains("this side's certificate is not accepted"), "{reason}");
        }
    }
    // A host's name in the address.
    let by_name = with(ours.tls(&ours.issue(&["localhost"])));
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", by_name.clone()).unwrap();
    let port = acceptor.local_addr().port();
    connect(format!("localhost:{port}"), by_name).unwrap();
}

/// Files are read for each link: what is revoked is out from the next one on, and what is renewed is in.
#[test]
fn what_is_revoked_is_turned_away_from_then_on() {
    let ours = Authority::new("ours");
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("revoked.pem");
    let (source, destination) = (ours.issue(&[HERE]), ours.issue(&[HERE]));
    let checked = |issued| Certificates {
        revoked: vec![Material::File(list.clone())],
        ..ours.certificates(issued)
    };
    let there = with(Tls::new(Identity::Certificates(checked(&destination))));
    let here = with(Tls::new(Identity::Certificates(checked(&source))));
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there).unwrap();
    let reason = heard(try_to(&acceptor, &here));
    assert!(
        reason.contains("list of revoked certificates") && reason.contains("revoked.pem"),
        "{reason}"
    );
    fs::write(&list, ours.revoke(&[])).unwrap();
    assert_serves(&acceptor, &here);
    fs::write(&list, ours.revoke(&[&source])).unwrap();
    let reason = heard(try_to(&acceptor, &here));
    assert!(reason.contains("this side's certificate is revoked"), "{reason}");
    fs::write(&list, ours.revoke(&[&destination])).unwrap();
    let reason = heard(try_to(&acceptor, &here));
    assert!(reason.contains("other side's certificate is revoked"), "{reason}");
    fs::write(&list, ours.revoke(&[])).unwrap();
    assert_serves(&acceptor, &here);
}

#[test]
fn a_key_that_is_off_by_a_bit_is_none() {
    for bit in [1, 128] {
        assert_turned_away(
            &shared_key(&key(0)),
            &shared_key(&key(0)),
            &shared_key(&key(bit)),
            ["the other side has another shared key", "other side"],
        );
    }
    // White space at the end is what editors put there.
    let acceptor =
        TcpAcceptor::bind("127.0.0.1:0", shared_key(b"0123456789abcdef0123456789abcdef\n"));
    assert_serves(&acceptor.unwrap(), &shared_key(b"0123456789abcdef0123456789abcdef"));
}

#[test]
fn what_can_be_guessed_is_refused() {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", shared_key(&key(0))).unwrap();
    let reason = heard(try_to(&acceptor, &shared_key(b"secret")));
    assert!(reason.contains("less than 32 bytes"), "{reason}");
    let no_file = with(Tls::new(Identity::SharedKey(Material::File("/none/key".into()))));
    let reason = heard(try_to(&acceptor, &no_file));
    assert!(reason.contains("/none/key") && reason.contains("No such file"), "{reason}");
}

/// Strangers are not told where a destination keeps its files, nor what is wrong with them; who belongs here is told that
/// it is not for what it has said.
#[test]
fn what_is_wrong_with_a_destinations_files_is_its_own_matter() {
    log::capture();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a secret place");
    let there = with(Tls::new(Identity::SharedKey(Material::File(file.clone()))));
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there).unwrap();
    let reason = heard(try_to(&acceptor, &shared_key(&key(0))));
    assert!(
        reason.contains("it answers in plain text: the destination cannot show who it is"),
        "{reason}"
    );
    assert!(!reason.contains("secret place"), "{reason}");
    let (_, answer) = raw::try_dial(acceptor.local_addr(), raw::ID, Kind::Control);
    assert_eq!(answer.status, Status::Insecure);
    assert!(!answer.reason.contains("secret place"), "{}", answer.reason);
    assert!(log::has_line(&["a secret place", "No such file"]));
    fs::write(&file, key(0)).unwrap();
    assert_serves(&acceptor, &shared_key(&key(0)));
    fs::write(&file, key(1)).unwrap();
    heard(try_to(&acceptor, &shared_key(&key(0))));
    assert_serves(&acceptor, &shared_key(&key(1)));
}

#[test]
fn a_shared_key_and_certificates_do_not_meet() {
    let ours = Authority::new("ours");
    let certified = with(ours.tls(&ours.issue(&[HERE])));
    let keyed = shared_key(&key(0));
    for (there, here) in [(&certified, &keyed), (&keyed, &certified)] {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", there.clone()).unwrap();
        let reason = heard(try_to(&acceptor, here));
        assert!(reason.contains("one side may have a shared key"), "{reason}");
        assert_serves(&acceptor, there);
    }
}

#[test]
fn plain_text_and_tls_do_not_meet() {
    let (keyed, plain) = (shared_key(&key(0)), TcpOptions::default());
    assert_turned_away(&keyed, &keyed, &plain, ["it says: it wants TLS", "it does not speak TLS"]);
    assert_turned_away(
        &plain,
        &plain,
        &keyed,
        ["it answers in plain text: the source speaks TLS", "the source speaks TLS"],
    );
}

/// From the loopback's address to another one of this host, which looks like two hosts.
#[test]
fn plain_text_goes_no_further_than_this_host() {
    // By a route, without a packet.
    let route = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let Some(address) = route.ok().filter(|address| !address.ip().is_loopback()) else {
        eprintln!("plain_text_goes_no_further_than_this_host skipped, because there is no network");
        return;
    };
    let there = |security| {
        let options = TcpOptions { security, ..TcpOptions::default() };
        TcpAcceptor::bind((address.ip(), 0), options).unwrap()
    };
    let loopback = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let careful = TcpOptions { source_addresses: loopback, ..TcpOptions::default() };
    let careless = TcpOptions { security: Security::PlainText, ..careful.clone() };
    let reason = heard(try_to(&there(Security::PlainText), &careful));
    assert!(reason.contains("it is another host"), "{reason}");
    let reason = heard(try_to(&there(Security::WithinHost), &careless));
    assert!(reason.contains("it says: plain text from another host"), "{reason}");
    assert_serves(&there(Security::PlainText), &careless);
    // Without the detour it is one host.
    assert_serves(&there(Security::WithinHost), &TcpOptions::default());
}

/// Whoever has no key has no place either, however much it says.
#[test]
fn who_shows_nothing_holds_nothing() {
    let options = TcpOptions { preamble_timeout: PATIENCE, ..shared_key(&key(0)) };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", options.clone()).unwrap();
    let silent: Vec<TcpStream> = (0..40).map(|_| raw::stream(acceptor.local_addr())).collect();
    let half: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = raw::stream(acceptor.local_addr());
            stream.write_all(&[22, 3, 1, 2, 0]).unwrap();
            stream
        })
        .collect();
    assert_serves(&acceptor, &options);
    drop((silent, half));
}

/// The id of a link is no secret to who gives it, and of no use to who knows nothing else.
#[test]
fn an_id_that_is_known_is_of_no_use() {
    let options = shared_key(&key(0));
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", options.clone()).unwrap();
    let mut source = try_to(&acceptor, &options).unwrap();
    let mut control = source.control().unwrap();
    control.sender.send(&greeting(Vec::new()), PATIENCE).unwrap();
    let link = acceptor.accept(Some(PATIENCE)).unwrap();
    for kind in [Kind::Control, Kind::Data { channel: 0 }] {
        let (_, answer) = raw::try_dial(acceptor.local_addr(), link.link_id(), kind);
        assert_eq!(answer.status, Status::Insecure, "{}", answer.reason);
    }
}

/// Only this transport can move bytes where they pass through its session: others would send plain text.
#[test]
fn there_are_no_sockets_for_others_where_the_process_encrypts() {
    let mut pair = pair(&testing::shared_key(KernelTls::Off));
    assert!(pair.source.is_encrypted() && pair.source.encrypts_in_process());
    pair.source.register(&guest_memory(&[1])).unwrap();
    let error = pair.source.open_sockets(1).expect_err("no socket");
    assert!(matches!(error, TransportError::Unsupported(_)), "{error:?}");
}

/// What is encrypted is a copy.
#[test]
fn zero_copy_sends_and_tls_exclude_each_other() {
    let options = TcpOptions { zero_copy: ZeroCopy::On, ..shared_key(&key(0)) };
    let mut pair = pair(&options);
    pair.source.register(&guest_memory(&[1])).unwrap();
    let error = pair.source.open_senders(1).err().expect("no zero-copy");
    assert!(matches!(error, TransportError::Unsupported(_)), "{error:?}");
}
