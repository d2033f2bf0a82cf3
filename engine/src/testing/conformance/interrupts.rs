//! Interrupts: of a whole end, and of one channel.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::fixture::{
    Opened, Receiver, Sender, VERY_LONG, batches, data, drain, interrupted, lost, send, settle,
};
use super::{PROMPT, Trial};
use crate::transport::{Interrupt, MAX_FRAME_BYTES, TransportError};

const CHANNELS: u16 = 4;

/// Sends until that fails: where nobody receives it ends up waiting for room. A one-sided transport
/// needs nobody to receive: it waits instead of running wild.
fn send_until_it_fails(sender: &mut Sender, most: u64) -> Result<(), TransportError> {
    loop {
        for batch in batches(most, 2, super::fixture::REGION_PAGES[2]) {
            sender.send(&batch)?;
        }
        sender.watermarks(Some(Duration::from_millis(1)))?;
    }
}

fn wait_until_it_fails(sender: &mut Sender) -> Result<(), TransportError> {
    sender.send(&[data(0, 0, 1)])?;
    loop {
        sender.watermarks(Some(VERY_LONG))?;
        // Where all has landed there is nothing to wait for.
        thread::yield_now();
    }
}

fn receive_until_it_fails(receiver: &mut Receiver) -> Result<(), TransportError> {
    loop {
        receiver.receive()?;
    }
}

/// An interrupt of the source wakes every channel, those that wait for room and those that wait for
/// batches to land.
pub(super) fn an_interrupt_wakes_every_sender(trial: &Trial) {
    let mut opened = trial.open(CHANNELS);
    opened.here.fill(30);
    let most = opened.batch_pages();
    let interrupt = opened.source.interrupter();
    trial.watch.together(|crew| {
        let tasks: Vec<_> = (0..)
            .zip(&mut opened.senders)
            .map(|(channel, sender)| {
                let task = crew.spawn(move || match channel % 2 {
                    0 => send_until_it_fails(sender, most),
                    _ => wait_until_it_fails(sender),
                });
                (channel, task)
            })
            .collect();
        crew.await_standstill("channel 3");
        interrupt.interrupt();
        for (channel, task) in tasks {
            let what = format!("an interrupt wakes the sender of channel {channel}");
            interrupted(task.join_promptly(&what), &what);
        }
    });
}

/// An interrupt of the destination wakes every channel.
pub(super) fn an_interrupt_wakes_every_receiver(trial: &Trial) {
    let mut opened = trial.open(CHANNELS);
    let interrupt = opened.destination.interrupter();
    trial.watch.together(|crew| {
        let tasks: Vec<_> = (0..)
            .zip(&mut opened.receivers)
            .map(|(channel, receiver)| {
                (channel, crew.spawn(move || receive_until_it_fails(receiver)))
            })
            .collect();
        crew.await_standstill("channel 3");
        interrupt.interrupt();
        for (channel, task) in tasks {
            let what = format!("an interrupt wakes the receiver of channel {channel}");
            interrupted(task.join_promptly(&what), &what);
        }
    });
}

/// An interrupt wakes who waits for a frame, with and without a time, and who waits for room for
/// one; at either end.
pub(super) fn an_interrupt_wakes_the_control_channel(trial: &Trial) {
    for at_source in [true, false] {
        for time in [None, Some(VERY_LONG)] {
            let (here, there, source, destination) = trial.control();
            let (mut mine, _other, interrupt) = if at_source {
                (here, there, source.interrupter())
            } else {
                (there, here, destination.interrupter())
            };
            trial.watch.together(|crew| {
                let hearing = crew.spawn(|| mine.receiver.receive(time).map(drop));
                let sending = crew.spawn(|| {
                    let frame = vec![1; MAX_FRAME_BYTES];
                    // Far more than any system keeps for a connection.
                    (0..1024).try_for_each(|_| mine.sender.send(&frame, VERY_LONG))
                });
                crew.await_standstill("receive of a frame");
                crew.await_standstill("send of a frame");
                interrupt.interrupt();
                let what = "an interrupt wakes a wait for a frame";
                interrupted(hearing.join_promptly(what), what);
                let what = "an interrupt wakes a send of a frame";
                interrupted(sending.join_promptly(what), what);
            });
        }
    }
}

/// An interrupt wakes a destination that waits for the source to open channels.
pub(super) fn an_interrupt_wakes_who_opens_channels(trial: &Trial) {
    let (_here, _there, mut source, mut destination) = trial.control();
    let memory = crate::testing::TestMemory::new(&[10]);
    source.register(memory.memory()).expect("source memory registers");
    destination.register(memory.memory()).expect("destination memory registers");
    let interrupt = destination.interrupter();
    trial.watch.together(|crew| {
        let opening = crew.spawn(|| destination.open_receivers(1, VERY_LONG).map(drop));
        crew.await_standstill("open_receivers");
        interrupt.interrupt();
        let what = "an interrupt wakes who waits for channels";
        let result = opening.join_promptly(what);
        // Where channels are there from the start, nobody waits.
        if result.is_err() {
            interrupted(result, what);
        }
    });
    interrupted(destination.open_receivers(1, PROMPT), "channels after an interrupt");
}

/// After an interrupt every call says so, again and again, and it does no harm when all is gone.
pub(super) fn an_interrupt_ends_what_comes_later(trial: &Trial) {
    let opened = trial.open(2);
    let Opened { mut senders, mut receivers, control: (mut here, mut there), .. } = opened;
    let ends = [opened.source.interrupter(), opened.destination.interrupter()];
    for end in &ends {
        end.interrupt();
    }
    trial.watch.together(|crew| {
        let calls = crew.spawn(|| {
            for _ in 0..2 {
                for sender in &mut senders {
                    let time = Some(Duration::from_millis(1));
                    interrupted(sender.send(&[data(0, 0, 1)]), "a send after an interrupt");
                    interrupted(sender.watermarks(None), "a look after an interrupt");
                    interrupted(sender.watermarks(time), "a wait after an interrupt");
                    interrupted(sender.finish(), "the end of a channel after an interrupt");
                }
                for receiver in &mut receivers {
                    interrupted(receiver.receive(), "a receive after an interrupt");
                }
                for control in [&mut here, &mut there] {
                    let result = control.sender.send(&[1], PROMPT);
                    interrupted(result, "a frame after an interrupt");
                    let result = control.receiver.receive(None);
                    interrupted(result, "a wait for a frame after an interrupt");
                    let result = control.receiver.receive(Some(PROMPT));
                    interrupted(result, "a wait for a frame after an interrupt");
                }
            }
        });
        calls.join_promptly("calls after an interrupt end");
    });
    drop((senders, receivers, here, there, opened.source, opened.destination));
    for end in &ends {
        end.interrupt();
    }
}

/// An interrupt of one channel, by either end, ends it at that end, now and later; the other end
/// sees it lost, and all other channels go on.
pub(super) fn an_interrupted_channel_ends_alone(trial: &Trial) {
    for at_source in [true, false] {
        let mut opened = trial.open(3);
        opened.here.fill(31);
        let most = opened.batch_pages();
        let (mut sender, mut receiver) = (opened.senders.remove(1), opened.receivers.remove(1));
        let interrupt: Arc<dyn Interrupt> =
            if at_source { sender.interrupter() } else { receiver.interrupter() };
        trial.watch.together(|crew| {
            if at_source {
                let sending = crew.spawn(move || {
                    let result = send_until_it_fails(&mut sender, most);
                    (sender, result)
                });
                crew.await_standstill("on channel 1");
                interrupt.interrupt();
                let what = "an interrupt of its channel wakes a sender";
                let (mut sender, result) = sending.join_promptly(what);
                interrupted(result, what);
                interrupted(sender.send(&[data(0, 0, 1)]), "a send on an interrupted channel");
                interrupted(sender.watermarks(None), "a look at an interrupted channel");
                drop(sender);
                let receiving = crew.spawn(move || receive_until_it_fails(&mut receiver));
                let what = "a channel that was interrupted at the source is lost";
                lost(receiving.join_promptly(what), what);
            } else {
                let receiving = crew.spawn(move || {
                    let result = receive_until_it_fails(&mut receiver);
                    (receiver, result)
                });
                crew.await_standstill("on channel 1");
                interrupt.interrupt();
                let what = "an interrupt of its channel wakes a receiver";
                let (mut receiver, result) = receiving.join_promptly(what);
                interrupted(result, what);
                interrupted(receiver.receive(), "a receive on an interrupted channel");
                drop(receiver);
                let sending = crew.spawn(move || wait_until_lost(&mut sender));
                let what = "a channel that was interrupted at the destination is lost";
                lost(sending.join_promptly(what), what);
            }
        });
        others_go_on(trial, &mut opened);
    }
}

/// Sends and waits until the channel says that it is lost.
pub(super) fn wait_until_lost(sender: &mut Sender) -> Result<(), TransportError> {
    loop {
        sender.send(&[data(0, 0, 1)])?;
        sender.watermarks(Some(Duration::from_millis(20)))?;
    }
}

/// The channels that are left move pages, and so does the control channel move frames.
pub(super) fn others_go_on(trial: &Trial, opened: &mut Opened) {
    let (here, there) = &mut opened.control;
    super::fixture::say(&mut here.sender, b"still here");
    let heard = super::fixture::hear(&mut there.receiver);
    assert_eq!(heard, b"still here", "a frame after a channel ended");
    trial.watch.together(|crew| {
        for receiver in &mut opened.receivers {
            crew.spawn(|| drain(receiver));
        }
        for (page, sender) in (10..).zip(&mut opened.senders) {
            let ticket = send(sender, &[data(0, page, 1)]);
            settle(sender, ticket);
            sender.finish().expect("a channel beside one that ended ends in order");
            let landed = opened.there.read(0, page) == opened.here.read(0, page);
            assert!(landed, "a page by a channel beside one that ended is not there");
        }
    });
}
