//! A link: bandwidth that varies, episodes of loss, a step to another speed, answers that take a
//! round trip.

use super::dice::Dice;

/// For how long a link keeps to a deviation, in seconds.
const MEMORY: f64 = 0.2;

/// What a frame that is lost waits for beside two round trips: TCP's tail loss probe, on a
/// connection on which something follows.
const PROBE: f64 = 0.005;

/// The shortest time that is told apart.
const SHORTEST: f64 = 1e-6;

/// An episode of loss. Times in seconds.
#[derive(Debug, Clone, Copy)]
struct Episode {
    begins: f64,
    ends: f64,
    /// What is left of the bandwidth.
    share: f64,
    /// How likely a control frame is lost.
    loss: f64,
}

#[derive(Debug)]
pub(super) struct Network {
    pub(super) bytes_per_second: f64,
    pub(super) round_trip: f64,
    /// Deviation of the bandwidth and of the round trip, as a share.
    pub(super) jitter: f64,
    pub(super) episodes_per_second: f64,
    /// When it becomes how much as fast.
    pub(super) step: Option<(f64, f64)>,
    /// Shares of the channels.
    pub(super) channels: Vec<f64>,
    /// How many bytes an acknowledgement is for.
    pub(super) acknowledged_bytes: f64,
    episode: Episode,
    deviation: f64,
    dice: Dice,
}

impl Network {
    pub(super) fn new(bytes_per_second: f64, round_trip: f64, jitter: f64, dice: Dice) -> Self {
        Self {
            bytes_per_second,
            round_trip,
            jitter,
            episodes_per_second: 0.0,
            step: None,
            channels: vec![1.0],
            acknowledged_bytes: 1.0,
            episode: Episode { begins: 0.0, ends: 0.0, share: 1.0, loss: 0.0 },
            deviation: 0.0,
            dice,
        }
    }

    /// Goes on sending from `now`, at most so many bytes and for so long. Bytes and time.
    pub(super) fn send(&mut self, now: f64, bytes: f64, most: f64) -> (f64, f64) {
        self.pass(now);
        let mut took = most;
        for event in
            [self.episode.begins, self.episode.ends].into_iter().chain(self.step.map(|(at, _)| at))
        {
            // Never so short a time that it vanishes beside `now`.
            if event > now {
                took = took.min((event - now).max(SHORTEST));
            }
        }
        let kept = (-took / MEMORY).exp();
        // Over a long time deviations cancel each other out.
        let spread = self.jitter * (1.0 - kept * kept).sqrt() * (MEMORY / took.max(MEMORY)).sqrt();
        self.deviation = self.deviation * kept + self.dice.normal() * spread;
        let rate = self.rate(now) * self.deviation.exp();
        let took = took.min(bytes / rate);
        ((rate * took).min(bytes), took)
    }

    /// How long a frame and its answer take from `now` on, if nothing is done in between.
    pub(super) fn exchange(&mut self, now: f64) -> f64 {
        self.pass(now);
        let mut took = self.round_trip * (1.0 + self.dice.normal().abs() * self.jitter);
        if (self.episode.begins..self.episode.ends).contains(&now) {
            for _way in 0..2 {
                if self.dice.chance(self.episode.loss) {
                    took += 2.0 * self.round_trip + PROBE;
                }
            }
        }
        took
    }

    fn rate(&self, now: f64) -> f64 {
        let mut rate = self.bytes_per_second;
        if let Some((_, factor)) = self.step.filter(|(at, _)| *at <= now) {
            rate *= factor;
        }
        if (self.episode.begins..self.episode.ends).contains(&now) {
            rate *= self.episode.share;
        }
        rate
    }

    /// Draws the next episode of loss once one is over.
    fn pass(&mut self, now: f64) {
        if self.episodes_per_second > 0.0 && now >= self.episode.ends {
            let begins = now + self.dice.wait(self.episodes_per_second);
            self.episode = Episode {
                begins,
                ends: begins + self.dice.magnitude(0.05, 2.0),
                share: self.dice.between(0.1, 0.7),
                loss: self.dice.magnitude(0.002, 0.05),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds for so many bytes.
    fn seconds(network: &mut Network, bytes: f64) -> f64 {
        let (mut now, mut left) = (0.0, bytes);
        while left > 0.0 {
            let (sent, took) = network.send(now, left, 0.01);
            left -= sent;
            now += took;
        }
        now
    }

    #[test]
    fn bytes_take_their_time() {
        let mut network = Network::new(1e9, 0.001, 0.1, Dice::new(1));
        assert!((seconds(&mut network, 1e10) / 10.0 - 1.0).abs() < 0.1);
        network.step = Some((5.0, 0.5));
        assert!((seconds(&mut network, 1e10) / 15.0 - 1.0).abs() < 0.1);
    }

    #[test]
    fn episodes_of_loss_slow_it_down() {
        let mut network = Network::new(1e9, 0.001, 0.0, Dice::new(1));
        network.episodes_per_second = 2.0;
        assert!(seconds(&mut network, 1e10) > 11.0);
        let mut network = Network::new(1e9, 0.001, 0.0, Dice::new(1));
        let slowest = |network: &mut Network| {
            (0..100_000).map(|turn| network.exchange(f64::from(turn) * 0.01)).fold(0.0, f64::max)
        };
        assert!((slowest(&mut network) - 0.001).abs() < 1e-9);
        network.episodes_per_second = 2.0;
        assert!(slowest(&mut network) > 0.007);
    }
}
