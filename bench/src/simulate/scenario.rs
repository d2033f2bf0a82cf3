//! A scenario, drawn from a seed: a guest, a network, two hosts, and a downtime limit.

use std::num::NonZeroU64;
use std::time::Duration;

use super::dice::Dice;
use super::guest::{Activity, Class, Guest};
use super::network::Network;

const PAGE_BYTES: f64 = 4096.0;

/// Downtime limits that people set.
const LIMITS_MS: [u64; 7] = [20, 50, 100, 200, 300, 500, 1000];

/// What a guest does, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Uniform,
    HotCold,
    Bursts,
    Phases,
}

pub(super) const KINDS: [Kind; 4] = [Kind::Uniform, Kind::HotCold, Kind::Bursts, Kind::Phases];

/// What two hosts take for things. Times in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hosts {
    pub(super) pause: f64,
    pub(super) harvest: f64,
    pub(super) save: f64,
    pub(super) load: f64,
    pub(super) resume: f64,
    pub(super) state_bytes: f64,
    /// By which share any of them differs from one time to the next.
    pub(super) jitter: f64,
}

/// All of it. The same seed gives the same, whoever migrates it.
#[derive(Debug)]
pub(super) struct Scenario {
    pub(super) kind: Kind,
    pub(super) limit: Duration,
    pub(super) guest: Guest,
    pub(super) network: Network,
    pub(super) hosts: Hosts,
    /// Page bytes a second that the host allows while the guest runs.
    pub(super) bandwidth_limit: Option<NonZeroU64>,
    /// For what differs from one time to the next.
    pub(super) dice: Dice,
}

impl Scenario {
    pub(super) fn of(seed: u64) -> Self {
        // What is drawn for one part does not move what is drawn for another.
        let mut dice = Dice::new(seed.wrapping_mul(8));
        let bytes = dice.magnitude(f64::from(1 << 30), 17.6e12);
        let bytes_per_second = dice.magnitude(1e9, 400e9) / 8.0;
        let kind = dice.one_of(&KINDS);
        let limit = Duration::from_millis(dice.one_of(&LIMITS_MS));
        let guest = guest(kind, bytes / PAGE_BYTES, bytes_per_second / PAGE_BYTES, &mut dice);
        // Migrations are within a place more often than across the sea.
        let mut least = |a: f64, b: f64| dice.magnitude(a, b).min(dice.magnitude(a, b));
        let round_trip = least(50e-6, 0.1);
        let network = network(seed, bytes_per_second, round_trip);
        let mut dice = Dice::new(seed.wrapping_mul(8) + 2);
        let hosts = hosts(bytes, &mut dice);
        Self { kind, limit, guest, network, hosts, bandwidth_limit: None, dice }
    }

    /// The downtime of a guest that writes nothing.
    pub(super) fn least_downtime(&self) -> f64 {
        let Hosts { pause, harvest, save, load, resume, state_bytes, .. } = self.hosts;
        let way = state_bytes / self.network.bytes_per_second;
        let pages = save.max(self.network.round_trip);
        pause + 2.0 * harvest + pages + way + load + 2.0 * self.network.round_trip + resume
    }

    /// The time that sending everything once takes at least.
    pub(super) fn least_seconds(&self) -> f64 {
        let link = self.network.bytes_per_second;
        let allowed = self.bandwidth_limit.map_or(link, |limit| link.min(limit.get() as f64));
        self.guest.pages() * PAGE_BYTES / allowed
    }
}

/// A guest whose writes are between a hundredth of what the link can move and twice that.
fn guest(kind: Kind, pages: f64, link_pages_per_second: f64, dice: &mut Dice) -> Guest {
    let writes = link_pages_per_second * dice.magnitude(0.01, 2.0);
    let working_set = pages * dice.magnitude(0.01, 0.8);
    let period = dice.magnitude(0.5, 60.0);
    let offset = dice.between(0.0, period);
    let hot = working_set * dice.between(0.02, 0.2);
    let hot_writes = writes * dice.between(0.7, 0.95);
    let classes = if kind == Kind::Uniform {
        vec![Class::new(working_set, writes)]
    } else {
        vec![Class::new(hot, hot_writes), Class::new(working_set - hot, writes - hot_writes)]
    };
    let activity = match kind {
        Kind::Bursts => Activity::Bursts { period, share: dice.between(0.1, 0.8), offset },
        Kind::Phases => Activity::Phases { period, offset },
        Kind::Uniform | Kind::HotCold => Activity::Steady,
    };
    let rest = Class::new(pages - working_set, 0.0);
    Guest::new([classes, vec![rest]].concat(), activity, dice)
}

fn network(seed: u64, bytes_per_second: f64, round_trip: f64) -> Network {
    let mut dice = Dice::new(seed.wrapping_mul(8) + 1);
    let jitter = dice.between(0.01, 0.15);
    let lossy = dice.chance(0.3);
    let episodes_per_second = if lossy { dice.magnitude(0.01, 0.5) } else { 0.0 };
    let step = dice.chance(0.2).then(|| (dice.magnitude(0.5, 100.0), dice.magnitude(0.4, 2.0)));
    let mut channels = vec![1.0; dice.one_of(&[1, 2, 4, 8])];
    if dice.chance(0.2) {
        channels[0] = dice.between(0.3, 0.9);
    }
    let acknowledged_bytes = dice.one_of(&[65_536.0, 1e6, 8e6]);
    let own = Dice::new(seed.wrapping_mul(8) + 3);
    let mut network = Network::new(bytes_per_second, round_trip, jitter, own);
    network.episodes_per_second = episodes_per_second;
    network.step = step;
    network.channels = channels;
    network.acknowledged_bytes = acknowledged_bytes;
    network
}

fn hosts(bytes: f64, dice: &mut Dice) -> Hosts {
    let save = dice.magnitude(0.2e-3, 30e-3).min(dice.magnitude(0.2e-3, 30e-3));
    Hosts {
        pause: dice.magnitude(0.05e-3, 2e-3),
        // A fixed part, and reading two bitmaps (16 TiB: some 50 ms).
        harvest: dice.magnitude(0.02e-3, 0.3e-3) + bytes * dice.between(2e-15, 4e-15),
        save,
        load: save * dice.between(0.8, 2.0),
        resume: dice.magnitude(0.05e-3, 2e-3),
        state_bytes: dice.magnitude(10e3, 16e6).min(dice.magnitude(10e3, 16e6)),
        jitter: dice.between(0.02, 0.2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_it_all() {
        for seed in [0, 1, 77] {
            let [one, other] = [Scenario::of(seed), Scenario::of(seed)];
            assert_eq!(format!("{one:?}"), format!("{other:?}"));
        }
        assert_ne!(format!("{:?}", Scenario::of(1)), format!("{:?}", Scenario::of(2)));
    }

    #[test]
    fn scenarios_are_of_all_kinds_and_sizes() {
        let all: Vec<_> = (0..500).map(Scenario::of).collect();
        for kind in KINDS {
            assert!(all.iter().filter(|scenario| scenario.kind == kind).count() > 80);
        }
        for limit in LIMITS_MS {
            assert!(all.iter().any(|scenario| scenario.limit.as_millis() == u128::from(limit)));
        }
        let bytes = |scenario: &Scenario| scenario.guest.pages() * PAGE_BYTES;
        let (least, most) = all
            .iter()
            .map(bytes)
            .fold((f64::MAX, 0.0_f64), |(least, most), bytes| (least.min(bytes), most.max(bytes)));
        assert!(least < 2e9 && most > 8e12, "{least} {most}");
        let rates = all.iter().map(|scenario| scenario.network.bytes_per_second * 8e-9);
        assert!(rates.clone().all(|gbps| (1.0..=400.0).contains(&gbps)));
        assert!(rates.clone().any(|gbps| gbps < 2.0) && rates.clone().any(|gbps| gbps > 200.0));
        let slow = |scenario: &Scenario| scenario.network.channels[0] < 1.0;
        assert!(all.iter().any(slow) && all.iter().any(|s| s.network.step.is_some()));
    }
}
