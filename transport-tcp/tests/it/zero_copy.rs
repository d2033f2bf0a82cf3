//! Zero-copy sends. On loopback the kernel copies every one of them when it delivers it, and says
//! so; until then it reads guest memory, as it would for a NIC.

use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::transport::{
    Capabilities, Link, PageSender, Received, SourceLink, TransportError, ZeroCopyCounts,
};
use pageferry_tcp::{TcpOptions, ZeroCopy, connect};
use socket2::SockRef;

use crate::support::memory::{assert_same, fill, guest_memory};
use crate::support::{
    Ends, PATIENCE, Pair, Random, data, drain, interrupted, log, pair, pair_at, raw, until_landed,
    zero,
};

fn options(zero_copy: ZeroCopy) -> TcpOptions {
    TcpOptions { zero_copy, ..TcpOptions::default() }
}

fn all_copied(sent: u64, bytes: u64) -> ZeroCopyCounts {
    ZeroCopyCounts { sent, copied_by_kernel: sent, sent_bytes: bytes, copied_bytes: bytes }
}

#[test]
fn every_send_is_accounted_for_at_the_end() {
    let mut random = Random::seeded("zero-copy");
    let (from, to) = (guest_memory(&[3000, 8]), guest_memory(&[3000, 8]));
    fill(&from, &mut random);
    let mut link = pair(&options(ZeroCopy::On));
    let Ends { mut senders, mut receivers } = link.open(&from, &to, 1);
    let sender = &mut senders[0];
    thread::scope(|scope| {
        let receiving = scope.spawn(|| drain(&mut *receivers[0]));
        let mut released = 0;
        for ticket in 1..=30_u64 {
            let first_page = (ticket - 1) * 100;
            let ticket = sender.send(&[data(0, first_page, 60), data(0, first_page + 60, 40)]);
            let marks = sender.watermarks(None).unwrap();
            assert!(marks.released <= ticket.unwrap() && marks.landed <= marks.released);
            assert!(marks.released >= released);
            released = marks.released;
        }
        // Too little to be worth it, and no page bytes at all.
        from.fill_zero(zero(1, 0, 4).range).unwrap();
        sender.send(&[data(1, 4, 4)]).unwrap();
        sender.send(&[zero(1, 0, 4)]).unwrap();
        until_landed(&mut **sender, 32);
        sender.finish().unwrap();
        assert_eq!(receiving.join().unwrap(), 32);
    });
    let counters = sender.counters();
    assert_eq!(counters.user_copied_bytes, 0);
    // A send that was taken in pieces counts once for each.
    let counts = counters.zero_copy;
    assert!(counts.sent >= 30, "{counts:?}");
    assert_eq!(counts, all_copied(counts.sent, 3000 * 4096));
    assert_same(&from, &to);
}

#[test]
fn it_stops_where_the_kernel_copies_anyway() {
    log::capture();
    let mut random = Random::seeded("zero-copy auto");
    let (from, to) = (guest_memory(&[1024]), guest_memory(&[1024]));
    fill(&from, &mut random);
    let mut link = pair_at("127.0.0.2:0", &options(ZeroCopy::Auto));
    let peer = link.source.peer_addr().to_string();
    let Ends { mut senders, mut receivers } = link.open(&from, &to, 1);
    let sender = &mut senders[0];
    thread::scope(|scope| {
        let receiving = scope.spawn(|| drain(&mut *receivers[0]));
        for ticket in 1..=40 {
            sender.send(&[data(0, 0, 1024)]).unwrap();
            // Each is complete before the next is sent.
            until_landed(&mut **sender, ticket);
        }
        sender.finish().unwrap();
        assert_eq!(receiving.join().unwrap(), 40);
    });
    // Eight sends or 8 MiB, whichever comes first.
    let counts = sender.counters().zero_copy;
    assert!((1..=8).contains(&counts.sent) && counts.sent_bytes <= 12 << 20, "{counts:?}");
    assert_eq!(counts, all_copied(counts.sent, counts.sent_bytes));
    assert!(log::has_line(&[&peer, "INFO", "without zero-copy", "copied"]));
    assert_same(&from, &to);
}

#[test]
fn it_is_not_tried_from_an_address_to_itself() {
    let (from, to) = (guest_memory(&[1024]), guest_memory(&[1024]));
    let mut link = pair(&options(ZeroCopy::Auto));
    let Ends { mut senders, mut receivers } = link.open(&from, &to, 1);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| drain(&mut *receivers[0]));
        senders[0].send(&[data(0, 0, 1024)]).unwrap();
        senders[0].finish().unwrap();
        assert_eq!(receiving.join().unwrap(), 1);
    });
    assert_eq!(senders[0].counters().zero_copy, ZeroCopyCounts::default());
}

#[test]
fn off_is_off_and_capabilities_say_so() {
    for (choice, expected) in [(ZeroCopy::Off, false), (ZeroCopy::Auto, true), (ZeroCopy::On, true)]
    {
        let link = pair(&options(choice));
        assert_eq!(link.source.capabilities().zero_copy, expected);
        let destination = link.destination.capabilities();
        assert_eq!(destination, Capabilities { zero_copy: false, ..link.source.capabilities() });
    }
    let memory = guest_memory(&[64]);
    let mut link = pair(&options(ZeroCopy::Off));
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[64]), 1);
    let ticket = senders[0].send(&[data(0, 0, 64)]).unwrap();
    assert_eq!(senders[0].watermarks(None).unwrap().released, ticket);
    senders[0].finish().unwrap();
    assert_eq!(drain(&mut *receivers[0]), 1);
    assert_eq!(senders[0].counters().zero_copy, ZeroCopyCounts::default());
}

/// A sender with zero-copy sends that are not complete: nobody receives, and the other side's
/// buffer is full.
fn stuffed(link: &mut Pair, sender: &mut dyn PageSender) {
    let interrupter = link.source.interrupter();
    thread::scope(|scope| {
        let (announce, announced) = std::sync::mpsc::channel();
        let sending = scope.spawn(move || {
            announce.send(rustix::thread::gettid()).unwrap();
            loop {
                // Batches of any size are taken until both buffers are full.
                if let Err(error) = sender.send(&[data(0, 0, 1024)]) {
                    return error;
                }
            }
        });
        pageferry::testing::until_asleep(announced.recv().unwrap());
        interrupter.interrupt();
        let error = sending.join().unwrap();
        assert!(matches!(error, TransportError::Interrupted), "{error}");
    });
}

#[test]
fn memory_is_released_only_by_completions_and_let_go_after_an_abort() {
    let (from, to) = (guest_memory(&[1024]), guest_memory(&[1024]));
    let mut link = pair(&options(ZeroCopy::On));
    let Ends { mut senders, receivers } = link.open(&from, &to, 1);
    stuffed(&mut link, &mut *senders[0]);
    let before = Arc::strong_count(&from);
    drop(senders);
    // What the kernel may still read stays held by the connection.
    assert_eq!(Arc::strong_count(&from), before);
    drop(link);
    assert_eq!(Arc::strong_count(&from), 1, "the link let go of it");
    drop(receivers);
    assert_eq!(Arc::strong_count(&to), 1);
}

#[test]
fn a_channel_that_outlives_its_link_lets_go_of_memory_too() {
    let from = guest_memory(&[1024]);
    let mut link = pair(&options(ZeroCopy::On));
    let Ends { mut senders, receivers } = link.open(&from, &guest_memory(&[1024]), 1);
    stuffed(&mut link, &mut *senders[0]);
    drop(link);
    assert_eq!(Arc::strong_count(&from), 2, "the channel holds it");
    drop(senders);
    assert_eq!(Arc::strong_count(&from), 1);
    drop(receivers);
}

#[test]
fn a_destination_that_is_lost_ends_it_with_an_error() {
    let from = guest_memory(&[1024]);
    let mut link = pair(&options(ZeroCopy::On));
    let Ends { mut senders, mut receivers } = link.open(&from, &guest_memory(&[1024]), 1);
    let sender = &mut senders[0];
    let Pair { source, destination } = link;
    let error = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            loop {
                if let Err(error) = sender.send(&[data(0, 0, 1024)]) {
                    return error;
                }
            }
        });
        assert!(matches!(receivers[0].receive().unwrap(), Received::Batch(_)));
        drop((receivers, destination));
        sending.join().unwrap()
    });
    assert!(matches!(error, TransportError::Lost { .. }), "{error}");
    // Its write queue is gone, and so is all that was under way.
    let marks = sender.watermarks(None);
    assert!(marks.is_err() || marks.is_ok_and(|marks| marks.landed <= marks.released));
    drop((senders, source));
    assert_eq!(Arc::strong_count(&from), 1);
}

/// Batches that land while completions come late are told once, and in order.
#[test]
fn landed_waits_for_released() {
    let from = guest_memory(&[1024]);
    let mut link = pair(&options(ZeroCopy::On));
    let Ends { mut senders, mut receivers } = link.open(&from, &guest_memory(&[1024]), 1);
    let sender = &mut senders[0];
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *receivers[0]));
        for ticket in 1..=20 {
            sender.send(&[data(0, 0, 512), data(0, 600, 17)]).unwrap();
            let marks = sender.watermarks(None).unwrap();
            assert!(marks.landed <= marks.released && marks.released <= ticket, "{marks:?}");
            if ticket % 5 == 0 {
                until_landed(&mut **sender, ticket);
                // Nothing was left unread that would wake a wait in vain.
                assert_eq!(sender.counters().zero_copy.sent_bytes, ticket * 529 * 4096);
            }
        }
        sender.finish().unwrap();
    });
    let source: &mut dyn SourceLink = &mut link.source;
    assert!(source.capabilities().zero_copy);
}

/// A destination that acknowledges what it never reads and ends its direction: both directions are
/// over, and the kernel still has what was sent. `poll` does not wait on such a connection.
#[test]
fn a_wait_for_releases_is_as_long_as_asked_after_a_hang_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Less than a batch. Connections get it from their listener.
    SockRef::from(&listener).set_recv_buffer_size(4 << 10).unwrap();
    let address = listener.local_addr().unwrap();
    let options = TcpOptions { send_buffer_bytes: Some(1 << 20), ..options(ZeroCopy::On) };
    let from = guest_memory(&[64]);
    let (source, mut sender, (_control, mut pages)) = thread::scope(|scope| {
        let peer = scope.spawn(|| (raw::welcome(&listener).0, raw::welcome(&listener).0));
        let mut source = connect(address, options).unwrap();
        source.register(&from).unwrap();
        let sender = source.open_senders(1).unwrap().remove(0);
        (source, sender, peer.join().unwrap())
    });
    let ticket = sender.send(&[data(0, 0, 64)]).unwrap();
    pages.write_all(&pageferry::transport::stream::encode_ack(ticket)).unwrap();
    pages.shutdown(Shutdown::Write).unwrap();
    sender.finish().unwrap();

    let wait = Duration::from_millis(50);
    let began = Instant::now();
    let marks = sender.watermarks(Some(wait)).unwrap();
    assert!(began.elapsed() >= wait, "{:?}", began.elapsed());
    assert_eq!((marks.released, marks.landed), (0, 0), "the kernel has not let go of it");
    let interrupter = source.interrupter();
    interrupted(&*interrupter, || sender.watermarks(Some(PATIENCE)));
}
