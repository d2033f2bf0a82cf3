//! Data channels that are dealt out over two devices. On its own: what each device has sent is counted.

#[path = "support/device.rs"]
mod device;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use device::address;
use pageferry::digest::Digest;
use pageferry::dirty::DirtySources;
use pageferry::testing::{IdleMachine, TestMemory};
use pageferry::{Destination, Event, Source, Statistics};
use pageferry_identity::testing::shared_key;
use pageferry_rdma::{RdmaAcceptor, RdmaDialler, RdmaOptions, RegistrationMode, Security};

const PAGES: u64 = 8192;
const PATIENCE: Duration = Duration::from_secs(120);

/// The address of another device than [`address`]'s; `None`, loudly, where there is none.
fn second_address() -> Option<String> {
    let address = std::env::var("PAGEFERRY_RDMA_SECOND_ADDRESS").ok();
    if address.is_none() {
        eprintln!("two rails skipped, because PAGEFERRY_RDMA_SECOND_ADDRESS names no device");
    }
    address
}

/// The device of an address, and how many packets it has sent, if rxe counts that.
fn packets(address: &str) -> Option<u64> {
    let all = pageferry_rdma::addresses().expect("there are devices");
    let here = all.iter().find(|device| device.address.to_string() == address);
    let device = &here.expect("the address of a device").device;
    let counter = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
    std::fs::read_to_string(counter).ok()?.trim().parse().ok()
}

/// Moves memory to a destination that listens at all devices, by ways to these; what both sides have done, and what the
/// source told of its channels.
fn migrate(ways: &[&str], options: &RdmaOptions) -> (Statistics, Statistics, Vec<String>) {
    let (here, there) = (TestMemory::new(&[PAGES]), TestMemory::new(&[PAGES]));
    here.fill(7);
    let acceptor = RdmaAcceptor::bind(("0.0.0.0", 0), options.clone()).expect("it listens");
    let port = acceptor.local_addr().port();
    let to: Vec<_> = ways.iter().map(|way| format!("{way}:{port}")).collect();
    let connector = Box::new(RdmaDialler::new(to.join(","), options.clone()));
    let rendezvous = Box::new(acceptor.rendezvous());
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&told);
    let source = Source::new().channels(4).verify(true).downtime_limit(PATIENCE).on_event(
        move |event: &Event| {
            if matches!(event, Event::ChannelLost { .. } | Event::LinkLost { .. }) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{event:?}"));
            }
        },
    );
    let (departed, arrived) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new().negotiate(rendezvous).expect("a source greets");
            offer.receive(IdleMachine, there.memory()).expect("it arrives").statistics
        });
        let dirty = DirtySources::new(Vec::new());
        let departed = source.migrate(IdleMachine, here.memory(), dirty, connector);
        (departed.expect("it leaves").statistics, receiving.join().expect("no panic"))
    });
    let digests = [&here, &there].map(|memory| Digest::of(memory.memory()).expect("its memory"));
    assert_eq!(digests[0], digests[1]);
    let told = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
    (departed, arrived, told)
}

/// Bytes that a side has registered.
fn registered(side: &Statistics) -> u64 {
    side.registration.registered_bytes + side.registered_on_the_way.registered_bytes
}

#[test]
fn pages_go_by_two_devices_and_each_has_memory_of_its_own() {
    let (Some(first), Some(second)) = (address(), second_address()) else { return };
    for registration in [RegistrationMode::AtStart, RegistrationMode::Ahead] {
        // Tables and data channels of each rail are proven.
        let security = Security::Tls(shared_key());
        let options = RdmaOptions { registration, security, ..RdmaOptions::default() };
        let before = [&first, &second].map(|address| packets(address));
        let (departed, arrived, told) = migrate(&[&first, &second], &options);
        let after = [&first, &second].map(|address| packets(address));
        assert_eq!(told, [""; 0]);
        let all = PAGES * 4096;
        if registration == RegistrationMode::AtStart {
            assert_eq!(registered(&departed), 2 * all);
        }
        // What of it was not registered by the end has not been asked for.
        assert!((all + 1..=2 * all).contains(&registered(&arrived)), "{}", registered(&arrived));
        for (before, after) in before.into_iter().zip(after) {
            let (Some(before), Some(after)) = (before, after) else {
                eprintln!("what each device has sent is skipped, because there is no counter");
                continue;
            };
            // A quarter of memory at least, in packets of 4 KiB at most.
            assert!(after - before >= PAGES / 4, "{before} packets before, {after} after");
        }
    }
}

/// The address is one of no device.
#[test]
fn a_way_that_leads_nowhere_is_done_without() {
    let Some(first) = address() else { return };
    let began = Instant::now();
    let (departed, _, told) = migrate(&[&first, "127.0.0.1"], &RdmaOptions::default());
    assert_eq!((told, registered(&departed)), (Vec::new(), PAGES * 4096));
    assert!(began.elapsed() < PATIENCE);
}

/// Each has a table of its own.
#[test]
fn two_ways_by_one_device_share_what_is_registered() {
    let Some(first) = address() else { return };
    let Some(second) = beside(&first) else {
        eprintln!("two ways by one device skipped, because it has no second address");
        return;
    };
    for registration in [RegistrationMode::AtStart, RegistrationMode::Ahead] {
        let options = RdmaOptions { registration, ..RdmaOptions::default() };
        let (departed, arrived, told) = migrate(&[&first, &second], &options);
        assert_eq!(told, [""; 0], "{registration:?}");
        let all = PAGES * 4096;
        assert_eq!((registered(&departed), registered(&arrived)), (all, all), "{registration:?}");
    }
}

/// Another address of the device that has this one.
fn beside(address: &str) -> Option<String> {
    let all = pageferry_rdma::addresses().expect("there are devices");
    let here = all.iter().find(|device| device.address.to_string() == address);
    let device = &here.expect("the address of a device").device;
    let others = all.iter().filter(|other| other.device == *device && other.address.is_ipv4());
    others.map(|other| other.address.to_string()).find(|other| other != address)
}
