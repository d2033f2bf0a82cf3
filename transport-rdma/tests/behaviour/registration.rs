//! What registration costs and when, and who waits for it.

use std::thread;
use std::time::Duration;

use pageferry::testing::{drain, settle};
use pageferry::transport::{
    DestinationLink, Link, Received, Registration, SourceLink, TransportError,
};
use pageferry_rdma::RegistrationMode;

use crate::common::{
    CHUNK_BYTES, CHUNK_PAGES, CHUNKS, MEMORY_BYTES, Opened, alone, data, expect_resources, memory,
    open, options, resources,
};
use crate::support::{SOON, address, linked};

#[test]
fn registration_at_start_is_paid_before_the_first_page() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    for cost in [opened.costs.0, opened.costs.1] {
        assert_eq!(cost.registered_bytes, MEMORY_BYTES);
        assert!(!cost.took.is_zero());
    }
    assert_ne!(resources(), before, "registered memory is seen");
    opened.here.fill(1);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        let all = u32::try_from(CHUNKS * CHUNK_PAGES).expect("small");
        let ticket = opened.sender.send(&[data(0, all)]).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), None);
    for counters in [opened.sender.counters(), opened.receiver.counters()] {
        assert_eq!(counters.registered, Registration::default());
        assert_eq!(counters.user_copied_bytes, 0);
    }
    drop(opened);
    expect_resources(&before);
}

/// Nothing is registered before the first page; then the destination goes through all of its
/// memory, and the source through what it sends, and a chunk more.
#[test]
fn registration_ahead_is_paid_on_the_way() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let mut opened = open(&address, RegistrationMode::Ahead, RegistrationMode::Ahead);
    assert_eq!(opened.costs, (Registration::default(), Registration::default()));
    opened.here.fill(2);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        // The end of one chunk and the beginning of the next, then the last: it is announced late.
        let runs = [data(2 * CHUNK_PAGES - 5, 10), data(CHUNKS * CHUNK_PAGES - 3, 3)];
        let ticket = opened.sender.send(&runs).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    for page in [2 * CHUNK_PAGES - 5, 2 * CHUNK_PAGES + 4, CHUNKS * CHUNK_PAGES - 1] {
        assert!(opened.here.read(0, page) == opened.there.read(0, page), "page {page}");
    }
    assert!(opened.there.read(0, 0).iter().all(|byte| *byte == 0));
    let registered = opened.sender.counters().registered;
    assert_eq!(registered.registered_bytes, 3 * CHUNK_BYTES, "chunks 1, 2 and the last");
    let registered = opened.receiver.counters().registered;
    assert_eq!(registered.registered_bytes, MEMORY_BYTES);
    assert!(!registered.took.is_zero());
    drop(opened);
    expect_resources(&before);
}

/// Each side chooses for itself.
#[test]
fn modes_may_differ() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    for (source, destination) in [
        (RegistrationMode::AtStart, RegistrationMode::Ahead),
        (RegistrationMode::Ahead, RegistrationMode::AtStart),
    ] {
        let mut opened = open(&address, source, destination);
        opened.here.fill(3);
        thread::scope(|scope| {
            scope.spawn(|| drain(&mut *opened.receiver));
            for chunk in 0..CHUNKS {
                let pages = u32::try_from(CHUNK_PAGES).expect("small");
                opened.sender.send(&[data(chunk * CHUNK_PAGES, pages)]).expect("a batch goes out");
            }
            opened.sender.finish().expect("the channel ends");
        });
        assert_eq!(opened.here.first_difference(&opened.there), None);
    }
}

/// A page whose chunk nobody has registered at the destination waits; an interrupt ends that, and
/// so does the destination once it gets there.
#[test]
fn a_page_waits_for_its_chunk() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    for interrupted in [true, false] {
        let Opened { mut sender, mut receiver, source, destination: _kept, here, there, .. } =
            open(&address, RegistrationMode::AtStart, RegistrationMode::Ahead);
        here.fill(4);
        thread::scope(|scope| {
            let sending = scope.spawn(move || {
                let result = sender.send(&[data(3 * CHUNK_PAGES, 1)]);
                (sender, result)
            });
            thread::sleep(Duration::from_millis(300));
            assert!(!sending.is_finished(), "nobody has registered the page's memory");
            if interrupted {
                source.interrupter().interrupt();
                let (_, result) = sending.join().expect("no panic");
                assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
                return;
            }
            let receiving = scope.spawn(move || drain(&mut *receiver));
            let (mut sender, result) = sending.join().expect("no panic");
            result.expect("the batch goes out");
            sender.finish().expect("the channel ends");
            receiving.join().expect("no panic");
        });
        if !interrupted {
            assert!(here.read(0, 3 * CHUNK_PAGES) == there.read(0, 3 * CHUNK_PAGES));
        }
    }
}

/// A source that ends early does not make the destination's last words fail.
#[test]
fn a_channel_may_end_before_all_is_registered() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let Opened { mut sender, mut receiver, source, .. } =
        open(&address, RegistrationMode::AtStart, RegistrationMode::Ahead);
    sender.finish().expect("the channel ends");
    drop((sender, source));
    assert_eq!(receiver.receive().expect("the end"), Received::End);
}

/// Also while it waits for what another connection is to bring.
#[test]
fn one_channel_is_interrupted_and_the_other_goes_on() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let (mut source, mut destination) =
        linked(&address, &options(RegistrationMode::AtStart), &options(RegistrationMode::Ahead));
    let (here, there) = (memory(), memory());
    here.fill(8);
    source.register(here.memory()).expect("source memory registers");
    destination.register(there.memory()).expect("destination memory registers");
    let (mut senders, mut receivers) = thread::scope(|scope| {
        let accepted = scope.spawn(|| destination.open_receivers(2, SOON));
        let senders = source.open_senders(2).expect("channels open");
        (senders, accepted.join().expect("no panic").expect("channels are accepted"))
    });
    let (mut other, mut ended) = (senders.remove(1), senders.remove(0));
    let (mut receiver, mut lost) = (receivers.remove(1), receivers.remove(0));
    let interrupter = ended.interrupter();
    thread::scope(|scope| {
        // Nobody registers it as long as nobody receives.
        let waiting = scope.spawn(move || {
            let result = ended.send(&[data(3 * CHUNK_PAGES, 1)]);
            (ended, result)
        });
        thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished(), "the page's memory is registered");
        interrupter.interrupt();
        let (mut ended, result) = waiting.join().expect("no panic");
        assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
        let again = ended.watermarks(None);
        assert!(matches!(again, Err(TransportError::Interrupted)), "{again:?}");
        let at_the_other_end = loop {
            match lost.receive() {
                Ok(Received::Batch(_)) => {}
                end => break end,
            }
        };
        assert!(
            matches!(at_the_other_end, Err(TransportError::Lost { .. })),
            "{at_the_other_end:?}"
        );
        scope.spawn(|| drain(&mut *receiver));
        other.send(&[data(0, 16)]).expect("a batch goes out");
        other.finish().expect("the channel ends");
    });
    assert!((0..16).all(|page| here.read(0, page) == there.read(0, page)));
}
