//! Every cell of the [table](table) by a migration that gets there.

use super::*;
use crate::control::convergence::table::{self, Asked, Prospect, Sight, Stage, Step};

const GIB: NonZeroU64 = NonZeroU64::new(1 << 30).unwrap();

/// A migration before the round after which that is seen; the pages of the round, and those after it.
fn before(seen: Sight) -> (Scene, u64, u64) {
    let mut scene = Scene::new(settings(300 * MS, Policy::KeepTrying));
    let half = PAGES_A_GIB / 2;
    match seen {
        Sight::Unknown => return (scene, 0, 5),
        Sight::Fits => return (scene, PAGES_A_GIB, 100),
        Sight::Close => {
            // Stopping it takes no time as a rule, and did so once.
            (0..15).for_each(|_| scene.convergence.learn_pause(MS / 10));
            scene.convergence.learn_pause(2000 * MS);
            return (scene, PAGES_A_GIB, 100);
        }
        Sight::Far => {
            scene.convergence.learn_load(400 * MS);
            return (scene, PAGES_A_GIB, half);
        }
        Sight::Stuck => {
            scene.convergence.learn_load(400 * MS);
            scene.round(PAGES_A_GIB, half);
        }
        Sight::Unseen => {
            // So much that twice what was assumed of the link is not enough either.
            scene.convergence.set_bandwidth_limit(Some(GIB));
            scene.round(PAGES_A_GIB, 2 * PAGES_A_GIB);
            return (scene, 2 * PAGES_A_GIB, 2 * PAGES_A_GIB);
        }
        Sight::Glimpsed => {
            scene.convergence.set_bandwidth_limit(Some(GIB));
            scene.round(PAGES_A_GIB, half);
            // The link for a moment, and it is no better.
            scene.convergence.set_bandwidth_limit(None);
            for _ in 0..4 {
                scene.now += 50 * MS;
                scene.landed += GIB.get() / 20;
                scene.convergence.landed(scene.now, &[scene.landed]);
            }
            scene.convergence.set_bandwidth_limit(Some(GIB));
        }
    }
    (scene, half, half)
}

/// Has it stand there.
fn bring(scene: &mut Scene, stage: Stage) {
    // Whoever became bolder just now does not at once again.
    scene.now += 100 * MS;
    if matches!(stage, Stage::BackingOff | Stage::Retrying | Stage::Over) {
        scene.convergence.called_off(scene.now);
    }
    match stage {
        Stage::Untried | Stage::BackingOff => {}
        Stage::Retrying => scene.now += Duration::from_secs(11),
        // The host is not asked: with other settings all is looked at anew.
        Stage::LastTry | Stage::Over => scene.convergence.settings.max_rounds = 1,
    }
}

/// What may change but for what is learned of a round.
fn effects(convergence: &Convergence) -> [String; 3] {
    let Convergence { caution, link, terms, .. } = convergence;
    [format!("{caution:?}"), format!("{link:?}"), format!("{terms:?}")]
}

fn assert_is(verdict: Verdict, step: Step, cell: &str) {
    let is_so = match step {
        Step::Iterate | Step::Embolden | Step::Hope => matches!(verdict, Verdict::Iterate { .. }),
        Step::Approach => matches!(verdict, Verdict::Approach { .. }),
        Step::SwitchOver => matches!(verdict, Verdict::SwitchOver { .. }),
        Step::GiveUp => matches!(verdict, Verdict::GiveUp { .. }),
    };
    assert!(is_so, "{cell}: {verdict:?} is not {step:?}");
}

#[test]
fn every_cell_is_what_a_migration_does_there() {
    for seen in [
        Sight::Unknown,
        Sight::Fits,
        Sight::Close,
        Sight::Far,
        Sight::Unseen,
        Sight::Glimpsed,
        Sight::Stuck,
    ] {
        for stage in
            [Stage::Untried, Stage::BackingOff, Stage::Retrying, Stage::LastTry, Stage::Over]
        {
            after_a_round(seen, stage);
            on_the_count(seen, stage);
        }
    }
}

fn after_a_round(seen: Sight, stage: Stage) {
    let cell = format!("{seen:?} after a round, {stage:?}");
    let (mut scene, pages, dirty) = before(seen);
    bring(&mut scene, stage);
    scene.convergence.prospect = Prospect::HopelessOnce;
    let verdict = scene.round(pages, dirty);
    let step = table::step(seen, Asked::AfterRound, stage);
    assert_is(verdict, step, &cell);
    let expected = match (seen, step) {
        (_, Step::Approach | Step::GiveUp) => Prospect::HopelessOnce,
        // What fits where another must wait.
        (Sight::Fits, _) => Prospect::HopelessOnce.after(Sight::Close),
        (seen, _) => Prospect::HopelessOnce.after(seen),
    };
    assert_eq!(scene.convergence.prospect, expected, "{cell}");
}

fn on_the_count(seen: Sight, stage: Stage) {
    let cell = format!("{seen:?} on the count, {stage:?}");
    let (mut scene, pages, dirty) = before(seen);
    scene.round(pages, dirty);
    bring(&mut scene, stage);
    assert_eq!(scene.convergence.stage(scene.now), stage, "{cell}");
    if let Some(prediction) = scene.convergence.predict(scene.now, dirty) {
        let looked = scene.convergence.look(Asked::OnCount, stage, &prediction, dirty);
        assert_eq!(looked, seen, "{cell}");
    }
    let (was, prospect) = (effects(&scene.convergence), scene.convergence.prospect);
    let verdict = scene.convergence.decide(scene.now, dirty);
    let step = table::step(seen, Asked::OnCount, stage);
    assert_is(verdict, step, &cell);
    let is = effects(&scene.convergence);
    let [caution, link, terms] = [0, 1, 2].map(|part| is[part] != was[part]);
    assert_eq!(caution, step == Step::Embolden, "{cell}: {is:?}");
    // Of a link that only switchovers show more is hoped, else that the destination was slow for once.
    let hopes = step == Step::Hope;
    assert_eq!(terms, hopes && matches!(seen, Sight::Far | Sight::Stuck), "{cell}: {is:?}");
    let assumes = seen == Sight::Unseen && step != Step::GiveUp;
    assert_eq!(link, assumes || (hopes && seen == Sight::Glimpsed), "{cell}: {is:?}");
    let goes_on = !matches!(step, Step::GiveUp | Step::SwitchOver);
    let expected = if goes_on { prospect.after(seen) } else { prospect };
    assert_eq!(scene.convergence.prospect, expected, "{cell}");
}
