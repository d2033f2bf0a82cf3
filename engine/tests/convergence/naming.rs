//! Who does not converge hears why.

use std::time::Duration;

use pageferry::Error;
use pageferry::convergence::{Policy, Term};

use crate::scene::{LIMIT, Scene, Slow};

/// It does not converge, and the error names what is slow: slower than anything a busy machine makes of
/// the rest.
fn assert_names(scene: Scene, term: Term, at_least: Duration) {
    let error = scene.play().expect_kept();
    let Error::NotConverging { at_fault, takes, expected, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*at_fault, term, "{error}");
    assert!(*takes >= at_least && *expected >= *takes, "{error}");
    assert!(error.to_string().contains(&format!("{term} takes about")), "{error}");
}

/// However little is hoped for after a load that took too long, the error names what it took.
#[test]
fn what_takes_too_long_is_named() {
    for (slow, term) in [(Slow::Load, Term::Load), (Slow::Release, Term::Release)] {
        let mut scene = Scene::new(slow, u32::MAX).on_event(|_| {});
        scene.takes = 3 * LIMIT;
        scene.source = scene.source.policy(Policy::KeepTrying).deadline(8 * LIMIT);
        assert_names(scene, term, 3 * LIMIT);
    }
}

/// A load that is not over when it is given up is as much at fault.
#[test]
fn what_goes_on_for_too_long_is_named() {
    let mut scene = Scene::new(Slow::Load, u32::MAX).on_event(|_| {});
    scene.takes = 8 * LIMIT;
    scene.source =
        scene.source.policy(Policy::KeepTrying).downtime_limit(4 * LIMIT).deadline(LIMIT);
    assert_names(scene, Term::Load, 2 * LIMIT);
}
