//! One migration of a scenario: the engine's state machines, driven as its driver drives them.

use std::time::Duration;

use pageferry::Rehearsal;
use pageferry::convergence::{Attempt, Convergence, Method, Round, Settings, Verdict};

use super::scenario::{Kind, Scenario};

const PAGE_BYTES: f64 = 4096.0;

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum End {
    Converged,
    Throttled,
    PostCopy,
    GaveUp,
}

/// What came of one. Times in seconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(super) struct Outcome {
    pub(super) kind: Kind,
    pub(super) end: End,
    /// Whether not even a guest that writes nothing would meet the limit.
    pub(super) infeasible: bool,
    pub(super) limit: f64,
    /// Of the switchover that was finished.
    pub(super) downtime: Option<f64>,
    pub(super) predicted: Option<f64>,
    pub(super) rounds: u32,
    pub(super) attempts: u32,
    /// Switchovers that were called off, and how long the guest stood still for them.
    pub(super) called_off: u32,
    pub(super) wasted: f64,
    pub(super) total: f64,
    /// Total time over that of sending everything once.
    pub(super) effort: f64,
    pub(super) throttle_percent: u8,
    /// Time that throttling took from the guest.
    pub(super) slowed: f64,
}

impl Outcome {
    pub(super) fn overran(&self) -> bool {
        self.downtime.is_some_and(|downtime| downtime > self.limit)
    }

    /// How far off the prediction was, as a share of the downtime.
    pub(super) fn error(&self) -> Option<f64> {
        Some((self.predicted? / self.downtime? - 1.0).abs())
    }
}

/// Migrates the scenario.
pub(super) fn migrate(scenario: Scenario, settings: Settings, method: Method) -> Outcome {
    let least = scenario.least_seconds();
    let mut world = World::of(scenario, settings, method);
    let mut outcome = world.run(settings);
    outcome.total = world.now;
    outcome.effort = world.now / least;
    outcome.slowed = world.slowed;
    outcome.throttle_percent = world.throttle_percent;
    outcome
}

struct World {
    scenario: Scenario,
    convergence: Convergence,
    now: f64,
    /// When memory was harvested last.
    harvested: f64,
    /// Page bytes, by channel.
    landed: Vec<f64>,
    /// Pages to send, by class.
    unsent: Vec<f64>,
    slowed: f64,
    throttle_percent: u8,
}

/// A switchover that is over.
enum Switchover {
    Done(f64),
    /// After the guest stood still for so long.
    CalledOff(f64),
}

fn time(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative, and far below 2^53"
)]
fn counts(figures: &[f64]) -> Vec<u64> {
    figures.iter().map(|figure| figure.round() as u64).collect()
}

impl World {
    fn of(scenario: Scenario, settings: Settings, method: Method) -> Self {
        Self {
            convergence: Convergence::by(method, settings),
            landed: vec![0.0; scenario.network.channels.len()],
            unsent: Vec::new(),
            scenario,
            now: 0.0,
            harvested: 0.0,
            slowed: 0.0,
            throttle_percent: 0,
        }
    }

    fn begin(&mut self) {
        self.convergence.set_bandwidth_limit(self.scenario.bandwidth_limit);
        self.rehearse();
        self.take_dirty();
    }

    fn run(&mut self, settings: Settings) -> Outcome {
        let mut outcome = Outcome {
            kind: self.scenario.kind,
            end: End::GaveUp,
            infeasible: self.scenario.least_downtime() > settings.downtime_limit.as_secs_f64(),
            limit: settings.downtime_limit.as_secs_f64(),
            downtime: None,
            predicted: None,
            rounds: 0,
            attempts: 0,
            called_off: 0,
            wasted: 0.0,
            total: 0.0,
            effort: 0.0,
            throttle_percent: 0,
            slowed: 0.0,
        };
        self.begin();
        loop {
            let verdict = match self.round() {
                Verdict::Approach { .. } => self.approach(),
                verdict => verdict,
            };
            outcome.rounds += 1;
            self.throttle();
            match verdict {
                Verdict::SwitchOver { .. } => {
                    outcome.attempts += 1;
                    let predicted = self.convergence.prediction().map(|p| p.total().expected);
                    outcome.predicted = predicted.map(|predicted| predicted.as_secs_f64());
                    match self.switch_over() {
                        Switchover::Done(downtime) => {
                            outcome.downtime = Some(downtime);
                            outcome.end = match self.throttle_percent {
                                0 => End::Converged,
                                _ => End::Throttled,
                            };
                            return outcome;
                        }
                        Switchover::CalledOff(stood) => {
                            outcome.called_off += 1;
                            outcome.wasted += stood;
                        }
                    }
                }
                Verdict::PostCopy { .. } => {
                    outcome.end = End::PostCopy;
                    return outcome;
                }
                Verdict::GiveUp { .. } => return outcome,
                _ => {}
            }
        }
    }

    /// What something takes this time.
    fn draw(&mut self, seconds: f64) -> f64 {
        let jitter = self.scenario.hosts.jitter;
        self.scenario.dice.about(seconds, jitter)
    }

    fn throttle(&mut self) {
        let percent = self.convergence.throttle_percent();
        if percent != self.throttle_percent {
            self.throttle_percent = percent;
            self.scenario.guest.throttle(percent);
        }
    }

    /// The guest runs while something takes so long.
    fn pass(&mut self, seconds: f64) {
        self.scenario.guest.run(self.now, seconds);
        self.now += seconds;
        self.slowed += seconds * f64::from(self.throttle_percent) / 100.0;
    }

    fn rehearse(&mut self) {
        let hosts = self.scenario.hosts;
        let rehearsal = Rehearsal {
            state_bytes: counts(&[hosts.state_bytes])[0],
            save: time(self.draw(hosts.save)),
            pause: Some(time(self.draw(hosts.pause))),
            resume: Some(time(self.draw(hosts.resume))),
        };
        self.convergence.learn_rehearsal(&rehearsal);
    }

    fn exchange(&mut self) -> f64 {
        let took = self.scenario.network.exchange(self.now);
        self.convergence.learn_round_trip(time(took));
        took
    }

    fn round(&mut self) -> Verdict {
        let began = self.now;
        let pages: f64 = self.unsent.iter().sum();
        let since = self.harvested;
        self.exchange();
        self.begin_sending();
        self.send(pages, f64::INFINITY, true);
        self.harvest();
        let dirty_pages = counts(&self.unsent);
        let round = Round {
            took: time(self.now - began),
            dirtied_for: time(self.harvested - since),
            dirty_pages: &dirty_pages,
        };
        let verdict = self.convergence.round_ended(time(self.now), round);
        if let Verdict::Iterate { .. } = verdict {
            let rest = self.convergence.rest(time(self.now - began));
            self.pass(rest.as_secs_f64());
        }
        verdict
    }

    /// All lands that is under way, and what was written meanwhile is counted.
    fn approach(&mut self) -> Verdict {
        let took = self.exchange();
        self.pass(took);
        self.harvest();
        self.convergence.decide(time(self.now), self.pages_unsent())
    }

    fn pages_unsent(&self) -> u64 {
        counts(&[self.unsent.iter().sum()])[0]
    }

    fn harvest(&mut self) {
        let took = self.draw(self.scenario.hosts.harvest);
        self.pass(took);
        self.take_dirty();
        self.convergence.learn_harvest(time(took));
    }

    fn take_dirty(&mut self) {
        self.unsent = self.scenario.guest.harvest();
        self.harvested = self.now;
    }

    fn begin_sending(&mut self) {
        let landed = self.acknowledged();
        let pages = self.pages_unsent();
        self.convergence.round_began(time(self.now), &landed, pages);
    }

    /// Sends pages, until so many are sent or `until`. Whether all were.
    fn send(&mut self, pages: f64, until: f64, running: bool) -> bool {
        let mut left = pages * PAGE_BYTES;
        let shares: f64 = self.scenario.network.channels.iter().sum();
        let speed = shares / self.scenario.network.channels.len() as f64;
        let expected = left / (self.scenario.network.bytes_per_second * speed);
        let slice = (expected / 50.0).clamp(1e-3, 5.0);
        while left > 1.0 {
            let most = slice.min(until - self.now);
            if most < 1e-6 {
                return false;
            }
            // A slow channel takes part of the bandwidth along, as stripes are dealt out by speed.
            let (sent, took) = self.scenario.network.send(self.now, left / speed, most);
            let sent = (sent * speed).min(left);
            // What the host does not allow yet waits.
            let allowed = self.scenario.bandwidth_limit.filter(|_| running);
            let took = allowed.map_or(took, |limit| took.max(sent / limit.get() as f64));
            left -= sent;
            self.scenario.guest.send(sent / PAGE_BYTES);
            if running {
                self.pass(took);
            } else {
                self.now += took;
            }
            for (landed, share) in self.landed.iter_mut().zip(&self.scenario.network.channels) {
                *landed += sent * share / shares;
            }
            let landed = self.acknowledged();
            self.convergence.landed(time(self.now), &landed);
        }
        true
    }

    /// What is known to have landed: acknowledgements come now and then.
    fn acknowledged(&self) -> Vec<u64> {
        let quantum = self.scenario.network.acknowledged_bytes / self.landed.len() as f64;
        let known: Vec<_> =
            self.landed.iter().map(|landed| (landed / quantum).floor() * quantum).collect();
        counts(&known)
    }

    /// With the guest paused, as `source/switchover.rs` of the engine does it.
    fn switch_over(&mut self) -> Switchover {
        let (hosts, began) = (self.scenario.hosts, self.now);
        let settings = *self.convergence.settings();
        let attempt = Attempt::begin(time(began), settings.downtime_limit, settings.bound);
        let pause = self.draw(hosts.pause);
        self.now += pause;
        self.convergence.learn_pause(time(pause));
        let harvest = self.draw(hosts.harvest);
        self.now += harvest;
        self.take_dirty();
        let pages = self.unsent.iter().sum();
        let after_pages = self.convergence.after_pages();
        if self.convergence.overruns(&attempt, time(self.now), self.pages_unsent()) {
            return self.call_off(began);
        }
        let due = attempt.due(after_pages).map_or(f64::INFINITY, |due| due.as_secs_f64());
        let saved = self.now + self.draw(hosts.save);
        let state_bytes = counts(&[hosts.state_bytes])[0];
        self.convergence.learn_save(state_bytes, time(saved - self.now));
        self.begin_sending();
        // It is asked for again as pages land.
        self.convergence.set_bandwidth_limit(None);
        if !self.send(pages, due, false) {
            return self.call_off(began);
        }
        let last_way = self.scenario.network.exchange(self.now);
        self.now = (self.now + last_way).max(saved);
        if attempt.overruns(time(self.now), after_pages) {
            return self.call_off(began);
        }
        let harvest = self.draw(hosts.harvest);
        self.now += harvest;

        let load = self.draw(hosts.load);
        let way = hosts.state_bytes / self.scenario.network.bytes_per_second;
        let exchange = self.scenario.network.exchange(self.now);
        let prepared = self.now + way + exchange + load;
        let after_commit = self.convergence.after_commit();
        let due = attempt.due(after_commit).map_or(f64::INFINITY, |due| due.as_secs_f64());
        if prepared > due {
            self.now = self.now.max(due);
            // Its answer comes all the same.
            self.convergence.learn_load(time(load));
            return self.call_off(began);
        }
        self.now = prepared;
        self.convergence.learn_load(time(load));
        self.convergence.learn_state_exchange(time(way + exchange));
        if attempt.overruns(time(self.now), self.convergence.after_commit()) {
            return self.call_off(began);
        }
        let commit = self.scenario.network.exchange(self.now);
        let resume = self.draw(hosts.resume);
        self.now += commit + resume;
        Switchover::Done(self.now - began)
    }

    fn call_off(&mut self, began: f64) -> Switchover {
        self.convergence.set_bandwidth_limit(self.scenario.bandwidth_limit);
        let resume = self.draw(self.scenario.hosts.resume);
        self.now += resume;
        self.convergence.called_off(time(self.now));
        self.take_dirty();
        Switchover::CalledOff(self.now - began)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the engine's driver has it, by what each round tells of the guest.
    #[test]
    fn whether_it_converges_is_known_after_two_rounds() {
        for seed in 0..100 {
            let scenario = Scenario::of(seed);
            let mut world = World::of(scenario, Settings::default(), Method::default());
            world.begin();
            let told = (0..2).all(|_| matches!(world.round(), Verdict::Iterate { .. }));
            assert!(!told || world.convergence.outlook().is_some(), "seed {seed}");
        }
    }
}
