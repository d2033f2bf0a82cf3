//! Stages: control, registration, data channels; what a link says of itself, and lets go.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::fixture::{Opened, REGION_PAGES};
use super::{PROMPT, Trial};
use crate::pages::memory::PAGE_BYTES;
use crate::testing::TestMemory;
use crate::transport::{Capabilities, MAX_BATCH_RUNS, TransportError};

fn out_of_order<T>(result: Result<T, TransportError>, what: &str) {
    let result = result.map(drop);
    assert!(matches!(result, Err(TransportError::OutOfOrder(_))), "{what}: {result:?}");
}

/// A batch can hold something, and a registration is of what was given.
pub(super) fn capabilities_make_sense(trial: &Trial) {
    let (mut source, mut destination) = trial.pair();
    let check = |name: &str, capabilities: Capabilities| {
        assert!(!name.is_empty(), "a link has a name");
        let Capabilities { max_batch_bytes, max_batch_runs, .. } = capabilities;
        assert!(max_batch_bytes >= PAGE_BYTES, "max_batch_bytes of {max_batch_bytes}");
        let runs_fit = (1..=MAX_BATCH_RUNS).contains(&max_batch_runs);
        assert!(runs_fit, "max_batch_runs of {max_batch_runs}");
    };
    check(source.name(), source.capabilities());
    check(destination.name(), destination.capabilities());
    let before = (source.capabilities(), destination.capabilities());
    let (here, there) = (TestMemory::new(&REGION_PAGES), TestMemory::new(&REGION_PAGES));
    for registration in [source.register(here.memory()), destination.register(there.memory())] {
        let registered = registration.expect("memory registers").registered_bytes;
        let all = here.memory().layout().len_bytes();
        assert!(registered <= all, "{registered} bytes registered of {all}");
    }
    let after = (source.capabilities(), destination.capabilities());
    assert!(before == after, "capabilities changed from {before:?} to {after:?}");
}

/// No channels before registration.
pub(super) fn stages_cannot_be_skipped(trial: &Trial) {
    let (mut source, mut destination) = trial.pair();
    out_of_order(source.open_senders(1), "senders before registration");
    let result = destination.open_receivers(1, Duration::from_millis(10));
    out_of_order(result, "receivers before registration");
}

/// Control is given once, and data channels are opened once.
pub(super) fn stages_cannot_be_taken_twice(trial: &Trial) {
    let mut opened = trial.open(1);
    out_of_order(opened.source.control(), "the source's control channel again");
    out_of_order(opened.destination.control(), "the destination's control channel again");
    let Opened { source, destination, .. } = &mut opened;
    trial.watch.together(|crew| {
        let again = crew.spawn(|| {
            let senders = source.open_senders(1).map(drop);
            (senders, destination.open_receivers(1, Duration::from_millis(10)).map(drop))
        });
        let again = again.join_promptly("opening data channels again is refused");
        out_of_order(again.0, "the source's data channels again");
        out_of_order(again.1, "the destination's data channels again");
    });
}

/// A destination waits for a source that is late, and gives up when its time is over. (Where
/// channels are there from the start, there is nothing to wait for.)
pub(super) fn a_destination_waits_for_channels_in_time(trial: &Trial) {
    let (_here, _there, mut source, mut destination) = trial.control();
    let memory = TestMemory::new(&REGION_PAGES);
    source.register(memory.memory()).expect("source memory registers");
    destination.register(memory.memory()).expect("destination memory registers");
    let time = Duration::from_millis(100);
    let waited = trial.watch.together(|crew| {
        let waiting = crew.spawn(|| {
            let began = Instant::now();
            destination.open_receivers(1, time).map(|_| None).or_else(|error| {
                let timed_out = matches!(error, TransportError::TimedOut { .. });
                if timed_out { Ok(Some(began.elapsed())) } else { Err(error) }
            })
        });
        waiting.join_promptly("a destination gives up waiting for channels").expect("a timeout")
    });
    if let Some(waited) = waited {
        assert!(waited >= time * 9 / 10, "gave up on channels after {waited:?} of {time:?}");
    }
    drop((source, destination));

    let (_here, _there, mut source, mut destination) = trial.control();
    source.register(memory.memory()).expect("source memory registers");
    destination.register(memory.memory()).expect("destination memory registers");
    trial.watch.together(|crew| {
        let waiting = crew.spawn(|| destination.open_receivers(2, PROMPT));
        // A source that is late.
        thread::sleep(time);
        let senders = source.open_senders(2).expect("channels open, late");
        let receivers = waiting.join().expect("channels are accepted, late");
        assert_eq!((senders.len(), receivers.len()), (2, 2), "number of late channels");
    });
}

/// When links and channels are gone nobody holds guest memory any more, interrupters neither.
pub(super) fn memory_is_let_go(trial: &Trial) {
    let opened = trial.open(2);
    let Opened { senders, receivers, control, source, destination, here, there } = opened;
    let mut kept = vec![source.interrupter(), destination.interrupter()];
    kept.extend(senders.iter().map(|sender| sender.interrupter()));
    kept.extend(receivers.iter().map(|receiver| receiver.interrupter()));
    drop((senders, receivers, control));
    drop((source, destination));
    let began = Instant::now();
    while Arc::strong_count(here.memory()) > 1 || Arc::strong_count(there.memory()) > 1 {
        assert!(began.elapsed() < PROMPT, "guest memory is still held");
        thread::yield_now();
    }
    drop(kept);
}
