//! The control channel.

use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::fixture::{REGION_PAGES, batches, data, drain, hear, say, send};
use super::{PROMPT, Trial};
use crate::testing::Random;
use crate::transport::{MAX_FRAME_BYTES, TransportError};

fn frame(seed: u64, size: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = (0..size.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes());
    let mut bytes: Vec<u8> = words.collect();
    bytes.truncate(size);
    bytes
}

fn check(got: &[u8], seed: u64, size: usize) {
    assert!(got == frame(seed, size), "frame {seed} of {size} bytes came as {} bytes", got.len());
}

/// Frames of all sizes arrive whole, in order, both ways at once, and no other frames.
pub(super) fn frames_go_both_ways_whole_and_in_order(trial: &Trial) {
    let (mut here, mut there, _source, _destination) = trial.control();
    let mut sizes = vec![1, 2, 100, 4095, 4096, 4097, 65_535, 65_536, 70_000, 1, 262_145];
    sizes.extend((600_000..MAX_FRAME_BYTES).step_by(70_001));
    sizes.extend([MAX_FRAME_BYTES - 1, MAX_FRAME_BYTES, 1, 1]);
    let sizes = &sizes;
    trial.watch.together(|crew| {
        crew.spawn(|| {
            (0..).zip(sizes).for_each(|(seed, size)| say(&mut here.sender, &frame(seed, *size)));
        });
        crew.spawn(|| {
            (100..).zip(sizes).for_each(|(seed, size)| say(&mut there.sender, &frame(seed, *size)));
        });
        crew.spawn(|| {
            for (seed, size) in (0..).zip(sizes) {
                check(&hear(&mut there.receiver), seed, *size);
            }
        });
        for (seed, size) in (100..).zip(sizes) {
            check(&hear(&mut here.receiver), seed, *size);
        }
    });
    for (receiver, side) in [(here.receiver, "source"), (there.receiver, "destination")] {
        let mut receiver = receiver;
        let result = receiver.receive(Some(Duration::from_millis(20)));
        let nothing = matches!(result, Err(TransportError::TimedOut { .. }));
        assert!(nothing, "the {side} got a frame that nobody sent: {result:?}");
    }
}

/// A receive gives up in time, neither early nor late, and the next one works.
pub(super) fn a_waiting_control_receiver_times_out(trial: &Trial) {
    let (here, there, _source, _destination) = trial.control();
    for (mut sender, mut receiver, side) in
        [(here.sender, there.receiver, "destination"), (there.sender, here.receiver, "source")]
    {
        let time = Duration::from_millis(50);
        let shortest = trial.watch.together(|crew| {
            let waits = crew.spawn(|| {
                let wait = |_| {
                    let began = Instant::now();
                    let result = receiver.receive(Some(time));
                    let timed_out = matches!(result, Err(TransportError::TimedOut { .. }));
                    assert!(timed_out, "a wait for a frame at the {side}: {result:?}");
                    began.elapsed()
                };
                (0..4).map(wait).min().expect("four")
            });
            waits.join_promptly(&format!("the {side}'s waits for a frame end in time"))
        });
        assert!(shortest >= time * 9 / 10, "the {side} waited {shortest:?} of {time:?}");
        assert!(shortest <= time * 10, "the {side} waited {shortest:?} instead of {time:?}");
        say(&mut sender, b"late");
        assert_eq!(hear(&mut receiver), b"late", "a frame after a timeout");
    }
}

/// Who asks again and again gets every frame whole, though it comes in the middle of that.
pub(super) fn timeouts_lose_no_byte(trial: &Trial) {
    let (mut here, mut there, _source, _destination) = trial.control();
    let sizes = [1, 300_000, 5, MAX_FRAME_BYTES, 70_000, MAX_FRAME_BYTES - 7, 3];
    let (waited, is_awaited) = bounded(sizes.len());
    trial.watch.together(|crew| {
        crew.spawn(move || {
            // A sender that is late: not before some waits have seen nothing.
            for ((seed, size), ()) in (0..).zip(sizes).zip(is_awaited) {
                say(&mut here.sender, &frame(seed, size));
            }
        });
        for (seed, size) in (0..).zip(sizes) {
            let began = Instant::now();
            let mut waits = 0;
            let got = loop {
                assert!(began.elapsed() < PROMPT, "frame {seed} of {size} bytes never came");
                match there.receiver.receive(Some(Duration::from_micros(200))) {
                    Ok(frame) => break frame,
                    Err(TransportError::TimedOut { .. }) => waits += 1,
                    Err(error) => panic!("a short wait for a frame: {error:?}"),
                }
                if waits == 10 {
                    waited.send(()).expect("all of them have room");
                }
            };
            check(&got, seed, size);
        }
    });
}

/// Empty and oversized frames are this side's own mistake, and nothing of them goes out.
pub(super) fn frames_beyond_the_limit_are_refused(trial: &Trial) {
    let (here, there, _source, _destination) = trial.control();
    for (mut sender, mut receiver) in [(here.sender, there.receiver), (there.sender, here.receiver)]
    {
        let result = sender.send(&[], PROMPT);
        assert!(result.is_err(), "an empty frame: {result:?}");
        let result = sender.send(&vec![0; MAX_FRAME_BYTES + 1], PROMPT);
        let too_large = matches!(result, Err(TransportError::TooLarge { .. }));
        assert!(too_large, "a frame beyond the limit: {result:?}");
        let result = receiver.receive(Some(Duration::from_millis(20)));
        let nothing = matches!(result, Err(TransportError::TimedOut { .. }));
        assert!(nothing, "something of a refused frame came: {:?}", result.map(|it| it.len()));
    }
}

/// A send gives up in time, neither early nor late, when nobody makes room.
pub(super) fn a_frame_that_nobody_takes_times_out(trial: &Trial) {
    for from_source in [true, false] {
        let (here, there, _source, _destination) = trial.control();
        let (mut stuck, _idle) = if from_source { (here, there) } else { (there, here) };
        let time = Duration::from_millis(300);
        let frame = frame(1, MAX_FRAME_BYTES);
        trial.watch.together(|crew| {
            let sending = crew.spawn(|| {
                // Far more than any system keeps for a connection.
                for _ in 0..1024 {
                    let began = Instant::now();
                    if let Err(error) = stuck.sender.send(&frame, time) {
                        let timed_out = matches!(error, TransportError::TimedOut { .. });
                        assert!(timed_out, "a frame that nobody takes: {error:?}");
                        return began.elapsed();
                    }
                }
                panic!("1 GiB of frames went to nobody");
            });
            let took = sending.join_promptly("a send of a frame gives up in time");
            assert!(took >= time * 9 / 10, "a send of a frame gave up after {took:?} of {time:?}");
        });
        let result = stuck.sender.send(b"more", time);
        assert!(result.is_err(), "a frame went out after half of another");
    }
}

/// The control channel stays usable while data channels are busy, and while they are full.
pub(super) fn frames_pass_while_pages_flow(trial: &Trial) {
    let mut opened = trial.open(2);
    opened.here.fill(4);
    let most = opened.batch_pages();
    let (mut here, mut there) = opened.control;
    let mut answer = move |number: u8| {
        say(&mut here.sender, &[number]);
        assert_eq!(hear(&mut there.receiver), [number], "a frame while pages flow");
        say(&mut there.sender, &[number, 1]);
        assert_eq!(hear(&mut here.receiver), [number, 1], "a frame while pages flow");
    };
    let (begun, has_begun) = bounded(2);
    trial.watch.together(|crew| {
        for (region, sender) in [0, 2].into_iter().zip(&mut opened.senders) {
            let begun = begun.clone();
            crew.spawn(move || {
                send(sender, &[data(region, 0, 1)]);
                begun.send(()).expect("both have room");
                for _ in 0..5 {
                    for batch in batches(most, region, REGION_PAGES[usize::from(region)]) {
                        send(sender, &batch);
                    }
                }
                sender.finish().expect("the channel ends");
            });
        }
        // Pages are under way, nobody receives them yet, and soon there is no room for more. Where memory is
        // still to be registered there is none for the first.
        for channel in 0..2 {
            let _ = has_begun.recv_timeout(Duration::from_secs(1));
            crew.await_standstill(&format!("send on channel {channel}"));
        }
        let answer = crew.spawn(move || {
            (0..10).for_each(&mut answer);
            answer
        });
        let mut answer = answer.join_promptly("frames pass while data channels are full");
        for receiver in &mut opened.receivers {
            crew.spawn(|| drain(receiver));
        }
        (10..50).for_each(&mut answer);
    });
}
