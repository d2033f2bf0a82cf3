//! Ends: in order, and otherwise.

use std::time::{Duration, Instant};

use super::fixture::{Opened, data, drain, hear, lost, say, send, settle, wait, zero};
use super::interrupts::{others_go_on, wait_until_lost};
use super::{PROMPT, Trial};
use crate::transport::{PageCounts, Received, Run, TransportError};

/// `finish` is seen as the end on a data channel, after all of its batches; a control channel that
/// was dropped is closed, after all of its frames.
pub(super) fn an_orderly_end_is_seen(trial: &Trial) {
    let Opened { mut senders, mut receivers, control, source, destination: _kept, here, there } =
        trial.open(2);
    here.fill(40);
    let (mut from_source, mut to_destination) = control;
    let runs: Vec<Run> = (0..50).map(|page| data(0, page * 2, 1)).chain([zero(1, 0, 1)]).collect();
    let one_sided = source.capabilities().one_sided_write;
    trial.watch.together(|crew| {
        for (sender, receiver) in senders.iter_mut().zip(&mut receivers) {
            let receiving = crew.spawn(|| drain(receiver));
            let sending = crew.spawn(|| {
                for run in &runs {
                    send(sender, &[*run]);
                }
                // Nobody waits for the batches: the end comes after them all the same.
                sender.finish().expect("the channel ends");
            });
            let counts = receiving.join_promptly("the end of a channel is seen");
            if !one_sided {
                assert_eq!(counts, PageCounts::of(&runs), "pages before the end");
            }
            sending.join();
        }
    });
    for run in &runs[..50] {
        let (region, page) = (run.range.region, run.range.first_page);
        let landed = there.read(region, page) == here.read(region, page);
        assert!(landed, "the channel ended, and page {page} is not there");
    }
    say(&mut from_source.sender, b"the last word");
    drop((from_source, senders, source));
    assert_eq!(hear(&mut to_destination.receiver), b"the last word", "a frame before the end");
    let result = to_destination.receiver.receive(Some(PROMPT));
    let closed = matches!(result, Err(TransportError::Closed));
    assert!(closed, "a control channel that was dropped: {result:?}");
}

/// A source that goes away without a word is a loss on every channel, also in the middle of
/// batches.
pub(super) fn a_lost_source_is_noticed(trial: &Trial) {
    for batches in [0, 3] {
        let Opened {
            mut senders, mut receivers, control, source, destination: _kept, here, ..
        } = trial.open(2);
        here.fill(41);
        let (from_source, mut to_destination) = control;
        trial.watch.together(|crew| {
            let receiving: Vec<_> = receivers
                .iter_mut()
                .map(|receiver| {
                    crew.spawn(move || {
                        loop {
                            match receiver.receive() {
                                Ok(Received::Batch(_)) => {}
                                Ok(Received::End) => panic!("a lost source ended in order"),
                                Err(error) => return Err::<(), _>(error),
                            }
                        }
                    })
                })
                .collect();
            let hearing = crew.spawn(|| to_destination.receiver.receive(None).map(drop));
            for sender in &mut senders {
                for page in 0..batches {
                    send(sender, &[data(0, page, 1)]);
                }
            }
            drop((senders, from_source, source));
            for receiving in receiving {
                let what = "a receiver notices that the source is lost";
                lost(receiving.join_promptly(what), what);
            }
            let result = hearing.join_promptly("control notices that the source is lost");
            let gone = matches!(result, Err(TransportError::Closed | TransportError::Lost { .. }));
            assert!(gone, "a wait for a frame of a lost source: {result:?}");
        });
    }
}

/// A destination that goes away ends the source's sends and waits, and its control channel.
pub(super) fn a_lost_destination_is_noticed(trial: &Trial) {
    for waits in [false, true] {
        let mut opened = trial.open(2);
        opened.here.fill(42);
        let (mut here, there) = opened.control;
        trial.watch.together(|crew| {
            let sending: Vec<_> = opened
                .senders
                .iter_mut()
                .map(|sender| {
                    crew.spawn(move || {
                        if waits {
                            let ticket = sender.send(&[data(0, 0, 1)])?;
                            // The wait is what is to notice.
                            while sender.watermarks(Some(PROMPT * 2))?.landed < ticket {}
                        }
                        wait_until_lost(sender)
                    })
                })
                .collect();
            let hearing = crew.spawn(|| here.receiver.receive(None).map(drop));
            if waits {
                crew.await_standstill("the source's watermarks");
            }
            drop((opened.receivers, there, opened.destination));
            for sending in sending {
                let what = "a sender notices that the destination is lost";
                lost(sending.join_promptly(what), what);
            }
            let result = hearing.join_promptly("control notices that the destination is lost");
            let gone = matches!(result, Err(TransportError::Closed | TransportError::Lost { .. }));
            assert!(gone, "a wait for a frame of a lost destination: {result:?}");
        });
        let began = Instant::now();
        let error = loop {
            assert!(began.elapsed() < PROMPT, "frames go out to a destination that is lost");
            if let Err(error) = here.sender.send(&[1; 1000], Duration::from_millis(100)) {
                break error;
            }
        };
        let gone = matches!(error, TransportError::Closed | TransportError::Lost { .. });
        assert!(gone, "a frame to a lost destination: {error:?}");
    }
}

/// A channel of which one end is dropped is lost at the other, and all others go on.
pub(super) fn a_dropped_channel_is_lost_alone(trial: &Trial) {
    for at_source in [true, false] {
        let mut opened = trial.open(3);
        opened.here.fill(43);
        let (mut sender, mut receiver) = (opened.senders.remove(1), opened.receivers.remove(1));
        trial.watch.together(|crew| {
            let receiving = crew.spawn(move || {
                loop {
                    match receiver.receive() {
                        Ok(Received::Batch(_)) if at_source => {}
                        other => return (receiver, other.map(drop)),
                    }
                }
            });
            let ticket = send(&mut sender, &[data(0, 1, 1)]);
            if at_source {
                settle(&mut sender, ticket);
                drop(sender);
                let what = "a channel that was dropped at the source is lost";
                lost(receiving.join_promptly(what).1, what);
            } else {
                // A second batch, and a wait: some receivers return a batch only when the next is
                // there, and some senders send when they wait.
                send(&mut sender, &[zero(0, 2, 1)]);
                wait(&mut sender, Duration::from_millis(20));
                let (receiver, batch) = receiving.join_promptly("a batch comes in");
                batch.expect("a batch comes in");
                drop(receiver);
                let sending = crew.spawn(move || wait_until_lost(&mut sender));
                let what = "a channel that was dropped at the destination is lost";
                lost(sending.join_promptly(what), what);
            }
        });
        others_go_on(trial, &mut opened);
    }
}

/// Whoever sends when the link breaks still hears what the other side said before that.
pub(super) fn what_was_said_before_a_link_broke_is_heard(trial: &Trial) {
    let (mut here, mut there, _source, destination) = trial.control();
    let said = [&b"the cause"[..], b"farewell"];
    for frame in said {
        say(&mut there.sender, frame);
    }
    // Without a last word.
    destination.interrupter().interrupt();
    drop((there, destination));
    let began = Instant::now();
    let error = loop {
        assert!(began.elapsed() < PROMPT, "frames go out to a destination that is lost");
        if let Err(error) = here.sender.send(b"more", Duration::from_millis(100)) {
            break error;
        }
    };
    assert!(matches!(error, TransportError::Lost { .. }), "a frame to a lost end: {error:?}");
    for frame in said {
        let heard = here.receiver.receive(Some(PROMPT));
        assert!(
            matches!(&heard, Ok(heard) if heard == frame),
            "what was said before the link broke: {heard:?}"
        );
    }
    let result = here.receiver.receive(Some(PROMPT));
    let gone = matches!(result, Err(TransportError::Closed | TransportError::Lost { .. }));
    assert!(gone, "a wait for a frame of a lost destination: {result:?}");
}
