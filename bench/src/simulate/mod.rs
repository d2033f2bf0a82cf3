//! `simulate`: the engine's own state machines in a model of guest, network and hosts, by the
//! thousand.

mod args;
mod contenders;
mod dice;
mod guest;
mod migration;
mod network;
mod plot;
mod report;
mod scenario;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

pub(crate) use args::{METHOD, SimulateArgs};
use contenders::{ALL, Contender};
use migration::{Outcome, migrate};
use pageferry_cli::outcome::{Failure, Outcome as Ended};
use pageferry_cli::say;
use report::Report;
use scenario::Scenario;

/// Runs all scenarios with all contenders, and compares.
pub(crate) fn run(args: &SimulateArgs) -> Result<Ended, Failure> {
    let began = Instant::now();
    let outcomes: Vec<_> =
        ALL.iter().map(|contender| run_all(contender, args.seed, args.scenarios)).collect();
    let elapsed_ms = began.elapsed().as_secs_f64() * 1e3;
    let report = Report::new(args.seed, args.scenarios, elapsed_ms, &outcomes);
    if let Some(path) = &args.html {
        let page = plot::page(&report, &outcomes, args);
        std::fs::write(path, page)
            .map_err(|error| format!("failed to write {}: {error}", path.display()))?;
        say!("plots are in {}", path.display());
    }
    report.print(args.json)?;
    Ok(Ended::Completed)
}

/// All scenarios with one contender, in order, on all CPUs.
fn run_all(contender: &Contender, seed: u64, scenarios: u32) -> Vec<Outcome> {
    const AT_A_TIME: usize = 16;
    let next = AtomicUsize::new(0);
    let total = scenarios as usize;
    let work = || {
        let mut done = Vec::new();
        loop {
            let first = next.fetch_add(AT_A_TIME, Ordering::Relaxed);
            if first >= total {
                return done;
            }
            for number in first..(first + AT_A_TIME).min(total) {
                done.push((number, run_one(contender, seed.wrapping_add(number as u64))));
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut all = thread::scope(|scope| {
        let workers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for worker in workers {
            match worker.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, outcome)| outcome).collect()
}

fn run_one(contender: &Contender, seed: u64) -> Outcome {
    let scenario = Scenario::of(seed);
    let settings = contender.settings(scenario.limit, scenario.least_seconds());
    migrate(scenario, settings, contender.method)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::migration::End;
    use super::report::Row;
    use super::*;

    /// What the simulator is there to show, on fewer scenarios and other seeds than the table of
    /// `docs/convergence.md`.
    #[test]
    fn the_default_keeps_its_limits_and_predicts() {
        const SEED: u64 = 1 << 40;
        eprintln!("seed {SEED}");
        let [default, last] = ["ewma", "last-bandwidth-all-terms"].map(|name| {
            let contender = ALL.iter().find(|contender| contender.name == name).expect("a name");
            Row::of(contender, &run_all(contender, SEED, 500))
        });
        assert_eq!(default.overruns, 0, "{default:?}");
        assert!(default.prediction_error_p95 <= 0.25, "{default:?}");
        assert!(default.called_off < last.called_off, "{default:?} {last:?}");
        assert!(default.converged + default.throttled > 400, "{default:?}");
    }

    /// Guests that could leave with all that they ever write to, in half of the limit and more: over a link
    /// that is given up to a twentieth of what it carries while they run, and all of it when they stand
    /// still. A limit of the host is no reason to slow them down, whatever it makes of their rounds.
    #[test]
    fn no_guest_is_slowed_down_for_a_bandwidth_limit() {
        let mut limited = 0;
        for seed in 0..4000 {
            let mut scenario = Scenario::of(seed);
            let link = scenario.network.bytes_per_second;
            let last_pages = scenario.guest.written_pages() * 4096.0 / link;
            let needed = scenario.least_downtime() + last_pages;
            let as_it_is = scenario.network.step.is_none()
                && scenario.network.episodes_per_second == 0.0
                && scenario.network.channels.iter().all(|share| *share >= 1.0);
            if !as_it_is || needed > scenario.limit.as_secs_f64() * 0.5 {
                continue;
            }
            limited += 1;
            let share = [0.05, 0.2, 0.6][limited % 3];
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "positive, and far below 2^53"
            )]
            let limit = (link * share) as u64;
            scenario.bandwidth_limit = NonZeroU64::new(limit);
            let settings = ALL[0].settings(scenario.limit, scenario.least_seconds());
            let outcome = migrate(scenario, settings, ALL[0].method);
            assert_eq!(
                (outcome.throttle_percent, outcome.end),
                (0, End::Converged),
                "{seed}: {outcome:?}"
            );
            assert!(!outcome.overran(), "{seed}: {outcome:?}");
        }
        eprintln!("{limited} guests");
        assert!(limited > 20, "{limited}");
    }

    #[test]
    fn a_seed_repeats_itself_on_any_number_of_threads() {
        let once = format!("{:?}", run_all(&ALL[0], 7, 40));
        assert_eq!(once, format!("{:?}", run_all(&ALL[0], 7, 40)));
        let alone: Vec<_> = (7..47).map(|seed| run_one(&ALL[0], seed)).collect();
        assert_eq!(once, format!("{alone:?}"));
    }
}
