//! A guest that dirties its memory: classes of pages, each written evenly at its own rate.
//!
//! Only numbers of pages are kept, not pages: of `n` pages written at `r` writes a second at even
//! odds, a share of `exp(-r t / n)` is still clean after the time `t`.

use super::dice::Dice;

/// What a guest does. Times in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Activity {
    Steady,
    /// On for a share of each period, and nearly idle else.
    Bursts {
        period: f64,
        share: f64,
        offset: f64,
    },
    /// Something else after each period.
    Phases {
        period: f64,
        offset: f64,
    },
}

/// Pages that are alike.
#[derive(Debug, Clone, Copy)]
pub(super) struct Class {
    pub(super) pages: f64,
    /// Writes a second to all of them together.
    pub(super) writes_per_second: f64,
    /// Written since they were harvested last.
    dirty: f64,
    /// Harvested, and not sent yet.
    unsent: f64,
}

impl Class {
    pub(super) fn new(pages: f64, writes_per_second: f64) -> Self {
        Self { pages, writes_per_second, dirty: 0.0, unsent: pages }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Guest {
    classes: Vec<Class>,
    activity: Activity,
    /// Speeds of phases, over and over.
    phases: [f64; 8],
    /// What throttling leaves of its speed.
    speed: f64,
}

impl Guest {
    pub(super) fn new(classes: Vec<Class>, activity: Activity, dice: &mut Dice) -> Self {
        let phases = std::array::from_fn(|_| dice.about(1.0, 0.6));
        Self { classes, activity, phases, speed: 1.0 }
    }

    pub(super) fn pages(&self) -> f64 {
        self.classes.iter().map(|class| class.pages).sum()
    }

    /// Those that are ever written.
    #[cfg(test)]
    pub(super) fn written_pages(&self) -> f64 {
        let written = self.classes.iter().filter(|class| class.writes_per_second > 0.0);
        written.map(|class| class.pages).sum()
    }

    pub(super) fn throttle(&mut self, percent: u8) {
        self.speed = 1.0 - f64::from(percent) / 100.0;
    }

    /// It runs from `now` on for so long.
    pub(super) fn run(&mut self, now: f64, took: f64) {
        let speed = self.speed * self.activity(now, took);
        for class in &mut self.classes {
            let clean = class.pages - class.dirty - class.unsent;
            class.dirty +=
                clean * -(-class.writes_per_second * speed * took / class.pages).exp_m1();
        }
    }

    /// What was written is harvested, on top of what was not sent. Pages to send, by class.
    pub(super) fn harvest(&mut self) -> Vec<f64> {
        for class in &mut self.classes {
            class.unsent += class.dirty;
            class.dirty = 0.0;
        }
        self.classes.iter().map(|class| class.unsent).collect()
    }

    /// So many of the pages to send have gone out; from now on a write to them is seen.
    pub(super) fn send(&mut self, pages: f64) {
        let all: f64 = self.classes.iter().map(|class| class.unsent).sum();
        if all > 0.0 {
            let rest = (1.0 - pages / all).max(0.0);
            self.classes.iter_mut().for_each(|class| class.unsent *= rest);
        }
    }

    fn activity(&self, now: f64, took: f64) -> f64 {
        const IDLE: f64 = 0.05;
        match self.activity {
            Activity::Steady => 1.0,
            Activity::Bursts { period, share, .. } if took > period => share + (1.0 - share) * IDLE,
            Activity::Bursts { period, share, offset } => {
                if ((now + offset) / period).fract() < share { 1.0 } else { IDLE }
            }
            Activity::Phases { period, .. } if took > period * self.phases.len() as f64 => 1.0,
            Activity::Phases { period, offset } => {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a small positive number"
                )]
                let phase = ((now + offset) / period) as usize;
                self.phases[phase % self.phases.len()]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(guest: &mut Guest) -> f64 {
        guest.harvest().iter().sum()
    }

    #[test]
    fn pages_are_dirtied_once_however_they_are_sent() {
        let mut dice = Dice::new(1);
        let class = Class::new(1000.0, 500.0);
        let mut guest = Guest::new(vec![class], Activity::Steady, &mut dice);
        // Before they are sent for the first time writes do not matter.
        guest.run(0.0, 10.0);
        assert!((dirty(&mut guest) - 1000.0).abs() < 1e-6);
        guest.send(1000.0);
        assert!(dirty(&mut guest) < 1e-6);
        guest.run(0.0, 1.0);
        let expected = 1000.0 * (1.0 - (-0.5_f64).exp());
        assert!((dirty(&mut guest) - expected).abs() < 1e-6);
        // A paused guest writes nothing; a slow one less.
        guest.send(2000.0);
        guest.throttle(90);
        guest.run(0.0, 1.0);
        let expected = 1000.0 * (1.0 - (-0.05_f64).exp());
        assert!((dirty(&mut guest) - expected).abs() < 1e-6);
    }

    #[test]
    fn bursts_come_and_go() {
        let mut dice = Dice::new(1);
        let activity = Activity::Bursts { period: 10.0, share: 0.5, offset: 0.0 };
        let mut guest = Guest::new(vec![Class::new(1e6, 1000.0)], activity, &mut dice);
        guest.send(1e6);
        guest.run(1.0, 1.0);
        let on = dirty(&mut guest);
        guest.send(1e6);
        guest.run(6.0, 1.0);
        let off = dirty(&mut guest);
        assert!(on > 10.0 * off, "{on} {off}");
    }
}
