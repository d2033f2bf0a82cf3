//! Sends that end in time, and channels that end alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{MakePair, Opened, REGION_PAGES, SOON, batches, data, drain, open, settle};
use crate::transport::{
    ControlSender, MAX_FRAME_BYTES, PageReceiver, PageSender, Received, TransportError,
};

/// What a send is given that nobody makes room for, and by when it must have given up.
const BRIEF: Duration = Duration::from_millis(200);
const BRIEF_AT_MOST: Duration = Duration::from_secs(5);
/// More frames of the largest size than any transport takes that nobody reads.
const FRAMES: usize = 256;
/// Nothing has moved for so long: what moved it waits.
const STILL: Duration = Duration::from_millis(50);

/// Sends until that fails.
fn send_until_error(
    sender: &mut dyn ControlSender,
    timeout: Duration,
    sent: &AtomicUsize,
) -> (TransportError, Duration) {
    let frame = vec![7; MAX_FRAME_BYTES];
    loop {
        let began = Instant::now();
        if let Err(error) = sender.send(&frame, timeout) {
            return (error, began.elapsed());
        }
        assert!(sent.fetch_add(1, Ordering::SeqCst) < FRAMES, "frames that nobody reads are taken");
    }
}

/// Where the other side does not read, a send gives up in time, at both ends, and the half that
/// may have sent part of a frame is of no more use.
pub fn a_control_send_that_nobody_reads_times_out(make_pair: &MakePair<'_>) {
    let (mut source, mut destination) = make_pair();
    let mut here = source.control().expect("the source's control channel");
    let mut there = destination.control().expect("the destination's control channel");
    for sender in [&mut here.sender, &mut there.sender] {
        let (error, took) = send_until_error(&mut **sender, BRIEF, &AtomicUsize::new(0));
        assert!(matches!(error, TransportError::TimedOut { .. }), "{error:?}");
        assert!((BRIEF..BRIEF_AT_MOST).contains(&took), "gave up after {took:?}");
        let again = sender.send(&[1], BRIEF);
        assert!(again.is_err(), "a frame goes out behind part of another");
    }
}

/// An interrupt wakes a send that the other side makes no room for.
pub fn an_interrupt_wakes_a_control_send(make_pair: &MakePair<'_>) {
    let (mut source, mut destination) = make_pair();
    let mut here = source.control().expect("the source's control channel");
    let _there = destination.control().expect("the destination's control channel");
    let sent = AtomicUsize::new(0);
    let (error, _) = thread::scope(|scope| {
        let sending = scope.spawn(|| send_until_error(&mut *here.sender, 2 * SOON, &sent));
        let mut before = usize::MAX;
        while before != sent.load(Ordering::SeqCst) {
            before = sent.load(Ordering::SeqCst);
            thread::sleep(STILL);
        }
        source.interrupter().interrupt();
        sending.join().expect("no panic")
    });
    assert!(matches!(error, TransportError::Interrupted), "{error:?}");
    let again = here.sender.send(&[1], BRIEF);
    assert!(matches!(again, Err(TransportError::Interrupted)), "{again:?}");
}

fn is_interrupted<T: std::fmt::Debug>(result: &Result<T, TransportError>) {
    assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
}

/// What a receiver's end comes to.
fn receive_until_error(receiver: &mut dyn PageReceiver) -> TransportError {
    loop {
        match receiver.receive() {
            Ok(Received::Batch(_)) => {}
            Ok(Received::End) => panic!("a channel that was interrupted ended in order"),
            Err(error) => return error,
        }
    }
}

/// What a sender's sends come to.
fn send_pages_until_error(sender: &mut dyn PageSender, limit: u64) -> TransportError {
    loop {
        for batch in batches(limit, 2, REGION_PAGES[2]) {
            // A one-sided transport needs nobody to receive: wait instead of running wild.
            let sent = sender
                .send(&batch)
                .and_then(|_| sender.watermarks(Some(Duration::from_millis(1))).map(drop));
            if let Err(error) = sent {
                return error;
            }
        }
    }
}

/// An interrupt of one channel, at either end, ends that channel alone: its other end is lost, the
/// other channels and the control channel go on. The interrupter keeps no guest memory.
pub fn an_interrupt_of_one_channel_leaves_the_others(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 3);
    opened.here.fill(8);
    let limit = opened.source.capabilities().max_batch_bytes;
    let interrupters = [opened.senders[0].interrupter(), opened.receivers[2].interrupter()];
    let [from, goes_on, sends] = take_three(&mut opened.senders);
    let [receives, goes_on_there, to] = take_three(&mut opened.receivers);
    let (mut from, mut to, mut sends, mut receives) = (from, to, sends, receives);
    let (mut goes_on, mut goes_on_there) = (goes_on, goes_on_there);
    let (here, there) = &mut opened.control;
    thread::scope(|scope| {
        let draining = scope.spawn(move || drain(&mut goes_on_there));
        let sending = scope.spawn(move || {
            let error = send_pages_until_error(&mut *from, limit);
            is_interrupted(&Err::<(), _>(error));
            is_interrupted(&from.send(&[data(0, 0, 1)]));
            is_interrupted(&from.watermarks(Some(SOON)));
            is_interrupted(&from.watermarks(None));
        });
        let receiving = scope.spawn(move || {
            is_interrupted(&to.receive());
            is_interrupted(&to.receive());
        });
        let mut last = goes_on.send(&[data(0, 0, 1)]).expect("a batch goes out");
        settle(&mut goes_on, last);
        for interrupter in &interrupters {
            interrupter.interrupt();
        }
        sending.join().expect("the sender's thread does not panic");
        receiving.join().expect("the receiver's thread does not panic");
        // Both have dropped their ends by now.
        for error in
            [receive_until_error(&mut *receives), send_pages_until_error(&mut *sends, limit)]
        {
            assert!(matches!(error, TransportError::Lost { .. }), "{error:?}");
        }
        for batch in batches(limit, 0, REGION_PAGES[0]) {
            last = goes_on.send(&batch).expect("a batch goes out on another channel");
        }
        settle(&mut goes_on, last);
        for (sender, receiver) in
            [(&mut here.sender, &mut there.receiver), (&mut there.sender, &mut here.receiver)]
        {
            sender.send(b"still here", SOON).expect("a frame goes out");
            assert_eq!(receiver.receive(Some(SOON)).expect("a frame comes in"), b"still here");
        }
        goes_on.finish().expect("the channel ends");
        draining.join().expect("the other channel ends in order");
    });
    for page in 0..REGION_PAGES[0] {
        assert!(opened.here.read(0, page) == opened.there.read(0, page), "page {page}");
    }
    drop((sends, receives, goes_on));
    let Opened { control, source, destination, here, there, .. } = opened;
    drop((control, source, destination));
    let began = Instant::now();
    while Arc::strong_count(here.memory()) > 1 || Arc::strong_count(there.memory()) > 1 {
        assert!(began.elapsed() < SOON, "guest memory is held by who interrupts");
        thread::yield_now();
    }
    for interrupter in &interrupters {
        interrupter.interrupt();
    }
}

fn take_three<T>(all: &mut Vec<T>) -> [T; 3] {
    let [first, second, third] = [all.remove(0), all.remove(0), all.remove(0)];
    [first, second, third]
}
