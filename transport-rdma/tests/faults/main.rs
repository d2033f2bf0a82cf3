//! Every step of a migration × what may happen to it, over RDMA. No relay can stand between two devices, so faults are
//! planted in the two sides: each is a process of its own, with a real guest, whose links stop at a given message until
//! they hear what becomes of it.
//!
//! A sample is taken, by a seed that is printed. `PAGEFERRY_SEED=N` repeats it, `PAGEFERRY_FAULTS=all` plays all cases
//! (`ci/soak --rdma-faults`), and `PAGEFERRY_FAULTS="DataReset at Prepare"` those whose name has that in it.

#[expect(dead_code, reason = "shared with the faults of what a relay can stand in")]
#[path = "../../../reference-vmm/tests/cli/faults/model.rs"]
mod model;
mod parent;
mod side;

use std::time::{SystemTime, UNIX_EPOCH};

use model::{Case, Fault, RDMA, Step};
use pageferry::testing::Random;

/// Cases of a sample. The machine that has the device is an emulated one.
const SAMPLE: usize = 8;

/// Whatever can be planted in the two sides, at each step.
fn all() -> Vec<Case> {
    let faults = [
        Fault::SourceKilled,
        Fault::DestinationKilled,
        Fault::SourceStopped,
        Fault::DestinationStopped,
        Fault::ControlReset,
        Fault::DataReset,
        Fault::BackInTime,
        Fault::BackTooLate,
    ];
    let at = |step| faults.map(|fault| Case { step, fault, transport: RDMA });
    let all = Step::ALL.into_iter().flat_map(at);
    // There are no data channels before, nor again yet on a link that comes back.
    let has_data = |step: Step| step >= Step::FirstRound && step.needs_a_cut_at().is_none();
    all.filter(|case| case.fault != Fault::DataReset || has_data(case.step)).collect()
}

/// A side of a case, or all that this is for.
fn main() {
    // Who only asks what there is to run has nothing to run without a device.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    if let Ok(role) = std::env::var(side::ROLE) {
        return side::play(&role);
    }
    let Ok(address) = std::env::var("PAGEFERRY_RDMA_ADDRESS") else {
        eprintln!("faults over RDMA skipped, because PAGEFERRY_RDMA_ADDRESS names no device");
        return;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let seed = std::env::var("PAGEFERRY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| now.subsec_nanos().into());
    let mut random = Random::new(seed);
    let mut cases: Vec<_> = all().into_iter().map(|case| (random.next_u64(), case)).collect();
    match std::env::var("PAGEFERRY_FAULTS") {
        Ok(all) if all == "all" => {}
        Ok(part) => cases.retain(|(_, case)| case.to_string().contains(&part)),
        Err(_) => {
            cases.sort_by_key(|(order, _)| *order);
            cases.truncate(SAMPLE);
        }
    }
    assert!(!cases.is_empty(), "no case has such a name");
    eprintln!("{} cases, PAGEFERRY_SEED={seed}", cases.len());
    let mut ends = Vec::new();
    let mut wrong = Vec::new();
    for (dice, case) in cases {
        let began = std::time::Instant::now();
        let (source, destination) = parent::play(case, dice, &address);
        eprintln!("{case}: {source:?}, {destination:?} in {:.1?}", began.elapsed());
        if !case.may_end(source, destination) {
            wrong.push(format!("{case}: {source:?} and {destination:?}"));
        }
        ends.push((case, (source, destination)));
    }
    eprintln!("{}", model::table(&ends));
    assert!(wrong.is_empty(), "PAGEFERRY_SEED={seed}:\n{}", wrong.join("\n"));
    side::told(&format!("test result: ok. {} passed; 0 failed", ends.len()));
}
