//! What does not fit, or makes no sense, is refused before a page moves.

use std::thread;

use pageferry::dirty::DirtySources;
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::OneLink;
use pageferry::{Blame, Source};

use crate::scene::{Scene, WORKING_SET};
use crate::support::TestMachine;

#[test]
fn different_memory_is_refused_before_a_page_moves() {
    let mut scene = Scene::new();
    scene.there = TestMemory::new(&[3000]);
    let (error, theirs) = scene.play(|link| link).expect_kept();
    assert!(error.to_string().contains("memory maps differ"), "{error}");
    assert_eq!(theirs.unwrap().blame(), Blame::PeerIncompatible);
}

#[test]
fn too_many_channels_are_refused() {
    let mut scene = Scene::new();
    scene.destination = scene.destination.most_channels(2);
    let (error, _) = scene.play(|link| link).expect_kept();
    assert!(error.to_string().contains("3 data channels wanted, 1 to 2"), "{error}");
}

#[test]
fn a_senseless_configuration_is_refused() {
    for source in [Source::new().channels(0), Source::new().max_rounds(0)] {
        let mut scene = Scene::new();
        scene.source = source;
        let (error, _) = scene.play(|link| link).expect_kept();
        assert_eq!(error.blame(), Blame::Configuration);
    }
}

#[test]
fn a_declined_offer_leaves_the_guest_at_the_source() {
    let Scene { here, log, source, destination, .. } = Scene::new();
    let (source_link, destination_link) = memory_transport::pair();
    let machine = TestMachine::new(&here, &log, WORKING_SET, 1);
    let failure = thread::scope(|scope| {
        scope.spawn(|| {
            let offer =
                destination.negotiate(OneLink::destination(Box::new(destination_link))).unwrap();
            assert_eq!(offer.description(), b"a machine");
            assert_eq!(offer.layout(), here.memory().layout());
            offer.decline("no room");
        });
        let source = source.description(b"a machine".to_vec());
        source
            .migrate(
                machine,
                here.memory(),
                DirtySources::new(vec![]),
                OneLink::source(Box::new(source_link)),
            )
            .expect_err("declined")
    });
    assert!(failure.error.to_string().contains("no room"), "{}", failure.error);
}
