//! Every step of a migration × everything that may happen to it. Two processes with a real guest, and a relay between
//! them that knows their messages, so that each case happens at its very step.
//!
//! A sample is taken, by a seed that is printed. `PAGEFERRY_SEED=N` repeats it, `PAGEFERRY_FAULTS=all` plays all cases
//! (`ci/soak --faults`), and `PAGEFERRY_FAULTS="Flipped at Prepare over tcp"` those whose name has that in it.

mod case;
mod model;
mod path;

use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use pageferry_tcp::preamble::Kind;

use crate::support::peer::Noise;
use crate::support::sides::{BUSY, TIGHT, destination, source_of};

use model::{Case, End, table};
use path::Path;

/// Cases of a sample.
const SAMPLE: usize = 48;
/// Cases at a time: most of each is waiting.
const AT_ONCE: usize = 4;

/// A case, and dice for what it leaves open.
type Thrown = (Case, u64);

/// The cases to play.
fn chosen(seed: u64) -> Vec<Thrown> {
    let mut noise = Noise(seed);
    let all = Case::all().into_iter();
    let mut cases: Vec<_> = all.map(|case| (noise.next(), (case, noise.next()))).collect();
    match std::env::var("PAGEFERRY_FAULTS") {
        Ok(all) if all == "all" => {}
        Ok(part) => cases.retain(|(_, (case, _))| case.to_string().contains(&part)),
        Err(_) => {
            cases.sort_by_key(|(order, _)| *order);
            cases.truncate(SAMPLE);
        }
    }
    cases.into_iter().map(|(_, thrown)| thrown).collect()
}

/// How a case ended, and whether it may.
fn play((case, dice): Thrown) -> (Option<(End, End)>, Result<(), String>) {
    let Ok(outcome) = catch_unwind(|| case::play(case, dice)) else {
        return (None, Err(format!("{case}: see above")));
    };
    let (source, destination) = outcome.ends;
    eprintln!("{case}: {source:?}, {destination:?} in {:.1?}", outcome.took);
    let may_end = case.may_end(source, destination).then_some(()).ok_or_else(|| {
        let delivered = case.delivered();
        let (here, there) = (case.source_ends(delivered), case.destination_ends(delivered));
        format!("{case}: {source:?} and {destination:?}, not of {here:?} and {there:?}")
    });
    (Some(outcome.ends), may_end)
}

#[test]
fn whatever_happens_to_a_migration_it_ends_as_the_model_says() {
    let seed = std::env::var("PAGEFERRY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        u64::from(now.subsec_nanos())
    });
    let cases = chosen(seed);
    assert!(!cases.is_empty(), "no case has such a name");
    eprintln!("{} cases, PAGEFERRY_SEED={seed}", cases.len());
    let (next, ends, wrong) =
        (AtomicUsize::new(0), Mutex::<Vec<_>>::default(), Mutex::<Vec<_>>::default());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(cases.len()) {
            scope.spawn(|| {
                while let Some(thrown) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (ended, may_end) = play(*thrown);
                    let ended = ended.map(|ended| (thrown.0, ended));
                    ends.lock().unwrap_or_else(PoisonError::into_inner).extend(ended);
                    wrong.lock().unwrap_or_else(PoisonError::into_inner).extend(may_end.err());
                }
            });
        }
    });
    let ends = ends.into_inner().unwrap_or_else(PoisonError::into_inner);
    let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    eprintln!("{}", table(&ends));
    assert!(wrong.is_empty(), "PAGEFERRY_SEED={seed}:\n{}", wrong.join("\n"));
}

/// Of two ways to the destination one is gone in the middle, with the control connection: the link comes back by the
/// other.
#[test]
fn a_guest_moves_on_by_another_way_when_one_is_gone() {
    let (mut destination, address) = destination(&[]);
    let ways = [Path::to(&address, &[]), Path::to(&address, &[])];
    let more = ["--channels=4", "--dirty-rate=20000", "--verify", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, TIGHT, &more].concat());
    source.say(format!("migrate {},{}", ways[0].address, ways[1].address));
    source.await_message("round 1: ");
    assert!(ways.iter().all(|way| way.connections() > 1), "channels go by one way only");
    ways[0].cut_for_good();
    source.await_message("the link is back");
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    departed.assert_departed();
    arrived.assert_arrived();
    assert_eq!(departed.count("rejoins"), 1, "{departed:?}");
}

/// A data channel alone is reset, three times: each time another link has all of them, and nobody waits for anything.
fn assert_channels_come_back(both: &[&str]) {
    let (mut destination, address) = destination(both);
    let path = Path::to(&address, &[]);
    let more = ["--channels=2", "--dirty-rate=20000", "--verify", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, TIGHT, &more, both].concat());
    source.say(format!("migrate {}", path.address));
    source.await_message("round 1: ");
    for _ in 0..3 {
        assert!(path.reset(|kind| kind == Kind::Data { channel: 1 }) > 0);
        source.await_message("data channels that were lost are there again");
    }
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    departed.assert_departed();
    arrived.assert_arrived();
    for report in [&departed, &arrived] {
        let counts = ["lost_channels", "reopened_channels", "rejoins"];
        assert_eq!(counts.map(|count| report.count(count)), [3, 3, 3], "{report:?}");
    }
}

#[test]
fn a_data_channel_that_is_reset_is_there_again_by_tcp() {
    assert_channels_come_back(&["--transport=tcp"]);
}

#[test]
fn a_data_channel_that_is_reset_is_there_again_by_io_uring() {
    assert_channels_come_back(&["--transport=auto"]);
}
