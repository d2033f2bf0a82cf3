//! Peers that receive nothing, and so give no credit: who sends to them waits no longer than asked.

use std::thread;
use std::time::{Duration, Instant};

use pageferry::testing::{drain, settle};
use pageferry::transport::{ControlChannel, Link, TransportError};
use pageferry_rdma::RegistrationMode;

use crate::common::{alone, data, open, options};
use crate::support::{SOON, address, linked};

/// Nobody receives, so marks are not answered: after 32 of them there is no credit for another.
#[test]
fn a_wait_is_as_long_as_asked_without_a_credit_for_a_mark() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    opened.here.fill(3);
    let sender = &mut opened.sender;
    thread::scope(|scope| {
        let interrupter = sender.interrupter();
        let (done, waited) = std::sync::mpsc::channel();
        scope.spawn(move || {
            for page in 0..40 {
                sender.send(&[data(page, 1)]).expect("a batch goes out");
                sender.watermarks(Some(Duration::from_millis(1))).expect("it is not lost");
            }
            // The other end may have given up waiting.
            let _ = done.send(());
        });
        if waited.recv_timeout(SOON).is_err() {
            interrupter.interrupt();
            panic!("a wait of a millisecond went on");
        }
    });
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        settle(&mut *opened.sender, 40);
        // As long as there is, and no longer than there is something to wait for.
        assert_eq!(opened.sender.watermarks(Some(Duration::MAX)).expect("watermarks").landed, 40);
        opened.sender.send(&[data(0, 1)]).expect("a batch goes out");
        assert_eq!(opened.sender.watermarks(Some(Duration::MAX)).expect("watermarks").landed, 41);
        opened.sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), Some((0, 40)));
}

/// A process that was stopped, say: its NIC takes what it has room for, and nobody reads it.
#[test]
fn a_control_send_to_who_reads_nothing_has_an_end() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let both = options(RegistrationMode::AtStart);
    let (mut source, mut destination) = linked(&address, &both, &both);
    let _unread = destination.control().expect("once");
    let ControlChannel { mut sender, receiver: _idle } = source.control().expect("once");
    let (frame, patience) = (vec![1; 1 << 20], Duration::from_millis(300));
    let began = Instant::now();
    let error = sender.send(&frame, patience).expect_err("there is no room for it");
    let took = began.elapsed();
    assert!(
        matches!(error, TransportError::TimedOut { after, .. } if after == patience),
        "{error:?}"
    );
    assert!(took >= patience && took < SOON / 4, "{took:?}");
    sender.send(&[1], SOON).expect_err("part of a frame is out");
    assert!(began.elapsed() < SOON / 2, "at once");
}
