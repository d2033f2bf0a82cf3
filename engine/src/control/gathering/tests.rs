use std::collections::{HashSet, VecDeque};

use super::*;

const CHANNELS: u16 = 3;

/// What a sender does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Sender {
    /// It sends what is in its share.
    HasShare,
    Idle,
    /// It was asked to report when all has landed.
    Settles,
    Dead,
}

/// One channel as it is, whatever the driver knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Truth {
    sender: Sender,
    /// Whether something that it sent may yet land.
    may_land: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    gathering: Gathering,
    truth: [Truth; CHANNELS as usize],
    /// Whether the wait began with a round.
    round: bool,
    /// Whether stripes are to change hands.
    regroups: bool,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Done(u16),
    Settled(u16),
    Lost(u16),
    Closed(u16),
    AskedBack,
}

impl World {
    fn begin(round: bool, live: [bool; CHANNELS as usize]) -> Self {
        let sender = if round { Sender::HasShare } else { Sender::Settles };
        let truth = live.map(|lives| Truth {
            sender: if lives { sender } else { Sender::Dead },
            may_land: lives,
        });
        let gathering =
            if round { Gathering::of_round(live) } else { Gathering::of_landings(live) };
        Self { gathering, truth, round, regroups: false }
    }

    /// What may happen.
    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let live = self.truth.iter().filter(|truth| truth.sender != Sender::Dead).count();
        for (channel, truth) in (0..).zip(&self.truth) {
            match truth.sender {
                Sender::HasShare => events.push(Event::Done(channel)),
                Sender::Settles => events.push(Event::Settled(channel)),
                Sender::Dead if truth.may_land => events.push(Event::Closed(channel)),
                Sender::Dead | Sender::Idle => {}
            }
            // The last one ends the migration.
            if truth.sender != Sender::Dead && live > 1 {
                events.push(Event::Lost(channel));
            }
        }
        if self.gathering.may_ask_back() {
            events.push(Event::AskedBack);
        }
        events
    }

    /// Has it happen, and says what the driver is to do.
    fn after(&self, event: Event) -> (Self, Next) {
        let mut world = self.clone();
        let at = |channel: u16| usize::from(channel);
        match event {
            Event::Done(channel) => {
                world.truth[at(channel)].sender = Sender::Idle;
                assert!(world.gathering.reported(channel, Report::Done), "{self:?} {event:?}");
            }
            Event::Settled(channel) => {
                world.truth[at(channel)] = Truth { sender: Sender::Idle, may_land: false };
                assert!(world.gathering.reported(channel, Report::Settled), "{self:?} {event:?}");
            }
            Event::Lost(channel) => {
                // Whoever is lost drops its share first, and what it had sent may still land.
                world.truth[at(channel)] = Truth { sender: Sender::Dead, may_land: true };
                world.regroups = true;
                world.gathering.lost(channel);
            }
            Event::Closed(channel) => {
                world.truth[at(channel)].may_land = false;
                let truth = world.truth;
                world.gathering.closed(|channel| !truth[at(channel)].may_land);
            }
            Event::AskedBack => {
                world.regroups = true;
                world.gathering.asked_back();
            }
        }
        let next = world.gathering.next();
        if next == Next::Settle {
            for truth in world.truth.iter_mut().filter(|truth| truth.sender != Sender::Dead) {
                truth.sender = Sender::Settles;
            }
        }
        (world, next)
    }

    fn check(&self, next: Next) {
        let shares = self.truth.iter().filter(|truth| truth.sender == Sender::HasShare).count();
        let landing = self.truth.iter().filter(|truth| truth.may_land).count();
        match next {
            Next::Wait => {}
            Next::Settle => assert_eq!((shares, self.regroups, self.round), (0, true, true)),
            // Whoever is dealt a stripe is the only one whose bytes arrive there.
            Next::Lend => {
                assert_eq!((shares, landing, self.regroups, self.round), (0, 0, true, true));
            }
            Next::Deal => {
                assert_eq!((shares, landing, self.regroups, self.round), (0, 0, true, false));
            }
            Next::Home if self.round => assert_eq!((shares, self.regroups), (0, false)),
            Next::Home => assert_eq!((landing, self.regroups), (0, false)),
        }
    }
}

/// Every order of all that can happen to three channels, from every start.
#[test]
fn stripes_change_hands_only_when_all_has_landed() {
    let (mut seen, mut ends) = (HashSet::new(), HashSet::new());
    for round in [true, false] {
        for live in 1..1 << CHANNELS {
            let live = std::array::from_fn(|channel| live & (1 << channel) != 0);
            let mut todo = VecDeque::from([World::begin(round, live)]);
            while let Some(world) = todo.pop_front() {
                let events = world.events();
                assert!(!events.is_empty(), "it waits for ever: {world:?}");
                for event in events {
                    let (after, next) = world.after(event);
                    after.check(next);
                    ends.insert(next);
                    if matches!(next, Next::Wait | Next::Settle) && seen.insert(after.clone()) {
                        todo.push_back(after);
                    }
                }
            }
        }
    }
    assert_eq!(ends.len(), 5, "not all was reached: {ends:?}");
    assert!(seen.len() > 100, "{} states", seen.len());
}

/// The table in the module's documentation: of each stage what follows when a channel is lost, when shares
/// are asked back, and when all is in.
fn documented() -> Vec<Vec<&'static str>> {
    let rows =
        include_str!("../gathering.rs").lines().filter_map(|line| line.strip_prefix("//! |"));
    let cells = |row: &'static str| row.trim_end_matches('|').split('|').map(str::trim).collect();
    rows.skip(2).map(cells).collect()
}

#[test]
fn every_cell_is_as_the_table_says() {
    let stages =
        [Stage::Sending, Stage::Gathering, Stage::Settling, Stage::Landing, Stage::Regrouping];
    let mut rows = Vec::new();
    for stage in stages {
        let at = |lanes: &[Lane]| Gathering { stage, lanes: lanes.to_vec() };
        let mut lost = at(&[Lane::Due, Lane::In]);
        lost.lost(1);
        assert_eq!(lost.lanes, [Lane::Due, Lane::Closing]);

        assert!(!at(&[Lane::In]).may_ask_back());
        let mut asked = at(&[Lane::Due]);
        let mut asked_back = String::new();
        if asked.may_ask_back() {
            asked.asked_back();
            asked_back = format!("{:?}", asked.stage);
        }

        for missing in [Lane::Due, Lane::Closing] {
            let mut waits = at(&[Lane::In, missing]);
            assert_eq!((waits.next(), waits.stage), (Next::Wait, stage));
        }
        let mut all = at(&[Lane::In, Lane::Gone]);
        let mut all_in = format!("{:?}", all.next());
        if all.stage != stage {
            all_in = format!("{all_in}, {:?}", all.stage);
        }
        rows.push(vec![format!("{stage:?}"), format!("{:?}", lost.stage), asked_back, all_in]);
    }
    assert_eq!(rows, documented());
}

/// As the module's documentation draws it.
#[test]
fn a_lane_takes_only_what_is_awaited_and_once() {
    for (stage, awaited) in [
        (Stage::Sending, Report::Done),
        (Stage::Gathering, Report::Done),
        (Stage::Settling, Report::Settled),
        (Stage::Landing, Report::Settled),
        (Stage::Regrouping, Report::Settled),
    ] {
        for lane in [Lane::Due, Lane::In, Lane::Closing, Lane::Gone] {
            let one = || Gathering { stage, lanes: vec![lane] };
            for report in [Report::Done, Report::Settled] {
                let mut one = one();
                let counts = lane == Lane::Due && report == awaited;
                assert_eq!(one.reported(0, report), counts);
                assert_eq!(one.lanes, [if counts { Lane::In } else { lane }]);
            }
            let mut one = one();
            one.closed(|_| false);
            assert_eq!(one.lanes, [lane]);
            one.closed(|_| true);
            let after = if lane == Lane::Closing { Lane::Gone } else { lane };
            assert_eq!((one.lanes, one.stage), (vec![after], stage));
        }
    }
}
