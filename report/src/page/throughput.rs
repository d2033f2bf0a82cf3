//! How fast pages landed, over times that are long enough to say so.

use crate::document::Migration;

/// Slices of a migration's time over which throughput is averaged, at most.
const SLICES: f64 = 60.0;

/// A slice has at least so many times as many bytes as became known at once in it. Acknowledgements
/// come in bursts, of up to all that may be under way: what the first of a slice tells of may have
/// been sent before it, and so it may show a seventh more than the link carried.
const BURSTS: u64 = 8;

/// A time between two moments at which more was known to have landed.
#[derive(Debug, Clone, Copy)]
struct Slice {
    /// When, in milliseconds, and what had landed.
    from: (f64, u64),
    to: (f64, u64),
    /// The most bytes that became known at once.
    burst_bytes: u64,
}

impl Slice {
    fn bytes(&self) -> u64 {
        self.to.1 - self.from.1
    }

    fn took_ms(&self) -> f64 {
        self.to.0 - self.from.0
    }

    /// Whether it says how fast the link was.
    fn is_telling(&self) -> bool {
        self.bytes() / BURSTS >= self.burst_bytes
    }

    fn gbps(&self) -> f64 {
        if self.took_ms() > 0.0 { self.bytes() as f64 * 8.0 / self.took_ms() / 1e6 } else { 0.0 }
    }

    fn and(self, next: Self) -> Self {
        let burst_bytes = self.burst_bytes.max(next.burst_bytes);
        Self { from: self.from, to: next.to, burst_bytes }
    }
}

/// Gigabits that landed a second, in steps.
pub(super) fn throughput(migration: &Migration) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (migration.samples.first(), migration.samples.last()) else {
        return Vec::new();
    };
    // Nothing is under way before the first round.
    let began_ms = migration.rounds.first().map_or(first.ms, |round| round.ms.max(first.ms));
    let shortest_ms = last.ms / SLICES;
    let mut landed = (began_ms, first.landed_bytes);
    let mut slices: Vec<Slice> = Vec::new();
    let mut open: Option<Slice> = None;
    for sample in migration.samples.iter().filter(|sample| sample.ms > began_ms) {
        let Some(burst_bytes @ 1..) = sample.landed_bytes.checked_sub(landed.1) else { continue };
        let burst = Slice { from: landed, to: (sample.ms, sample.landed_bytes), burst_bytes };
        landed = burst.to;
        let slice = open.take().map_or(burst, |open| open.and(burst));
        if slice.is_telling() && slice.took_ms() >= shortest_ms {
            slices.push(slice);
        } else {
            open = Some(slice);
        }
    }
    // What is left at the end tells something together with what was before it.
    if let Some(mut rest) = open {
        while !rest.is_telling()
            && let Some(before) = slices.pop()
        {
            rest = before.and(rest);
        }
        slices.push(rest);
    }
    let steps =
        slices.iter().flat_map(|slice| [slice.from, slice.to].map(|at| (at.0, slice.gbps())));
    let before = [(first.ms, 0.0), (began_ms, 0.0)];
    let after = [(landed.0, 0.0), (last.ms.max(landed.0), 0.0)];
    before.into_iter().chain(steps).chain(after).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{Round, Sample};

    /// Bytes a millisecond at 30 Gb/s.
    const BYTES_PER_MS: f64 = 30e9 / 8.0 / 1e3;

    /// Of a link at 30 Gb/s that is busy from 20 ms on, looked at every `every_ms`, where of what has
    /// landed by then so much is known.
    fn acknowledged(every_ms: f64, known_ms: impl Fn(f64) -> f64) -> Migration {
        let samples = (0..=320)
            .map(|number| f64::from(number) * every_ms)
            .take_while(|ms| *ms <= 320.0)
            .map(|ms| {
                let busy_ms = (ms.min(300.0) - 20.0).max(0.0);
                let known_ms = known_ms(busy_ms);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "bytes"
                )]
                let landed_bytes = (known_ms * BYTES_PER_MS) as u64;
                Sample { ms, landed_bytes, remaining_bytes: 0 }
            })
            .collect();
        let rounds = vec![Round { round: 1, ms: 20.0, dirty_pages: 1 }];
        Migration { samples, rounds, total_ms: 330.0, ..Migration::default() }
    }

    fn gigabits(points: &[(f64, f64)]) -> f64 {
        points.windows(2).map(|pair| pair[0].1 * (pair[1].0 - pair[0].0) / 1e3).sum()
    }

    #[test]
    fn bursts_of_acknowledgements_are_no_throughput() {
        let regular = |every: f64| move |ms: f64| (ms / every).floor() * every;
        // Two bursts close together, then none for long.
        let uneven = |ms: f64| {
            let begun = (ms / 24.0).floor() * 24.0;
            if ms - begun >= 4.0 { begun + 4.0 } else { begun }
        };
        let burst = |every_ms, known_ms: &dyn Fn(f64) -> f64| {
            acknowledged(every_ms, |ms| if ms < 280.0 { known_ms(ms) } else { ms })
        };
        for (what, migration) in [
            ("at once", burst(5.0, &|ms| ms)),
            ("every 13 ms", burst(5.0, &regular(13.0))),
            ("every 17 ms", burst(2.0, &regular(17.0))),
            ("every 31 ms", burst(5.0, &regular(31.0))),
            ("every 90 ms", burst(5.0, &regular(90.0))),
            ("in pairs", burst(2.0, &uneven)),
        ] {
            let points = throughput(&migration);
            let most = points.iter().map(|(_, gbps)| *gbps).fold(0.0, f64::max);
            assert!((25.0..=30.0 * 8.0 / 7.0).contains(&most), "{what}: {most} Gb/s, {points:?}");
            // All that landed is drawn: 280 ms of 30 Gb/s.
            let drawn = gigabits(&points);
            assert!((drawn - 8.4).abs() < 0.01, "{what}: {drawn} Gb, {points:?}");
            let mut times = points.windows(2).map(|pair| pair[0].0..=pair[1].0);
            assert!(times.all(|time| !time.is_empty()), "{what}: {points:?}");
        }
    }

    #[test]
    fn what_is_seen_often_is_drawn_in_detail() {
        // 30 Gb/s, half of it between 100 and 200 ms.
        let migration = acknowledged(2.0, |ms| {
            ms.min(100.0) + (ms.clamp(100.0, 200.0) - 100.0) / 2.0 + (ms.max(200.0) - 200.0)
        });
        let points = throughput(&migration);
        let at = |ms: f64| {
            let pair = points.windows(2).find(|pair| pair[0].0 <= ms && ms < pair[1].0);
            pair.map_or(0.0, |pair| pair[0].1)
        };
        for (ms, gbps) in [(60.0, 30.0), (170.0, 15.0), (260.0, 30.0)] {
            assert!((at(ms) - gbps).abs() < 0.5, "at {ms} ms: {points:?}");
        }
    }
}
