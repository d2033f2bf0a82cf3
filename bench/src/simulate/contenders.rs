//! Who is compared: estimators under one policy, and policies with one estimator.

use std::time::Duration;

use pageferry::convergence::{Averaging, Bound, Method, Policy, Settings, Throttling};

/// One way to decide.
#[derive(Debug, Clone, Copy)]
pub(super) struct Contender {
    /// As the JSON object has it.
    pub(super) name: &'static str,
    /// For people.
    pub(super) description: &'static str,
    pub(super) method: Method,
    pub(super) bound: Bound,
    pub(super) policy: Policy,
}

const THROTTLE: Policy =
    Policy::Throttle(Throttling { first_percent: 20, step_percent: 10, max_percent: 99 });

const fn estimator(
    name: &'static str,
    description: &'static str,
    averaging: Averaging,
) -> Contender {
    let method = Method { averaging, cautious: true, all_terms: true };
    Contender { name, description, method, bound: Bound::Strict, policy: THROTTLE }
}

const fn policy(name: &'static str, description: &'static str, policy: Policy) -> Contender {
    Contender { policy, ..estimator(name, description, Averaging::Ewma) }
}

/// As QEMU decides: what remains over the bandwidth of the last window, and nothing else.
const LAST_BANDWIDTH: Method =
    Method { averaging: Averaging::Last, cautious: false, all_terms: false };

/// The first is the engine's default.
pub(super) const ALL: [Contender; 10] = [
    estimator("ewma", "exponential average of windows (the default)", Averaging::Ewma),
    estimator("harmonic", "harmonic mean of windows", Averaging::Harmonic),
    estimator("mean", "all bytes by all time", Averaging::Mean),
    estimator("last-window", "last window, all terms, with uncertainty", Averaging::Last),
    Contender {
        method: Method { all_terms: true, ..LAST_BANDWIDTH },
        ..estimator("last-bandwidth-all-terms", "last bandwidth, and all terms", Averaging::Last)
    },
    Contender {
        method: LAST_BANDWIDTH,
        ..estimator("last-bandwidth", "last bandwidth as QEMU has it", Averaging::Last)
    },
    Contender {
        method: LAST_BANDWIDTH,
        bound: Bound::BestEffort,
        ..estimator(
            "last-bandwidth-no-way-back",
            "last bandwidth, and no way back",
            Averaging::Last,
        )
    },
    policy("keep-trying", "default estimator, never throttled", Policy::KeepTrying),
    policy("post-copy", "default estimator, post-copy if need be", Policy::PostCopy),
    policy("give-up", "default estimator, gives up early", Policy::GiveUp),
];

impl Contender {
    pub(super) fn settings(&self, downtime_limit: Duration, least_seconds: f64) -> Settings {
        // As the engine's own, but that rounds of milliseconds fill minutes by the thousand.
        let deadline = Some(Duration::from_secs_f64(least_seconds.max(30.0)));
        Settings {
            max_rounds: 200,
            switchover_bandwidth: None,
            downtime_limit,
            bound: self.bound,
            policy: self.policy,
            deadline,
        }
    }
}
