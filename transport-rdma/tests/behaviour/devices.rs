//! Devices and their ports: which one is used, how, and what becomes of a link when it is gone.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::testing::{drain, settle};
use pageferry::transport::{DestinationLink, Link, SourceLink, TransportError};
use pageferry_rdma::{Mtu, RdmaAcceptor, RdmaOptions, RegistrationMode, connect};

use crate::common::{alone, chain, data, interface, memory, open};
use crate::support::{SOON, address, linked, of_anyone};

#[test]
fn a_device_that_is_not_there_is_named() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let acceptor =
        RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens");
    let options = RdmaOptions { device: Some("mlx5_9".into()), ..RdmaOptions::default() };
    let refused = [
        RdmaAcceptor::bind((&*address, 0), options.clone()).map(drop).expect_err("no such device"),
        connect(acceptor.local_addr(), options).map(drop).expect_err("no such device"),
    ];
    for error in refused {
        let text = chain(&error);
        assert!(text.contains("there is no RDMA device mlx5_9; there are: "), "{text}");
    }
}

#[test]
fn an_address_without_a_device_is_refused() {
    let (_alone, Some(_)) = (alone(), address()) else { return };
    let to = "127.0.0.1:9".parse::<std::net::SocketAddr>().expect("an address");
    let error = connect(to, RdmaOptions::default()).map(drop).expect_err("no device there");
    assert!(matches!(error, TransportError::Connect { .. }), "{error:?}");
}

/// The smaller of what both sides want; pages move with it.
#[test]
fn path_mtus_that_differ_are_agreed_on() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let with = |mtu| RdmaOptions { mtu, ..RdmaOptions::default() };
    let largest = linked(&address, &with(None), &with(None)).0.path_mtu();
    for (here, there, agreed) in [
        (Some(Mtu::Bytes2048), Some(Mtu::Bytes1024), Mtu::Bytes1024),
        (Some(Mtu::Bytes512), None, Mtu::Bytes512),
        (None, Some(Mtu::Bytes256), Mtu::Bytes256),
        (Some(Mtu::Bytes4096), None, largest),
    ] {
        let (mut source, mut destination) = linked(&address, &with(here), &with(there));
        assert_eq!((source.path_mtu(), destination.path_mtu()), (agreed, agreed));
        let (from, to) = (memory(), memory());
        from.fill(6);
        source.register(from.memory()).expect("source memory registers");
        destination.register(to.memory()).expect("destination memory registers");
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut receivers = destination.open_receivers(1, SOON).expect("a channel");
                drain(&mut *receivers[0]);
            });
            let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
            sender.send(&[data(0, 64)]).expect("a batch goes out");
            sender.finish().expect("the channel ends");
        });
        assert!((0..64).all(|page| from.read(0, page) == to.read(0, page)));
    }
}

#[test]
fn gids_are_those_of_the_connection_manager() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let with = |gid_index| RdmaOptions { gid_index, ..RdmaOptions::default() };
    // ci/lab: the address of IPv4 has the GID with index 1, and 0 is link-local.
    drop(linked(&address, &with(Some(1)), &with(Some(1))));
    let acceptor = RdmaAcceptor::bind((&*address, 0), with(None)).expect("listens");
    for index in [0, 200] {
        let error =
            connect(acceptor.local_addr(), with(Some(index))).map(drop).expect_err("no way");
        eprintln!("{}", chain(&error));
        assert!(matches!(error, TransportError::Connect { .. }), "{error:?}");
    }
    let acceptor = RdmaAcceptor::bind((&*address, 0), with(Some(0))).expect("listens");
    let error = connect(acceptor.local_addr(), with(None)).map(drop).expect_err("another GID");
    assert!(error.to_string().contains("has the GID with index 1, not 0"), "{error}");
}

#[test]
fn addresses_of_devices_are_named_where_one_does_not_do() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let found = pageferry_rdma::addresses().expect("there is a device");
    assert!(found.iter().any(|found| found.address.to_string() == address), "{found:?}");
    assert!(!found.iter().any(|found| found.address.is_loopback()), "{found:?}");
    let loopback = "127.0.0.1:0".parse::<std::net::SocketAddr>().expect("an address");
    let refused = [
        RdmaAcceptor::bind(loopback, RdmaOptions::default()).map(drop).expect_err("no device"),
        connect("127.0.0.1:9", RdmaOptions::default()).map(drop).expect_err("no device"),
    ];
    for error in refused {
        let text = chain(&error);
        assert!(
            text.contains("addresses of RDMA devices here: ") && text.contains(&address),
            "{text}"
        );
    }
}

fn set(interface: &str, state: &str) {
    let changed = Command::new("ip").args(["link", "set", interface, state]).status();
    assert!(changed.expect("ip of iproute2").success(), "{interface} {state}");
}

/// Nothing is sent meanwhile: rxe gives up a queue pair at once whose port is down, where a NIC sends
/// again.
#[test]
fn a_port_that_is_down_for_a_moment_ends_nothing() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    opened.here.fill(7);
    let interface = interface();
    let mut control = opened.destination.control().expect("once").receiver;
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        set(&interface, "down");
        // As long as the port is down, somebody sleeps who hears of it.
        let waited = control.receive(Some(Duration::from_millis(300)));
        set(&interface, "up");
        assert!(matches!(waited, Err(TransportError::TimedOut { .. })), "{waited:?}");
        let ticket = opened.sender.send(&[data(0, 16)]).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    assert!((0..16).all(|page| opened.here.read(0, page) == opened.there.read(0, page)));
}

/// Two seconds by default, as long as the queue pairs would have sent again.
#[test]
fn a_port_that_stays_down_ends_a_link_on_which_nothing_is_sent() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    let interface = interface();
    let mut control = opened.destination.control().expect("once").receiver;
    set(&interface, "down");
    let began = Instant::now();
    let waited = control.receive(Some(SOON));
    let took = began.elapsed();
    set(&interface, "up");
    let error = waited.expect_err("the port is down");
    assert!(chain(&error).contains("the port went down, and stayed so"), "{error:?}");
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(4), "{took:?}");
}
