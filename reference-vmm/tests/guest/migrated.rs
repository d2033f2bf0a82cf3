//! A guest that ends by itself while the engine moves it.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{booted, config, kinds, wait_for_beats};
use pageferry::transport::OneLink;
use pageferry::{Destination, Event, Source};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestKind};
use pageferry_vmm::workload::WorkloadKind;
use vm_memory::{Bytes, GuestAddress};

/// A round that would take an hour is left as soon as a virtual CPU is gone.
#[test]
fn a_triple_fault_ends_the_migration_in_the_middle_of_a_round() {
    if !kinds().contains(&GuestKind::Kvm) {
        return;
    }
    let config = config(GuestKind::Kvm, WorkloadKind::Sequential, 2);
    let mut source_machine = GuestMachine { guest: booted(config.clone()) };
    source_machine.guest.resume().unwrap();
    wait_for_beats(&source_machine.guest, 5);
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap();
    let address = acceptor.local_addr();
    let memory = source_machine.memory().unwrap();
    let dirty = source_machine.dirty_sources(&memory).unwrap();
    let ram = Arc::clone(source_machine.guest.ram().memory());
    let (killed, at) = channel();
    let (tell, told) = channel();
    let source = Source::new().on_event(move |event| {
        tell.send(event.clone()).unwrap();
        if matches!(event, Event::RoundStarted { round: 1, .. }) {
            // Undefined instructions all over the code.
            ram.write_slice(&[0x0f, 0x0b].repeat(512), GuestAddress(0x1000)).unwrap();
            killed.send(Instant::now()).unwrap();
        }
    });
    source.handle().limit_bandwidth(NonZeroU64::new(1 << 10));
    let failure = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let link = acceptor.accept(Some(Duration::from_secs(30))).unwrap();
            let offer = Destination::new().negotiate(OneLink::destination(Box::new(link))).unwrap();
            let machine = GuestMachine { guest: Guest::create(config).unwrap() };
            let memory = machine.memory().unwrap();
            offer.receive(machine, &memory).map(drop)
        });
        let link = connect(address, TcpOptions::default()).unwrap();
        let failure = source
            .migrate(source_machine, &memory, dirty, OneLink::source(Box::new(link)))
            .unwrap_err();
        assert!(receiving.join().unwrap().is_err());
        failure
    });
    let took = at.recv().unwrap().elapsed();
    let said = failure.error.chain().to_string();
    assert!(said.contains("failed to run the guest: vcpu"), "{said}");
    assert!(failure.machine.guest.failure().is_some());
    // It left that round, which would take hours by its bandwidth limit. A busy machine may make any
    // other bound wrong.
    eprintln!("noticed within {took:?}");
    let told: Vec<_> = told.iter().collect();
    let [.., Event::RoundStarted { round: 1, .. }, Event::GuestKept] = told[..] else {
        panic!("{told:?}")
    };
}
