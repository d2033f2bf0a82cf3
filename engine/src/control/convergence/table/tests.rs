//! The module's documentation has each table once more, for who reads. They are the same, cell by cell.

use std::fmt::Debug;

use super::*;
use crate::control::convergence::Throttling;

const STAGES: [Stage; 5] =
    [Stage::Untried, Stage::BackingOff, Stage::Retrying, Stage::LastTry, Stage::Over];
const PROSPECTS: [Prospect; 3] = [Prospect::Open, Prospect::HopelessOnce, Prospect::Hopeless];
const SEEN: [Sight; 7] = [
    Sight::Unknown,
    Sight::Fits,
    Sight::Close,
    Sight::Far,
    Sight::Unseen,
    Sight::Glimpsed,
    Sight::Stuck,
];

/// The documented table whose columns have these names, without them.
fn documented(columns: &[&str]) -> Vec<Vec<&'static str>> {
    let lines = include_str!("../table.rs").lines();
    let rows = lines.map(|line| -> Vec<_> {
        let row = line.strip_prefix("//! |").and_then(|row| row.strip_suffix('|'));
        row.map(|row| row.split('|').map(str::trim).collect()).unwrap_or_default()
    });
    let rows = rows.skip_while(|row| row != columns).skip(2);
    rows.take_while(|row| !row.is_empty()).collect()
}

fn named<T: Debug>(values: &[T]) -> Vec<String> {
    values.iter().map(|value| format!("{value:?}")).collect()
}

#[test]
fn every_step_is_as_documented() {
    let mut expected = Vec::new();
    for seen in SEEN {
        let row = |asked| STAGES.map(|stage| step(seen, asked, stage));
        let [after_round, on_count] = [Asked::AfterRound, Asked::OnCount].map(row);
        let whens = if matches!(seen, Sight::Unknown | Sight::Fits) {
            vec![("after a round", after_round), ("on the count", on_count)]
        } else {
            assert_eq!(after_round, on_count, "{seen:?}");
            vec![("either", on_count)]
        };
        for (when, steps) in whens {
            expected.push([vec![format!("{seen:?}"), when.to_owned()], named(&steps)].concat());
        }
    }
    let head = [vec!["seen".to_owned(), "asked".to_owned()], named(&STAGES)].concat();
    let head: Vec<_> = head.iter().map(String::as_str).collect();
    assert_eq!(documented(&head), expected);
}

#[test]
fn every_prospect_is_as_documented() {
    let row = |seen: Sight| {
        let after = PROSPECTS.map(|prospect| prospect.after(seen));
        [vec![format!("{seen:?}")], named(&after)].concat()
    };
    let head = ["seen", "Open", "HopelessOnce", "Hopeless"];
    assert_eq!(documented(&head), SEEN.map(row));
}

#[test]
fn every_consequence_is_as_documented() {
    let policies = [
        Policy::KeepTrying,
        Policy::Throttle(Throttling::default()),
        Policy::PostCopy,
        Policy::GiveUp,
    ];
    let row = |prospect: Prospect| {
        let consequences = policies.map(|policy| consequence(prospect, policy));
        [vec![format!("{prospect:?}")], named(&consequences)].concat()
    };
    let head = ["prospect", "KeepTrying", "Throttle", "PostCopy", "GiveUp"];
    assert_eq!(documented(&head), PROSPECTS.map(row));
}

#[test]
fn a_stage_is_what_was_tried_and_whether_there_is_time() {
    for backs_off in [false, true] {
        assert_eq!(Stage::of(false, backs_off, false), Stage::Untried);
        assert_eq!(Stage::of(false, backs_off, true), Stage::LastTry);
        assert_eq!(Stage::of(true, backs_off, true), Stage::Over);
    }
    assert_eq!(Stage::of(true, true, false), Stage::BackingOff);
    assert_eq!(Stage::of(true, false, false), Stage::Retrying);
}
