mod cells;

use std::num::NonZeroU64;

use super::caution::CAUTION;
use super::estimate::from_seconds;
use super::*;
use crate::machine::Rehearsal;
use crate::pages::memory::PAGE_BYTES;

const MS: Duration = Duration::from_millis(1);
const PAGES_A_GIB: u64 = 1 << 18;

fn settings(limit: Duration, policy: Policy) -> Settings {
    Settings { downtime_limit: limit, policy, ..Settings::default() }
}

/// A guest on a link of 1 GiB/s, and the machine that watches it.
struct Scene {
    convergence: Convergence,
    now: Duration,
    landed: u64,
}

impl Scene {
    fn new(settings: Settings) -> Self {
        let mut convergence = Convergence::new(settings);
        convergence.learn_round_trip(MS / 10);
        convergence.learn_harvest(MS / 10);
        let rehearsal = Rehearsal {
            state_bytes: 1 << 16,
            save: MS,
            pause: Some(MS / 10),
            resume: Some(MS / 10),
        };
        convergence.learn_rehearsal(&rehearsal);
        Self { convergence, now: Duration::ZERO, landed: 0 }
    }

    /// A round that sends so many pages, after which so many are dirty.
    fn round(&mut self, pages: u64, dirty: u64) -> Verdict {
        self.convergence.round_began(self.now, &[self.landed], pages);
        let began = self.now;
        let mut left = pages;
        while left > 0 {
            // A MiB a millisecond, near enough.
            let step = left.min(2621);
            left -= step;
            self.landed += step * PAGE_BYTES;
            self.now += from_seconds(step as f64 / PAGES_A_GIB as f64);
            self.convergence.landed(self.now, &[self.landed]);
        }
        self.now += MS;
        let took = self.now.saturating_sub(began);
        self.convergence
            .round_ended(self.now, Round { took, dirtied_for: took, dirty_pages: &[dirty] })
    }
}

#[test]
fn switches_over_when_what_remains_fits() {
    let mut scene = Scene::new(settings(300 * MS, Policy::KeepTrying));
    // 512 MiB remain: 500 ms and a little.
    let verdict = scene.round(PAGES_A_GIB, PAGES_A_GIB / 2);
    assert!(
        matches!(verdict, Verdict::Iterate { expected: Some(e) } if (500..510).contains(&e.as_millis())),
        "{verdict:?}"
    );
    // 128 MiB remain: 125 ms.
    let verdict = scene.round(PAGES_A_GIB / 2, PAGES_A_GIB / 8);
    assert!(
        matches!(verdict, Verdict::Approach { expected } if (125..132).contains(&expected.as_millis())),
        "{verdict:?}"
    );
    // Meanwhile they have become more.
    let verdict = scene.convergence.decide(scene.now, PAGES_A_GIB / 4);
    assert!(matches!(verdict, Verdict::SwitchOver { expected } if expected.as_millis() >= 250));
    let predicted = scene.convergence.prediction().expect("a prediction").total();
    assert!(predicted.upper(CAUTION) <= 300 * MS, "{predicted:?}");
    let verdict = scene.convergence.decide(scene.now, PAGES_A_GIB);
    assert!(matches!(verdict, Verdict::Iterate { .. }), "{verdict:?}");
}

#[test]
fn a_quiet_guest_is_moved_after_the_first_round() {
    let mut scene = Scene::new(settings(20 * MS, Policy::KeepTrying));
    assert!(matches!(scene.round(PAGES_A_GIB, 0), Verdict::Approach { .. }));
    assert!(matches!(scene.convergence.decide(scene.now, 0), Verdict::SwitchOver { .. }));
}

#[test]
fn an_empty_guest_is_moved_though_no_byte_ever_landed() {
    let mut scene = Scene::new(settings(20 * MS, Policy::KeepTrying));
    assert!(matches!(scene.round(0, 5), Verdict::Iterate { expected: None }));
    assert!(matches!(scene.round(0, 0), Verdict::Approach { .. }));
    assert!(matches!(scene.convergence.decide(scene.now, 0), Verdict::SwitchOver { .. }));
}

#[test]
fn a_limit_below_what_is_fixed_is_never_tried_unless_by_best_effort() {
    let mut scene = Scene::new(settings(MS, Policy::Throttle(Throttling::default())));
    for _ in 0..20 {
        assert!(matches!(scene.round(100, 0), Verdict::Iterate { .. }));
    }
    // No slower guest would help.
    assert_eq!(scene.convergence.throttle_percent(), 0);
    let wanted = Settings { bound: Bound::BestEffort, ..*scene.convergence.settings() };
    scene.convergence.set(wanted);
    assert!(matches!(scene.round(100, 0), Verdict::Approach { .. }));
    assert!(matches!(scene.convergence.decide(scene.now, 0), Verdict::SwitchOver { .. }));
}

#[test]
fn two_rounds_tell_that_it_will_not_converge() {
    let mut scene = Scene::new(settings(50 * MS, Policy::GiveUp));
    assert!(matches!(scene.round(PAGES_A_GIB, PAGES_A_GIB / 2), Verdict::Iterate { .. }));
    assert_eq!(scene.convergence.outlook(), None);
    // Twice as fast as the link.
    assert!(matches!(scene.round(PAGES_A_GIB / 2, PAGES_A_GIB / 2), Verdict::Iterate { .. }));
    let outlook = *scene.convergence.outlook().expect("two rounds");
    assert!(!outlook.meets_limit && outlook.least > 400 * MS, "{outlook:?}");
    assert!((outlook.dirty_pages_per_second / PAGES_A_GIB as f64 - 1.0).abs() < 0.05);
    assert_eq!((outlook.limit, outlook.rounds), (50 * MS, 2));
    let verdict = scene.round(PAGES_A_GIB / 2, PAGES_A_GIB / 2);
    assert!(matches!(verdict, Verdict::GiveUp { expected } if expected > 400 * MS), "{verdict:?}");
}

#[test]
fn two_rounds_tell_that_it_will() {
    let mut scene = Scene::new(settings(50 * MS, Policy::GiveUp));
    scene.round(PAGES_A_GIB, PAGES_A_GIB / 3);
    scene.round(PAGES_A_GIB / 3, PAGES_A_GIB / 9);
    let outlook = *scene.convergence.outlook().expect("two rounds");
    assert!(outlook.meets_limit && outlook.least < 20 * MS, "{outlook:?}");
}

#[test]
fn a_guest_too_fast_is_slowed_down_step_by_step() {
    let mut scene = Scene::new(settings(50 * MS, Policy::Throttle(Throttling::default())));
    let mut seen = Vec::new();
    let mut dirty = PAGES_A_GIB / 2;
    for _ in 0..30 {
        let verdict = scene.round(dirty, dirty);
        if seen.last() != Some(&scene.convergence.throttle_percent()) {
            seen.push(scene.convergence.throttle_percent());
        }
        if let Verdict::Approach { .. } = verdict {
            break;
        }
        // From 60 % on it is slower than the link.
        if scene.convergence.throttle_percent() >= 60 {
            dirty /= 2;
        }
    }
    assert_eq!(seen[..6], [0, 20, 30, 40, 50, 60], "{seen:?}");
    let verdict = scene.convergence.decide(scene.now, dirty / 8);
    assert!(matches!(verdict, Verdict::SwitchOver { .. }), "{verdict:?}");
}

#[test]
fn post_copy_is_asked_for_when_pre_copy_will_not_do() {
    let mut scene = Scene::new(settings(50 * MS, Policy::PostCopy));
    let dirty = PAGES_A_GIB / 2;
    let verdicts: Vec<_> = (0..3).map(|_| scene.round(dirty, dirty)).collect();
    assert!(matches!(verdicts[2], Verdict::PostCopy { .. }), "{verdicts:?}");
}

#[test]
fn trying_ends_at_the_deadline_or_after_the_last_round() {
    let dirty = PAGES_A_GIB / 2;
    let deadline = Some(Duration::from_secs(2));
    let wanted = Settings { deadline, ..settings(50 * MS, Policy::KeepTrying) };
    let mut scene = Scene::new(wanted);
    let rounds = (0..100).position(|_| matches!(scene.round(dirty, dirty), Verdict::GiveUp { .. }));
    // One that took 1 s, and those of 0.5 s that fit into 2 s.
    assert!(matches!(rounds, Some(3..=5)), "{rounds:?}");
    let wanted = Settings { max_rounds: 2, ..settings(50 * MS, Policy::KeepTrying) };
    let mut scene = Scene::new(wanted);
    assert!(matches!(scene.round(dirty, dirty), Verdict::Iterate { .. }));
    assert!(matches!(scene.round(dirty, dirty), Verdict::GiveUp { .. }));
}

#[test]
fn a_raised_limit_counts_from_the_next_decision_on() {
    let mut scene = Scene::new(settings(50 * MS, Policy::KeepTrying));
    let dirty = PAGES_A_GIB / 2;
    scene.round(dirty, dirty);
    assert!(matches!(scene.round(dirty, dirty), Verdict::Iterate { .. }));
    scene.convergence.set(settings(2000 * MS, Policy::KeepTrying));
    assert!(matches!(scene.round(dirty, dirty), Verdict::Approach { .. }));
}

#[test]
fn what_was_called_off_makes_careful_and_waiting_makes_bold() {
    let mut scene = Scene::new(settings(100 * MS, Policy::KeepTrying));
    scene.round(PAGES_A_GIB, PAGES_A_GIB / 4);
    // 90 ms expected, with an uncertainty of a few.
    let pages = PAGES_A_GIB * 86 / 1024;
    assert!(matches!(scene.convergence.decide(scene.now, pages), Verdict::SwitchOver { .. }));
    for _ in 0..3 {
        scene.convergence.called_off(scene.now);
    }
    let pages = PAGES_A_GIB * 96 / 1024;
    scene.now += Duration::from_secs(10);
    let mut declined = 0;
    while !matches!(scene.convergence.decide(scene.now, pages), Verdict::SwitchOver { .. }) {
        declined += 1;
        scene.now += 100 * MS;
        assert!(declined < 30, "{scene:?}", scene = scene.convergence);
    }
    assert!(declined > 0);
}

#[test]
fn time_is_reserved_for_what_follows() {
    let mut scene = Scene::new(settings(100 * MS, Policy::KeepTrying));
    scene.round(PAGES_A_GIB, PAGES_A_GIB / 4);
    scene.convergence.decide(scene.now, 1000);
    let (after_pages, after_commit) =
        (scene.convergence.after_pages(), scene.convergence.after_commit());
    assert!(after_pages >= after_commit && after_commit > Duration::ZERO);
    assert!(after_pages < 10 * MS, "{after_pages:?}");
}

#[test]
fn short_rounds_are_followed_by_a_rest() {
    let convergence = Convergence::new(Settings::default());
    assert_eq!(convergence.rest(MS), 4 * MS);
    assert_eq!(convergence.rest(50 * MS), Duration::ZERO);
}

#[test]
fn what_is_called_off_again_and_again_is_tried_less_often_and_given_up_at_the_deadline() {
    let deadline = Some(Duration::from_secs(30));
    let mut scene = Scene::new(Settings { deadline, ..settings(300 * MS, Policy::KeepTrying) });
    let mut at = Vec::new();
    loop {
        match scene.round(PAGES_A_GIB / 16, 1000) {
            Verdict::GiveUp { .. } => break,
            Verdict::Approach { .. } => {
                let verdict = scene.convergence.decide(scene.now, 1000);
                assert!(matches!(verdict, Verdict::SwitchOver { .. }), "{verdict:?}");
                // The destination takes for ever.
                scene.convergence.learn_load(Duration::from_secs(2));
                scene.convergence.called_off(scene.now);
                at.push(scene.now);
            }
            Verdict::Iterate { .. } => {}
            verdict => panic!("{verdict:?}"),
        }
    }
    // After 1.2 s, 2.4 s, 4.8 s, 9.6 s, 10 s and a little each.
    assert!((5..=6).contains(&at.len()), "{at:?}");
    let waits: Vec<_> = at.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
    assert!(waits.windows(2).all(|pair| pair[1] > pair[0]), "{waits:?}");
}

/// A switchover under a bandwidth limit is the only time that shows the link without it.
#[test]
fn what_a_switchover_alone_has_shown_is_not_believed_at_once_and_never_for_good() {
    const GIB: u64 = 1 << 30;
    let throttled = Policy::Throttle(Throttling::default());
    let mut scene = Scene::new(settings(200 * MS, throttled));
    let limit = NonZeroU64::new(GIB);
    scene.convergence.set_bandwidth_limit(limit);
    // By the limit what is dirty takes 500 ms. In a switchover it would take half.
    let dirty = PAGES_A_GIB / 2;
    let mut pages = PAGES_A_GIB;
    let mut throttled_at = Vec::new();
    for tried in 0..6 {
        let mut rounds = 0;
        while !matches!(scene.round(pages, dirty), Verdict::Approach { .. }) {
            pages = dirty;
            rounds += 1;
            assert!(rounds < 100, "after {tried} nothing is tried any more");
        }
        throttled_at.push(scene.convergence.throttle_percent() > 0);
        // On a bad day: a little more than the limit lets through, and what would be left is too little.
        scene.convergence.set_bandwidth_limit(None);
        scene.convergence.round_began(scene.now, &[scene.landed], dirty);
        for _ in 0..4 {
            scene.now += 50 * MS;
            scene.landed += GIB / 18;
            scene.convergence.landed(scene.now, &[scene.landed]);
        }
        scene.convergence.set_bandwidth_limit(limit);
        scene.convergence.called_off(scene.now);
    }
    assert_eq!(throttled_at[..3], [false; 3], "{throttled_at:?}");
    assert!(throttled_at[5], "{throttled_at:?}");
}
