//! Migrations by the thousand, drawn from a seed.

use std::num::NonZeroU64;
use std::thread;
use std::time::Duration;

use pageferry::Error;
use pageferry::transport::LinkId;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use crate::guest::{PAGES, Stall, Write};
use crate::migration::{LinkLimits, Migration, play};

/// How long nothing may land where a channel falls silent, in many cases: half of it passes before the
/// channel is closed.
const STALL: Duration = Duration::from_secs(6);

fn a_script() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let write = (0..PAGES.len(), prop::bool::weighted(0.3));
    prop::collection::vec(prop::collection::vec(write, 0..3), 0..200)
}

/// Mostly none, since each costs time.
fn some_stalls() -> impl Strategy<Value = Vec<Stall>> {
    let stall = prop::sample::select(vec![Stall::Pages, Stall::Release]);
    prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec(stall, 1..3)]
}

/// A channel is lost, mostly in the middle of a stripe: each has some 30 pages to be sent in each of
/// its stripes, and it is known from few pages on in the first one.
fn a_loss() -> impl Strategy<Value = (u16, u64)> {
    (0_u16..3, prop_oneof![2 => 0_u64..20, 3 => 0_u64..200, 1 => 0_u64..500])
}

fn some_limits() -> impl Strategy<Value = LinkLimits> {
    let batch_pages = prop::sample::select(vec![1, 3, 16, 16, 128]);
    let limit = prop_oneof![3 => Just(None), 1 => Just(NonZeroU64::new(64 << 20))];
    (batch_pages, limit).prop_map(|(batch_pages, limit)| LinkLimits { batch_pages, limit })
}

fn a_migration() -> impl Strategy<Value = Migration> {
    // Mostly not silent, since that costs time.
    let loss = (prop::option::weighted(0.7, a_loss()), prop::bool::weighted(0.02));
    let faults = (loss, 0_usize..4, some_limits());
    let late_channel = prop::option::weighted(0.2, 0_u16..4);
    (a_script(), some_stalls(), 1_u16..5, faults, late_channel, any::<u64>()).prop_map(
        |(
            script,
            stalls,
            channels,
            ((lose_channel, silently), reorder_depth, link),
            late_channel,
            seed,
        )| {
            // The only channel cannot be made up for.
            let lose_channel = lose_channel.filter(|_| channels > 1);
            Migration {
                script,
                stalls,
                channels,
                silently: lose_channel.filter(|_| silently).map(|_| STALL),
                lose_channel,
                reorder_depth,
                late_channel,
                link,
                seed,
            }
        },
    )
}

/// `PAGEFERRY_CASES` migrations (a night's worth: 20,000 or more), by `PAGEFERRY_TEST_SEED`. They
/// mostly wait, so many go on at once.
#[test]
fn the_destination_ends_with_the_newest_bytes() {
    const AT_ONCE: u32 = 16;
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let cases = number("PAGEFERRY_CASES").unwrap_or(1000);
    let seed = number("PAGEFERRY_TEST_SEED").unwrap_or_else(|| {
        let id = LinkId::random().expect("random bytes");
        u64::from_le_bytes(id.0[..8].try_into().expect("eight bytes"))
    });
    eprintln!("newest bytes: {cases} cases, PAGEFERRY_TEST_SEED={seed}");
    let play_some = |part: u32| {
        let config = ProptestConfig {
            cases: u32::try_from(cases).expect("fewer cases").div_ceil(AT_ONCE),
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..12].copy_from_slice(&part.to_le_bytes());
        let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(config, random);
        let result = runner.run(&a_migration(), |migration| {
            let silently = migration.silently.is_some();
            match play(migration) {
                Ok(found) => prop_assert_eq!(found, (None, true)),
                // Nothing landed for so long because the machine had other things to do, which is no fault.
                // That the others take over is for a case of its own, with more time.
                Err(Error::TimedOut { what: "pages to land", after: STALL }) if silently => {}
                Err(error) => return Err(TestCaseError::fail(format!("kept: {error:?}"))),
            }
            Ok(())
        });
        result.unwrap_or_else(|failure| panic!("PAGEFERRY_TEST_SEED={seed}: {failure}"));
    };
    thread::scope(|scope| {
        for part in 0..AT_ONCE {
            scope.spawn(move || play_some(part));
        }
    });
}
