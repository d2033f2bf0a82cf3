//! Pages arrive exactly, whatever the sockets do.

use std::thread;
use std::time::Duration;

use pageferry::memory::{GuestMemory, PAGE_BYTES};
use pageferry::transport::Link;
use pageferry::transport::stream::{ACK_BYTES, LEAD_BYTES};
use pageferry::transport::{
    Capabilities, ChannelCounters, MAX_BATCH_RUNS, PageCounts, PageReceiver, PageSender, Received,
    Run, RunKind, TransportError, Watermarks,
};
use pageferry_tcp::{TcpAcceptor, TcpOptions, ZeroCopy, connect};

use crate::support::memory::{assert_same, fill, guest_memory};
use crate::support::{
    Ends, PATIENCE, Pair, Random, acceptor, data, drain, of_anyone, pair, relay, until_landed, zero,
};

/// Several regions, single pages, and one that is no multiple of anything.
const REGIONS: [u64; 4] = [256, 1, 701, 3];

/// Cuts all memory into runs of random length and kind, and deals them to channels in batches.
/// Zero runs are zeroed in `from` first.
fn plan(from: &GuestMemory, channels: usize, random: &mut Random) -> Vec<Vec<Vec<Run>>> {
    let mut plan = vec![vec![]; channels];
    for (region, pages) in (0..).zip(REGIONS) {
        let mut next = 0;
        while next < pages {
            let mut batch = Vec::new();
            for _ in 0..=random.below(40) {
                let count = (1 + random.below(30)).min(pages - next);
                if count == 0 {
                    break;
                }
                let count_u32 = u32::try_from(count).unwrap();
                if random.below(4) == 0 {
                    let run = zero(region, next, count_u32);
                    from.fill_zero(run.range).unwrap();
                    batch.push(run);
                } else {
                    batch.push(data(region, next, count_u32));
                }
                next += count;
            }
            let channel = usize::try_from(random.below(channels as u64)).unwrap();
            plan[channel].push(batch);
        }
    }
    plan
}

fn send_all(sender: &mut dyn PageSender, batches: &[Vec<Run>]) -> ChannelCounters {
    let mut last = 0;
    for batch in batches {
        let ticket = sender.send(batch).unwrap();
        assert_eq!(ticket, last + 1);
        last = ticket;
        let marks = sender.watermarks(None).unwrap();
        assert!(marks.landed <= marks.released && marks.released <= ticket, "{marks:?}");
    }
    until_landed(sender, last);
    sender.finish().unwrap();
    sender.counters()
}

fn receive_all(receiver: &mut dyn PageReceiver, batches: &[Vec<Run>]) -> ChannelCounters {
    for batch in batches {
        assert_eq!(receiver.receive().unwrap(), Received::Batch(PageCounts::of(batch)));
    }
    assert_eq!(receiver.receive().unwrap(), Received::End);
    assert_eq!(receiver.receive().unwrap(), Received::End);
    receiver.counters()
}

/// Moves noise with a link twice; the second time over what the first left there.
fn moves_exactly(mut link: Pair, channels: u16, random: &mut Random) {
    let (from, to) = (guest_memory(&REGIONS), guest_memory(&REGIONS));
    fill(&to, random);
    fill(&from, random);
    let plan = plan(&from, usize::from(channels), random);
    let Ends { senders, receivers } = link.open(&from, &to, channels);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for ((mut sender, mut receiver), batches) in senders.into_iter().zip(receivers).zip(&plan) {
            let sending = scope.spawn(move || send_all(&mut *sender, batches));
            let receiving = scope.spawn(move || receive_all(&mut *receiver, batches));
            threads.push((sending, receiving, batches));
        }
        for (sending, receiving, batches) in threads {
            let (sent, received) = (sending.join().unwrap(), receiving.join().unwrap());
            let payload_bytes: u64 = batches.iter().flatten().map(Run::payload_bytes).sum();
            assert_eq!((sent.user_copied_bytes, received.user_copied_bytes), (0, 0));
            assert!(sent.wire_bytes > payload_bytes);
            assert_eq!(sent.wire_bytes, received.wire_bytes);
        }
    });
    assert_same(&from, &to);
}

#[test]
fn one_to_eight_channels_move_pages_exactly() {
    let mut random = Random::seeded("channels");
    for channels in 1..=8 {
        moves_exactly(pair(&TcpOptions::default()), channels, &mut random);
    }
}

#[test]
fn tiny_buffers_move_pages_exactly() {
    let mut random = Random::seeded("tiny buffers");
    // In a receive buffer of less than a few packets Linux may leave the window smaller than a
    // packet, and then only probes pass, every fifth of a second. Nothing is wrong with the bytes.
    let options = TcpOptions {
        send_buffer_bytes: Some(1),
        receive_buffer_bytes: Some(16 << 10),
        ..TcpOptions::default()
    };
    moves_exactly(pair(&options), 3, &mut random);
}

#[test]
fn pieces_of_any_length_move_pages_exactly() {
    let mut random = Random::seeded("relay");
    for most_bytes in [90, 5_000, 200_000] {
        let options = TcpOptions::default();
        let acceptor = acceptor(&options);
        let relay_random = Random::new(random.next_u64());
        let relay = relay::start(acceptor.local_addr(), most_bytes, relay_random);
        let source = connect(relay, options).unwrap();
        let destination = acceptor.accept(Some(PATIENCE)).unwrap();
        moves_exactly(Pair { source, destination }, 2, &mut random);
    }
}

#[test]
fn ipv6_moves_pages_exactly() {
    let mut random = Random::seeded("ipv6");
    let acceptor = match TcpAcceptor::bind("[::1]:0", of_anyone(&TcpOptions::default())) {
        Ok(acceptor) => acceptor,
        Err(error) => {
            eprintln!("SKIPPED: this machine has no IPv6 loopback: {error}");
            return;
        }
    };
    assert!(acceptor.local_addr().is_ipv6());
    let source = connect(acceptor.local_addr(), TcpOptions::default()).unwrap();
    let destination = acceptor.accept(Some(PATIENCE)).unwrap();
    moves_exactly(Pair { source, destination }, 2, &mut random);
}

#[test]
fn the_newest_bytes_win() {
    let mut random = Random::seeded("newest");
    let (from, to) = (guest_memory(&[4]), guest_memory(&[4]));
    let mut link = pair(&TcpOptions::default());
    let Ends { mut senders, mut receivers } = link.open(&from, &to, 1);
    for round in 0..20 {
        fill(&from, &mut random);
        if round % 3 == 0 {
            let run = zero(0, 1, 2);
            from.fill_zero(run.range).unwrap();
            senders[0].send(&[data(0, 0, 1), run, data(0, 3, 1)]).unwrap();
        } else {
            senders[0].send(&[data(0, 0, 4)]).unwrap();
        }
    }
    senders[0].finish().unwrap();
    assert_eq!(drain(&mut *receivers[0]), 20);
    until_landed(&mut *senders[0], 20);
    assert_same(&from, &to);
}

/// The largest batches there may be: most runs, and most bytes.
#[test]
fn full_batches_pass_and_larger_ones_are_refused() {
    let mut random = Random::seeded("full");
    let (from, to) = (guest_memory(&[2048]), guest_memory(&[2048]));
    fill(&from, &mut random);
    let mut link = pair(&TcpOptions::default());
    let limits = link.source.capabilities();
    assert_eq!(limits, Capabilities { zero_copy: true, ..link.destination.capabilities() });
    let Ends { mut senders, mut receivers } = link.open(&from, &to, 1);
    let sender = &mut senders[0];

    // Every other page, so that no run touches the next.
    let runs: Vec<Run> = (0..=MAX_BATCH_RUNS as u64).map(|run| data(0, run * 2, 1)).collect();
    let pages = u32::try_from(limits.max_batch_bytes / PAGE_BYTES).unwrap();
    for too_large in [&runs[..], &[data(0, 0, pages), data(0, 2000, 1)]] {
        let error = sender.send(too_large).unwrap_err();
        assert!(matches!(error, TransportError::TooLarge { .. }), "{error}");
    }
    for outside in [data(0, 2048, 1), data(1, 0, 1), zero(0, 2047, 2), zero(0, 0, 0)] {
        let error = sender.send(&[data(0, 0, 1), outside]).unwrap_err();
        assert!(matches!(error, TransportError::OutOfRange(out) if out.range == outside.range));
    }
    assert!(matches!(sender.send(&[]), Err(TransportError::Io { .. })));

    // None of those left a trace on the wire.
    thread::scope(|scope| {
        let receiving = scope.spawn(|| drain(&mut *receivers[0]));
        assert_eq!(sender.send(&runs[..limits.max_batch_runs]).unwrap(), 1);
        assert_eq!(sender.send(&[data(0, 0, pages)]).unwrap(), 2);
        assert_eq!(sender.send(&[data(0, 1024, pages)]).unwrap(), 3);
        sender.finish().unwrap();
        assert!(matches!(sender.send(&runs[..1]), Err(TransportError::OutOfOrder(_))));
        sender.finish().unwrap();
        assert_eq!(receiving.join().unwrap(), 3);
    });
    until_landed(&mut **sender, 3);
    assert_same(&from, &to);
}

/// One thread for both ends: nothing here waits for the other side to do something.
#[test]
fn small_batches_need_no_second_thread() {
    let memory = guest_memory(&[8]);
    let mut link = pair(&TcpOptions::default());
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[8]), 1);
    let sender = &mut senders[0];
    assert_eq!(sender.watermarks(Some(PATIENCE)).unwrap(), Watermarks::default());
    for ticket in 1..=10 {
        // Far below what makes a sender ask for an acknowledgement.
        let run = if ticket % 2 == 0 { data(0, 0, 8) } else { data(0, 7, 1) };
        assert_eq!(sender.send(&[run]).unwrap(), ticket);
        // Asks for the acknowledgement, and so ends the receiver's wait for the next record.
        let marks = sender.watermarks(Some(Duration::ZERO)).unwrap();
        assert_eq!(marks.landed, ticket - 1);
        receivers[0].receive().unwrap();
        until_landed(&mut **sender, ticket);
    }
}

/// Acknowledgements cost what was asked for, and no system call is made in vain.
#[test]
fn a_receiver_acknowledges_when_asked_and_only_then() {
    let memory = guest_memory(&[4096]);
    let mut link = pair(&TcpOptions { zero_copy: ZeroCopy::Off, ..TcpOptions::default() });
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[4096]), 1);
    let (sender, receiver) = (&mut senders[0], &mut receivers[0]);
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            drain(&mut **receiver);
            receiver.counters()
        });
        // 64 MiB in batches of 4 MiB: 8 flags, and one end.
        for ticket in 1..=16 {
            let first_page = (ticket % 4) * 1024;
            assert_eq!(sender.send(&[data(0, first_page, 1024)]).unwrap(), ticket);
        }
        sender.finish().unwrap();
        until_landed(&mut **sender, 16);
        let counters = receiving.join().unwrap();
        let heads = (16 * LEAD_BYTES + LEAD_BYTES) as u64;
        // The last flag and the end come together.
        let acks = 8 * ACK_BYTES as u64;
        assert_eq!(counters.wire_bytes, (64 << 20) + heads + acks);
        // The first lead, 16 times a payload with the next lead, and the acknowledgements.
        assert_eq!(counters.system_calls, 1 + 16 + 8, "{counters:?}");
    });
}

/// Everything sent arrives even if the source goes away right after `finish`.
#[test]
fn a_source_may_leave_after_finish() {
    let mut random = Random::seeded("leave");
    let (from, to) = (guest_memory(&[4096]), guest_memory(&[4096]));
    fill(&from, &mut random);
    let mut link = pair(&TcpOptions::default());
    let Ends { senders, mut receivers } = link.open(&from, &to, 2);
    let Pair { source, destination } = link;
    thread::scope(|scope| {
        scope.spawn(|| {
            for (mut sender, half) in senders.into_iter().zip([0, 2048]) {
                for first_page in (half..half + 2048).step_by(256) {
                    sender.send(&[data(0, first_page, 256)]).unwrap();
                }
                sender.finish().unwrap();
            }
            drop(source);
        });
        for receiver in &mut receivers {
            scope.spawn(|| assert_eq!(drain(&mut **receiver), 8));
        }
    });
    assert_same(&from, &to);
    drop(destination);
}

/// A sender that never reads acknowledgements does not stop a receiver with tiny buffers.
#[test]
fn unread_acknowledgements_block_nobody() {
    const BATCHES: u64 = 20_000;
    let memory = guest_memory(&[2]);
    let options = TcpOptions {
        send_buffer_bytes: Some(1),
        receive_buffer_bytes: Some(1),
        ..TcpOptions::default()
    };
    let mut link = pair(&options);
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[2]), 1);
    let sender = &mut senders[0];
    thread::scope(|scope| {
        scope.spawn(|| {
            for ticket in 1..=BATCHES {
                receivers[0].receive().unwrap();
                if ticket == BATCHES {
                    assert_eq!(receivers[0].receive().unwrap(), Received::End);
                }
            }
        });
        for _ in 1..=BATCHES {
            sender.send(&[Run { kind: RunKind::Zero, ..data(0, 0, 1) }]).unwrap();
        }
        until_landed(&mut **sender, BATCHES);
        sender.finish().unwrap();
    });
}
