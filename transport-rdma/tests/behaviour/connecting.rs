//! How a source finds its destination: addresses that are silent, attempts that are interrupted, scopes
//! by name.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::testing::until_asleep;
use pageferry::transport::TransportError;
use pageferry_rdma::{RdmaAcceptor, RdmaConnector, RdmaOptions, Security, connect};
use rustix::thread::gettid;

use crate::common::{alone, interface};
use crate::support::{SOON, address, of_anyone};

/// A neighbour of the device's that nobody is.
fn silent(address: &str) -> SocketAddr {
    let SocketAddr::V4(device) = SocketAddr::new(address.parse().expect("an address"), 1) else {
        panic!("the device's address is one of IPv4")
    };
    let [a, b, c, d] = device.ip().octets();
    SocketAddr::from(([a, b, c, d ^ 0x40], 1))
}

/// Of a source whose destination may be another host.
fn to_others() -> RdmaOptions {
    RdmaOptions { security: Security::PlainText, ..RdmaOptions::default() }
}

#[test]
fn an_interrupt_ends_connect() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let options = RdmaOptions { connect_timeout: Duration::MAX, ..to_others() };
    let connector = RdmaConnector::new(options).expect("an event counter");
    let interrupter = connector.interrupter();
    let connecting = gettid();
    let began = Instant::now();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            until_asleep(connecting);
            interrupter.interrupt();
        });
        connector.connect(silent(&address))
    });
    assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

#[test]
fn an_interrupt_before_is_heeded() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let connector = RdmaConnector::new(to_others()).expect("an event counter");
    connector.interrupter().interrupt();
    let result = connector.connect(silent(&address));
    assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
}

/// The second address of a name is tried while the first one is silent.
#[test]
fn a_silent_address_does_not_hold_up_the_next() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let acceptor =
        RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("it listens");
    let options = RdmaOptions { connect_timeout: 3 * SOON, ..to_others() };
    let addresses = [silent(&address), acceptor.local_addr()];
    let (began, source) = thread::scope(|scope| {
        let began = Instant::now();
        let source = scope.spawn(move || connect(&addresses[..], options));
        acceptor.accept(Some(SOON)).expect("a source came");
        (began, source.join().expect("no panic").expect("the second one answers"))
    });
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(source.peer_addr(), acceptor.local_addr());
}

/// A name whose addresses are all of no use says why the last one was not.
#[test]
fn addresses_that_refuse_are_gone_through_at_once() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let closed = SocketAddr::new(address.parse().expect("an address"), 1);
    let acceptor =
        RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("it listens");
    let open = acceptor.local_addr();
    thread::scope(|scope| {
        let source =
            scope.spawn(move || connect(&[closed, closed, open][..], RdmaOptions::default()));
        acceptor.accept(Some(SOON)).expect("a source came");
        source.join().expect("no panic").expect("the third one answers");
    });
    let error = connect(&[closed, closed][..], RdmaOptions::default()).expect_err("nobody listens");
    assert_eq!(error.to_string(), format!("failed to connect to {closed}"));
    let silent = silent(&address);
    let short = Duration::from_millis(300);
    let options = RdmaOptions { connect_timeout: short, ..to_others() };
    let error = connect(silent, options).expect_err("nobody is there");
    let TransportError::Connect { cause, .. } = error else { panic!("{error}") };
    assert_eq!(cause.kind(), std::io::ErrorKind::TimedOut, "{cause}");
}

/// The link-local address of the network interface below the device, with its name as scope.
fn link_local() -> String {
    let interface = interface();
    let all = fs::read_to_string("/proc/net/if_inet6").expect("IPv6");
    let bits = all.lines().find_map(|line| {
        let is_ours = line.starts_with("fe80") && line.ends_with(&interface);
        is_ours.then(|| u128::from_str_radix(&line[..32], 16).expect("an address"))
    });
    format!("{}%{interface}", Ipv6Addr::from(bits.expect("a link-local address")))
}

#[test]
fn scopes_have_names() {
    let (_alone, Some(_)) = (alone(), address()) else { return };
    let here = link_local();
    let acceptor = RdmaAcceptor::bind(format!("[{here}]:0"), of_anyone(RdmaOptions::default()));
    let acceptor = acceptor.expect("it listens");
    let to = format!("{here}:{}", acceptor.local_addr().port());
    let source = thread::scope(|scope| {
        let source = scope.spawn(|| connect(&*to, RdmaOptions::default()));
        acceptor.accept(Some(SOON)).expect("a source came");
        source.join().expect("no panic").expect("it is let in")
    });
    assert!(source.peer_addr().is_ipv6());
    let no_port = RdmaAcceptor::bind(&*here, RdmaOptions::default()).expect_err("no port");
    assert_eq!(no_port.to_string(), format!("failed to listen on {here}"));
}
