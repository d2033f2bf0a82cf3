//! Every interleaving of both machines, with a link that may break at any point and be made anew, a crash of either
//! side and the end of its patience at every step.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Wire {
    Prepare(u32),
    Prepared(u32),
    CalledOff(u32),
    Commit,
    Resumed,
    GaveBack,
    SourceFailed,
    DestinationFailed,
    Rejoin { attempt: u32, committed: bool },
    Rejoined,
}

/// Switchovers that are explored, all but the last of which may be called off.
const ATTEMPTS: u32 = 3;

/// How often a link is lost.
const LOSSES: u32 = 2;

/// What is explored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Rules {
    /// Whether links are made anew.
    rejoins: bool,
    /// Whether sides fail, crash or lose patience.
    fails: bool,
    plant: Option<Plant>,
}

/// A fault that is planted, which a property finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Plant {
    /// A source that lost the link after its commit says that it goes on.
    ForgetsItsCommit,
    /// A source takes word of what was loaded for a switchover that it called off as word of the one after.
    BelievesALateLoad,
    /// A destination that has a guest loaded keeps it so when the source comes back with a running one.
    StaysPrepared,
    /// A destination whose guest runs does not say so when it is asked.
    IsSilent,
    /// What was on its way over the lost link comes after all.
    DeliversLate,
    /// A source that lost the link while its guest was paused lets it stand.
    LeavesItPaused,
}

/// Both machines, what is under way between them, and whether the link lives. A broken link
/// delivers nothing any more; each side notices in its own time.
#[expect(clippy::struct_excessive_bools, reason = "independent facts of the world")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    rules: Rules,
    source: SourceHandover,
    destination: DestinationHandover,
    to_destination: VecDeque<Wire>,
    to_source: VecDeque<Wire>,
    link: bool,
    losses: u32,
    /// Which sides know that it is lost, and make or await another one.
    source_waits: bool,
    destination_waits: bool,
    /// The source has asked and was not answered: it does nothing else.
    source_asks: bool,
    source_crashed: bool,
    destination_crashed: bool,
    source_runs: bool,
    destination_runs: bool,
    prepare_sent: bool,
    /// The switchover that the destination has the state of.
    loaded: u32,
    refused: bool,
}

impl World {
    fn start(rules: Rules) -> Self {
        Self {
            rules,
            source: SourceHandover::default(),
            destination: DestinationHandover::default(),
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            link: true,
            losses: 0,
            source_waits: false,
            destination_waits: false,
            source_asks: false,
            source_crashed: false,
            destination_crashed: false,
            source_runs: true,
            destination_runs: false,
            prepare_sent: false,
            loaded: 0,
            refused: false,
        }
    }

    fn has(&self, plant: Plant) -> bool {
        self.rules.plant == Some(plant)
    }

    /// Whether a side has failed: it no longer listens to what was under way.
    fn over(&self) -> bool {
        matches!(self.source.state(), SourceState::Kept | SourceState::Uncertain)
            || matches!(
                self.destination.state(),
                DestinationState::Discarded | DestinationState::Uncertain
            )
    }

    /// Whether the source is through: it makes no links any more.
    fn source_is_through(&self) -> bool {
        self.source_crashed
            || matches!(
                self.source.state(),
                SourceState::HandedOver | SourceState::Kept | SourceState::Uncertain
            )
    }

    /// Whether the destination is.
    fn destination_is_through(&self) -> bool {
        self.destination_crashed
            || matches!(
                self.destination.state(),
                DestinationState::Discarded | DestinationState::Uncertain
            )
    }

    fn send_to_destination(&mut self, message: Wire) {
        if self.link {
            self.to_destination.push_back(message);
        }
    }

    fn send_to_source(&mut self, message: Wire) {
        if self.link {
            self.to_source.push_back(message);
        }
    }

    fn lose_link(&mut self) {
        self.link = false;
        if !self.has(Plant::DeliversLate) {
            self.to_destination.clear();
        }
        self.to_source.clear();
        self.source_asks = false;
    }

    fn source(&mut self, input: SourceInput) {
        match self.source.handle(input) {
            SourceAction::Nothing | SourceAction::Finish | SourceAction::ReportUncertain => {}
            SourceAction::SendCommit => self.send_to_destination(Wire::Commit),
            SourceAction::SendCalledOff(attempt) => {
                self.send_to_destination(Wire::CalledOff(attempt));
            }
            SourceAction::KeepGuest => {
                self.send_to_destination(Wire::SourceFailed);
                self.source_runs = true;
            }
            SourceAction::Refuse => self.refused |= !self.over(),
        }
    }

    fn destination(&mut self, input: DestinationInput) {
        let mut handled = self.destination;
        let mut action = handled.handle(input);
        if let DestinationInput::Returned { committed, .. } = input {
            match (self.destination.state(), committed) {
                (DestinationState::Prepared, false) if self.has(Plant::StaysPrepared) => {
                    (handled, action) = (self.destination, DestinationAction::Nothing);
                }
                (DestinationState::Running, true) if self.has(Plant::IsSilent) => {
                    action = DestinationAction::Nothing;
                }
                _ => {}
            }
        }
        self.destination = handled;
        match action {
            DestinationAction::Nothing
            | DestinationAction::ReportUncertain
            | DestinationAction::ResumeGuest => {}
            DestinationAction::SendPrepared(attempt) => {
                self.loaded = attempt;
                self.send_to_source(Wire::Prepared(attempt));
            }
            DestinationAction::SendResumed => {
                self.destination_runs = true;
                self.send_to_source(Wire::Resumed);
            }
            DestinationAction::SendGaveBack => self.send_to_source(Wire::GaveBack),
            DestinationAction::Unload => self.loaded = 0,
            DestinationAction::Discard => self.send_to_source(Wire::DestinationFailed),
            DestinationAction::Refuse => self.refused |= !self.over(),
        }
    }

    /// The source notices that the link is lost.
    fn source_notices(&mut self) {
        self.source_waits = true;
        if self.source.state() == SourceState::Stopped && !self.has(Plant::LeavesItPaused) {
            self.source_runs = true;
            self.source(SourceInput::CalledOff);
        }
    }

    /// The source makes another link, on which the destination waits.
    fn rejoin(&mut self) {
        (self.link, self.source_waits, self.destination_waits) = (true, false, false);
        self.source_asks = true;
        let committed = self.source.state() == SourceState::Committed;
        let committed = committed && !self.has(Plant::ForgetsItsCommit);
        let attempt = self.source.attempt();
        if !committed && self.source.state() == SourceState::Committed {
            self.source_runs = true;
        }
        self.send_to_destination(Wire::Rejoin { attempt, committed });
    }

    fn destination_hears(&mut self, message: Wire) {
        match message {
            Wire::Prepare(attempt) => self.destination(DestinationInput::Loaded { attempt }),
            Wire::CalledOff(attempt) => self.destination(DestinationInput::CalledOff { attempt }),
            Wire::Commit => self.destination(DestinationInput::Commit),
            Wire::Rejoin { attempt, committed } => {
                self.send_to_source(Wire::Rejoined);
                self.destination(DestinationInput::Returned { attempt, committed });
            }
            _ => self.destination(DestinationInput::SourceFailed),
        }
    }

    fn source_hears(&mut self, message: Wire) {
        match message {
            Wire::Prepared(attempt) => {
                let believed = self.has(Plant::BelievesALateLoad)
                    && self.source.state() == SourceState::Stopped;
                let attempt = if believed { self.source.attempt() } else { attempt };
                self.source(SourceInput::Prepared { attempt });
            }
            Wire::Resumed => self.source(SourceInput::Resumed),
            Wire::GaveBack => self.source(SourceInput::GaveBack),
            Wire::Rejoined => self.source_asks = false,
            _ => self.source(SourceInput::Failed),
        }
    }

    /// Every world one step further.
    fn next(&self) -> Vec<Self> {
        let mut worlds = Vec::new();
        let mut step = |change: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            change(&mut world);
            worlds.push(world);
        };
        let source_acts = !self.source_crashed && !self.source_waits && !self.source_asks;
        match self.source.state() {
            SourceState::Running if source_acts && self.source.attempt() < ATTEMPTS => step(&|w| {
                w.source(SourceInput::Paused);
                w.source_runs = false;
                w.prepare_sent = false;
            }),
            SourceState::Stopped if source_acts => {
                if !self.prepare_sent {
                    step(&|w| {
                        w.send_to_destination(Wire::Prepare(w.source.attempt()));
                        w.prepare_sent = true;
                    });
                }
                // At any moment until the commit, and the guest runs before anyone hears of it.
                if self.source.attempt() < ATTEMPTS {
                    step(&|w| {
                        w.source_runs = true;
                        w.source(SourceInput::CalledOff);
                    });
                }
            }
            _ => {}
        }
        if self.rules.fails {
            // Cancel, timeout or local failure may come at any time, on either side; and its sudden end.
            if !self.source_crashed {
                step(&|w| w.source(SourceInput::Failed));
                step(&|w| {
                    (w.source_crashed, w.source_runs) = (true, false);
                    w.lose_link();
                });
            }
            if !self.destination_crashed {
                step(&|w| w.destination(DestinationInput::Failed));
                step(&|w| {
                    (w.destination_crashed, w.destination_runs) = (true, false);
                    w.lose_link();
                });
            }
        }
        if self.destination.state() == DestinationState::Owner && !self.destination_crashed {
            step(&|w| w.destination(DestinationInput::Resumed));
            step(&|w| w.destination(DestinationInput::ResumeFailed));
        }
        if self.link && self.losses < LOSSES {
            step(&|w| {
                w.losses += 1;
                w.lose_link();
            });
        }
        if !self.link && self.rules.rejoins {
            if !self.source_is_through() && !self.source_waits {
                step(&Self::source_notices);
            }
            // One that takes a guest over does nothing else until that is settled.
            let takes_over = self.destination.state() == DestinationState::Owner;
            if !self.destination_is_through() && !self.destination_waits && !takes_over {
                step(&|w| w.destination_waits = true);
            }
            let both = self.source_waits && self.destination_waits;
            if both && !self.source_is_through() && !self.destination_is_through() {
                step(&Self::rejoin);
            }
        }
        if self.link || self.has(Plant::DeliversLate) {
            if !self.to_destination.is_empty() && !self.destination_crashed {
                step(&|w| {
                    if let Some(message) = w.to_destination.pop_front() {
                        w.destination_hears(message);
                    }
                });
            }
            if !self.to_source.is_empty() && !self.source_crashed {
                step(&|w| {
                    if let Some(message) = w.to_source.pop_front() {
                        w.source_hears(message);
                    }
                });
            }
        }
        worlds.retain(|world| world != self);
        worlds
    }

    fn is_uncertain(&self) -> bool {
        self.source.state() == SourceState::Uncertain
            || self.destination.state() == DestinationState::Uncertain
    }

    /// What must hold in every world.
    fn check(&self) -> Result<(), &'static str> {
        if self.source_runs && self.destination_runs {
            return Err("two guests");
        }
        // Between two honest sides no message is out of place.
        if self.refused {
            return Err("a message was refused");
        }
        if self.destination_runs && self.loaded != self.source.attempt() {
            return Err("it runs without its state");
        }
        let gave_up = matches!(self.source.state(), SourceState::Uncertain);
        if gave_up && self.destination.state() == DestinationState::Receiving {
            return Err("uncertain, and nothing was committed");
        }
        Ok(())
    }

    /// What must hold where nothing happens any more.
    fn check_end(&self) -> Result<(), &'static str> {
        let runs = self.source_runs || self.destination_runs;
        let crashed = self.source_crashed || self.destination_crashed;
        if !runs && !crashed && !self.is_uncertain() {
            return Err("no guest, and nobody says so");
        }
        if !self.rules.fails && self.is_uncertain() {
            return Err("uncertain, though both sides wait for as long as it takes");
        }
        if !self.rules.fails && self.source.state() == SourceState::Committed {
            return Err("it does not know in the end");
        }
        let committed = self.destination.state() == DestinationState::Running;
        if self.destination_crashed && !committed && !self.source_crashed && !runs {
            let at_source = self.source.state();
            if !matches!(at_source, SourceState::Uncertain | SourceState::HandedOver) {
                return Err("a crash before the commit took the guest away");
            }
        }
        Ok(())
    }
}

/// What an exploration has seen.
struct Explored {
    worlds: HashSet<World>,
    ends: HashSet<(SourceState, DestinationState)>,
    /// What does not hold, and where that was seen first.
    broken: BTreeMap<&'static str, World>,
}

fn explore(rules: Rules) -> Explored {
    let start = World::start(rules);
    let mut worlds = HashSet::from([start.clone()]);
    let (mut ends, mut broken) = (HashSet::new(), BTreeMap::new());
    let mut todo = vec![start];
    // Backwards, to see whether each gets to an end.
    let mut before: HashMap<World, Vec<World>> = HashMap::new();
    let mut ended = Vec::new();
    while let Some(world) = todo.pop() {
        let next = world.next();
        let end = if next.is_empty() { world.check_end() } else { Ok(()) };
        if let Err(what) = world.check().and(end) {
            broken.entry(what).or_insert(world);
            continue;
        }
        if next.is_empty() {
            ends.insert((world.source.state(), world.destination.state()));
            ended.push(world.clone());
        }
        for next in next {
            before.entry(next.clone()).or_default().push(world.clone());
            if worlds.insert(next.clone()) {
                todo.push(next);
            }
        }
    }
    let mut gets_to_an_end = HashSet::new();
    while let Some(world) = ended.pop() {
        if gets_to_an_end.insert(world.clone()) {
            ended.extend(before.remove(&world).unwrap_or_default());
        }
    }
    if broken.is_empty()
        && let Some(world) = worlds.iter().find(|world| !gets_to_an_end.contains(*world))
    {
        broken.insert("it never ends", world.clone());
    }
    Explored { worlds, ends, broken }
}

fn explore_without_a_fault(rejoins: bool, fails: bool) -> Explored {
    let explored = explore(Rules { rejoins, fails, plant: None });
    assert!(explored.broken.is_empty(), "{:#?}", explored.broken);
    eprintln!(
        "explored {} worlds: links made anew {rejoins}, failures {fails}",
        explored.worlds.len()
    );
    explored
}

#[test]
fn never_two_guests_and_never_none_without_saying_so() {
    for rejoins in [false, true] {
        let Explored { worlds, ends, .. } = explore_without_a_fault(rejoins, true);
        // The exploration reached what it is about, also after switchovers that were called off.
        for attempt in 1..=ATTEMPTS {
            assert!(worlds.iter().any(|world| world.destination_runs
                && world.source.attempt() == attempt
                && world.source.state() == SourceState::HandedOver));
        }
        for end in [
            (SourceState::HandedOver, DestinationState::Running),
            (SourceState::Kept, DestinationState::Discarded),
            (SourceState::Kept, DestinationState::GaveBack),
            (SourceState::Uncertain, DestinationState::Running),
            (SourceState::Kept, DestinationState::Uncertain),
        ] {
            assert!(ends.contains(&end), "never got to {end:?}");
        }
        assert!(worlds.len() > 50, "{} worlds", worlds.len());
    }
}

#[test]
fn who_waits_for_as_long_as_it_takes_is_never_uncertain() {
    let certain = [
        (SourceState::HandedOver, DestinationState::Running),
        (SourceState::Kept, DestinationState::GaveBack),
        // After the last switchover that is explored.
        (SourceState::Running, DestinationState::Receiving),
    ];
    assert_eq!(explore_without_a_fault(true, false).ends, HashSet::from(certain));
}

#[test]
fn each_planted_fault_is_found() {
    for (plant, found) in [
        (Plant::ForgetsItsCommit, "two guests"),
        (Plant::BelievesALateLoad, "a message was refused"),
        (Plant::StaysPrepared, "a message was refused"),
        (Plant::IsSilent, "it does not know in the end"),
        (Plant::DeliversLate, "a message was refused"),
        (Plant::LeavesItPaused, "no guest, and nobody says so"),
    ] {
        let broken = [true, false]
            .map(|fails| explore(Rules { rejoins: true, fails, plant: Some(plant) }).broken);
        let what: Vec<_> = broken.iter().flat_map(BTreeMap::keys).collect();
        eprintln!("{plant:?}: {what:?}");
        assert!(what.contains(&&found), "{plant:?}: {what:?}");
    }
}

#[test]
fn nonsense_is_refused_without_moving() {
    let mut source = SourceHandover::default();
    let prepared = |attempt| SourceInput::Prepared { attempt };
    assert_eq!(source.handle(prepared(1)), SourceAction::Refuse);
    assert_eq!(source.handle(SourceInput::Resumed), SourceAction::Refuse);
    assert_eq!(source.state(), SourceState::Running);
    source.handle(SourceInput::Paused);
    assert_eq!(source.handle(prepared(2)), SourceAction::Refuse);
    assert_eq!(source.handle(SourceInput::CalledOff), SourceAction::SendCalledOff(1));
    // Too late, and no reason to do anything.
    assert_eq!(source.handle(prepared(1)), SourceAction::Nothing);
    source.handle(SourceInput::Paused);
    assert_eq!(source.handle(prepared(1)), SourceAction::Nothing);
    assert_eq!(source.handle(prepared(2)), SourceAction::SendCommit);
    assert_eq!(source.handle(SourceInput::CalledOff), SourceAction::Refuse);
    let mut destination = DestinationHandover::default();
    assert_eq!(destination.handle(DestinationInput::Commit), DestinationAction::Refuse);
    let called_off = |attempt| DestinationInput::CalledOff { attempt };
    assert_eq!(destination.state(), DestinationState::Receiving);
    let loaded = |attempt| DestinationInput::Loaded { attempt };
    assert_eq!(destination.handle(loaded(1)), DestinationAction::SendPrepared(1));
    assert_eq!(destination.handle(called_off(2)), DestinationAction::Refuse);
    assert_eq!(destination.handle(called_off(1)), DestinationAction::Nothing);
    assert_eq!(destination.handle(DestinationInput::Commit), DestinationAction::Refuse);
    assert_eq!(destination.handle(loaded(1)), DestinationAction::Refuse);
    assert_eq!(destination.handle(loaded(2)), DestinationAction::SendPrepared(2));
    // A source that comes back has committed by that switchover, or none.
    let returned = |attempt, committed| DestinationInput::Returned { attempt, committed };
    for nonsense in [returned(1, true), returned(3, true), returned(1, false)] {
        assert_eq!(destination.handle(nonsense), DestinationAction::Refuse);
        assert_eq!(destination.state(), DestinationState::Prepared);
    }
    assert_eq!(destination.handle(returned(3, false)), DestinationAction::Unload);
    assert_eq!(destination.handle(returned(3, true)), DestinationAction::Refuse);
    assert_eq!(destination.handle(loaded(4)), DestinationAction::SendPrepared(4));
    assert_eq!(destination.handle(returned(4, true)), DestinationAction::ResumeGuest);
    assert_eq!(destination.handle(returned(4, false)), DestinationAction::Refuse);
    destination.handle(DestinationInput::Resumed);
    assert_eq!(destination.handle(returned(4, true)), DestinationAction::SendResumed);
}
