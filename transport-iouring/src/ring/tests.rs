use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;
use crate::chain::Until;

fn ring_of(features: &[Feature]) -> Ring {
    let features = features.iter().copied().collect();
    Ring::new(RingSetup { features, sq_poll: None }, None, || Ok(())).expect("a ring")
}

/// What came through, once nothing more can.
fn all_of(ends: (UnixStream, UnixStream)) -> Vec<u8> {
    let (here, mut there) = ends;
    drop(here);
    let mut all = Vec::new();
    there.read_to_end(&mut all).expect("read");
    all
}

/// A request that the kernel refuses to take ends the chain there, where it is not told to go on
/// (`IORING_SETUP_SUBMIT_ALL`): what had been taken is done, the rest never is.
#[test]
fn the_rest_of_a_chain_that_was_taken_in_part_is_not_handed_over() {
    let ends = UnixStream::pair().expect("sockets");
    let mut ring = ring_of(&[]);
    let mut chain = Chain::new();
    chain.send_now(b"taken");
    // Linked to nothing, so refused.
    chain.time_out(Duration::from_secs(1));
    chain.send_now(b"left");
    let error = ring.run(&ends.0, &mut chain).expect_err("a part was taken only");
    assert!(error.to_string().contains("a part of a chain"), "{error}");
    drop(chain);
    let mut another = Chain::new();
    another.send_now(b"another");
    ring.run(&ends.0, &mut another).expect_err("the ring is of no more use");
    drop(ring);
    assert_eq!(all_of(ends), b"taken");
}

/// What waits for the other side, in such a chain, is ended and waited for: it uses memory that is
/// only borrowed.
#[test]
fn what_was_taken_of_a_chain_in_part_is_reaped() {
    let ends = UnixStream::pair().expect("sockets");
    let mut ring = ring_of(&[]);
    let mut memory = [0; 8];
    let mut chain = Chain::new();
    chain.receive(&mut memory, Until::All);
    chain.time_out(Duration::from_secs(1));
    chain.send_now(b"left");
    ring.run(&ends.0, &mut chain).expect_err("a part was taken only");
    assert_ne!(ring.results[0], -libc::ECANCELED, "the receive came to an end of its own");
}

/// A chain of which the kernel took nothing is not handed over by a later wait, when what its
/// requests point to is gone.
#[test]
fn a_wait_hands_over_nothing_that_was_refused() {
    let ends = UnixStream::pair().expect("sockets");
    let mut ring = ring_of(&[Feature::SingleIssuer]);
    let mut chain = Chain::new();
    chain.send_now(b"first");
    ring.run(&ends.0, &mut chain).expect("this thread may");
    // From another thread the kernel takes nothing, if that is not given a ring of its own.
    ring.setup.features = Features::none();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut chain = Chain::new();
            chain.send_now(b"second");
            ring.run(&ends.0, &mut chain).expect_err("this thread may not");
        });
    });
    ring.setup.features = [Feature::SingleIssuer].into_iter().collect();
    // As a zero-copy send that is under way.
    ring.issuer.as_mut().expect("it was used").account.begin(1);
    ring.await_notification(Duration::from_millis(10)).expect("a wait that is over");
    drop(ring);
    assert_eq!(all_of(ends), b"first");
}
