use std::collections::{HashSet, VecDeque};

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
}

/// Switchovers that are explored, all but the last of which may be called off.
const ATTEMPTS: u32 = 3;

/// Both machines, what is under way between them, and whether the link lives. A broken link
/// delivers nothing any more; each side notices in its own time.
#[expect(clippy::struct_excessive_bools, reason = "independent facts of the world")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: SourceHandover,
    destination: DestinationHandover,
    to_destination: VecDeque<Wire>,
    to_source: VecDeque<Wire>,
    link: bool,
    source_runs: bool,
    destination_runs: bool,
    prepare_sent: bool,
    refused: bool,
}

impl World {
    fn start() -> Self {
        Self {
            source: SourceHandover::default(),
            destination: DestinationHandover::default(),
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            link: true,
            source_runs: true,
            destination_runs: false,
            prepare_sent: false,
            refused: false,
        }
    }

    /// Whether a side has failed: it no longer listens to what was under way.
    fn over(&self) -> bool {
        matches!(self.source.state(), SourceState::Kept | SourceState::Uncertain)
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
        match self.destination.handle(input) {
            DestinationAction::Nothing | DestinationAction::ReportUncertain => {}
            DestinationAction::SendPrepared(attempt) => {
                self.send_to_source(Wire::Prepared(attempt));
            }
            DestinationAction::ResumeGuest => {}
            DestinationAction::SendResumed => {
                self.destination_runs = true;
                self.send_to_source(Wire::Resumed);
            }
            DestinationAction::SendGaveBack => self.send_to_source(Wire::GaveBack),
            DestinationAction::Discard => self.send_to_source(Wire::DestinationFailed),
            DestinationAction::Refuse => self.refused |= !self.over(),
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
        match self.source.state() {
            SourceState::Running if self.source.attempt() < ATTEMPTS => step(&|w| {
                w.source(SourceInput::Paused);
                w.source_runs = false;
                w.prepare_sent = false;
            }),
            SourceState::Stopped => {
                if !self.prepare_sent {
                    step(&|w| {
                        w.send_to_destination(Wire::Prepare(w.source.attempt()));
                        w.prepare_sent = true;
                    });
                }
                // At any moment until the commit, and the guest runs before anyone hears of it.
                step(&|w| {
                    w.source_runs = true;
                    w.source(SourceInput::CalledOff);
                });
            }
            _ => {}
        }
        // Cancel, timeout or local failure may come at any time, on either side.
        step(&|w| w.source(SourceInput::Failed));
        step(&|w| w.destination(DestinationInput::Failed));
        if self.destination.state() == DestinationState::Owner {
            step(&|w| w.destination(DestinationInput::Resumed));
            step(&|w| w.destination(DestinationInput::ResumeFailed));
        }
        if self.link {
            step(&|w| {
                w.link = false;
                w.to_destination.clear();
                w.to_source.clear();
            });
            if !self.to_destination.is_empty() {
                step(&|w| {
                    let message = w.to_destination.pop_front().unwrap();
                    w.destination(match message {
                        Wire::Prepare(attempt) => DestinationInput::Loaded { attempt },
                        Wire::CalledOff(attempt) => DestinationInput::CalledOff { attempt },
                        Wire::Commit => DestinationInput::Commit,
                        _ => DestinationInput::SourceFailed,
                    });
                });
            }
            if !self.to_source.is_empty() {
                step(&|w| {
                    let message = w.to_source.pop_front().unwrap();
                    w.source(match message {
                        Wire::Prepared(attempt) => SourceInput::Prepared { attempt },
                        Wire::Resumed => SourceInput::Resumed,
                        Wire::GaveBack => SourceInput::GaveBack,
                        _ => SourceInput::Failed,
                    });
                });
            }
        }
        worlds
    }
}

#[test]
fn never_two_guests_and_never_none_without_saying_so() {
    let mut seen = HashSet::from([World::start()]);
    let mut todo = vec![World::start()];
    let mut ends = HashSet::new();
    while let Some(world) = todo.pop() {
        assert!(!(world.source_runs && world.destination_runs), "two guests: {world:?}");
        // Between two honest sides no message is out of place.
        assert!(!world.refused, "a message was refused: {world:?}");
        let next = world.next();
        let stuck = next.iter().all(|next| *next == world);
        if stuck {
            let runs = world.source_runs || world.destination_runs;
            let told = world.source.state() == SourceState::Uncertain
                || world.destination.state() == DestinationState::Uncertain;
            assert!(runs || told, "guest lost silently: {world:?}");
            ends.insert((world.source.state(), world.destination.state()));
        }
        todo.extend(next.into_iter().filter(|next| seen.insert(next.clone())));
    }
    // The exploration reached what it is about, also after switchovers that were called off.
    for attempt in 1..=ATTEMPTS {
        assert!(seen.iter().any(|world| world.destination_runs
            && world.source.attempt() == attempt
            && world.source.state() == SourceState::HandedOver));
    }
    assert!(ends.contains(&(SourceState::HandedOver, DestinationState::Running)));
    assert!(ends.contains(&(SourceState::Kept, DestinationState::Discarded)));
    assert!(ends.contains(&(SourceState::Kept, DestinationState::GaveBack)));
    assert!(ends.contains(&(SourceState::Uncertain, DestinationState::Running)));
    assert!(ends.contains(&(SourceState::Kept, DestinationState::Uncertain)));
    assert!(seen.len() > 50, "{} worlds", seen.len());
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
}
