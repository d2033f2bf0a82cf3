//! What may be changed on the way, and what is refused before anything moves.

use std::num::{NonZeroU16, NonZeroU64};

use pageferry::convergence::Policy;
use pageferry::dirty::DirtySources;
use pageferry::testing::memory_transport;
use pageferry::transport::OneLink;
use pageferry::{Error, Event, GuestAtSource, Machine};

use crate::scene::{Scene, Slow, WORKING_SET};
use crate::support::TestMachine;

#[test]
fn channels_can_be_given_up_and_taken_back_in_the_middle_of_a_round() {
    let mut scene = Scene::new(Slow::Save, 0);
    scene.source = scene.source.channels(4);
    let handle = scene.source.handle();
    handle.use_channels(NonZeroU16::new(2).unwrap());
    handle.limit_bandwidth(NonZeroU64::new(16 << 20));
    let mut dealt = 0;
    let scene = scene.on_event(move |event| {
        if let Event::Rebalanced { .. } = event {
            dealt += 1;
            let channels = if dealt == 1 { 1 } else { 4 };
            handle.use_channels(NonZeroU16::new(channels).unwrap());
        }
    });
    let outcome = scene.play();
    let weights: Vec<_> = outcome
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Rebalanced { weights } => Some(weights.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(weights[..3], [vec![1, 1, 0, 0], vec![1, 0, 0, 0], vec![1, 1, 1, 1]]);
    outcome.expect_moved();
}

#[test]
fn post_copy_is_refused_before_anything_moves() {
    let mut scene = Scene::new(Slow::Save, 0);
    let refused = scene.source.handle().set_policy(Policy::PostCopy);
    assert!(matches!(refused, Err(Error::Unsupported("post-copy"))));
    scene.source = scene.source.policy(Policy::PostCopy);
    let (source_link, _destination_link) = memory_transport::pair();
    let mut machine = TestMachine::new(&scene.here, &scene.log, WORKING_SET, 1);
    machine.resume().unwrap();
    let sources = DirtySources::new(vec![]);
    let failure = scene
        .source
        .migrate(machine, scene.here.memory(), sources, OneLink::source(Box::new(source_link)))
        .map(drop)
        .expect_err("refused");
    assert!(matches!(failure.error, Error::Unsupported("post-copy")), "{}", failure.error);
    assert!(matches!(failure.guest, GuestAtSource::Running));
    assert!(failure.machine.is_running());
}
