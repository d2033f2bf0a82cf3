//! Whatever writes come between harvest, re-arm, read and send, the destination ends with the
//! newest bytes.
//!
//! The guest is a script: a few writes at every step of the engine that could lose one. What each
//! page holds last is known from the script alone, by a model that knows no threads, channels or
//! bitmaps. The tracker is as unforgiving as its contract allows: it reports a write only to a
//! page that was armed.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use pageferry::convergence::Bound;
use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::memory::GuestMemory;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::{
    Capabilities, ChannelCounters, ControlChannel, DestinationLink, Interrupt, Link, MigrationId,
    PageReceiver, PageSender, Received, Registration, Run, SourceLink, Ticket, TransportError,
    Watermarks,
};
use pageferry::{Destination, Error, GuestAtSource, Machine, MachineError, Source, Timeouts};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

/// How long nothing may land where a channel falls silent, in many cases: half of it passes before the
/// channel is closed.
const STALL: Duration = Duration::from_secs(6);

/// Small enough that pages are written many times, in several stripes and two regions.
const REGION_PAGES: [u64; 2] = [1100, 70];

/// Pages that the script writes: on both sides of every bound of words, stripes and regions.
const PAGES: [(u16, u64); 10] = [
    (0, 0),
    (0, 63),
    (0, 64),
    (0, 511),
    (0, 512),
    (0, 1023),
    (0, 1024),
    (0, 1099),
    (1, 0),
    (1, 69),
];

/// One write of the script: which of [`PAGES`], and whether it makes it zero.
type Write = (usize, bool);

/// What makes a switchover take too long, so that it is called off and the guest writes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stall {
    /// The last pages do not get through, and do later.
    Pages,
    /// The machine takes its time to release what it holds, right before the commit.
    Release,
}

/// The downtime limit where there are stalls. Without, a limit that no guest meets which still has
/// something to write.
const LIMIT: Duration = Duration::from_millis(60);

struct Guest {
    memory: TestMemory,
    state: Mutex<State>,
}

struct State {
    /// What comes at the next steps, the last first.
    script: Vec<Vec<Write>>,
    /// Of the switchovers to come, the last first.
    stalls: Vec<Stall>,
    paused: bool,
    version: u64,
    /// The model: the version that each page holds, 0 for zero.
    newest: [u64; PAGES.len()],
    /// The tracker.
    armed: DirtyBitmap,
    dirty: DirtyBitmap,
}

impl Guest {
    fn new(script: Vec<Vec<Write>>, stalls: Vec<Stall>) -> Arc<Self> {
        let memory = TestMemory::new(&REGION_PAGES);
        let layout = memory.memory().layout().clone();
        let state = State {
            script,
            stalls,
            paused: false,
            version: 0,
            newest: [0; PAGES.len()],
            // Nothing is known of writes before the first re-arm, and nothing needs to be.
            armed: DirtyBitmap::new(&layout),
            dirty: DirtyBitmap::new(&layout),
        };
        Arc::new(Self { memory, state: Mutex::new(state) })
    }

    /// The engine is about to do something, or has done it: the guest writes.
    fn step(&self) {
        let mut state = self.state.lock().unwrap();
        if state.paused {
            return;
        }
        for (index, zero) in state.script.pop().unwrap_or_default() {
            let (region, page) = PAGES[index];
            state.version += 1;
            let version = if zero { 0 } else { state.version };
            write(&self.memory, index, version);
            state.newest[index] = version;
            if state.armed.get(region, page) {
                clear(&mut state.armed, region, page);
                state.dirty.set(region, page);
            }
        }
    }
}

impl Guest {
    /// Takes too long if this is what the paused guest is to be held up by.
    fn stall(&self, stall: Stall) {
        let mut state = self.state.lock().unwrap();
        if state.paused && state.stalls.last() == Some(&stall) {
            state.stalls.pop();
            drop(state);
            thread::sleep(LIMIT);
        }
    }
}

/// Every byte of a page says its version, as far as a byte can.
fn write(memory: &TestMemory, index: usize, version: u64) {
    let (region, page) = PAGES[index];
    memory.write(region, page, &version.to_le_bytes().repeat(512));
}

fn clear(bitmap: &mut DirtyBitmap, region: u16, page: u64) {
    let word = usize::try_from(page / 64).unwrap();
    bitmap.region_words_mut(region)[word] &= !(1 << (page % 64));
}

struct Tracker(Arc<Guest>);

impl DirtySource for Tracker {
    fn name(&self) -> &'static str {
        "unforgiving"
    }

    fn start(&self) -> Result<(), DirtyError> {
        // Writes from here on are reported: the engine sends every page once anyway, and re-arms
        // it before.
        self.0.state.lock().unwrap().armed.fill();
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.0.step();
        into.merge(&self.0.state.lock().unwrap().dirty);
        self.0.step();
        Ok(())
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.0.step();
        {
            let state = &mut *self.0.state.lock().unwrap();
            state.armed.merge_words(region, first_page, words);
            let first = usize::try_from(first_page / 64).unwrap();
            let dirty = &mut state.dirty.region_words_mut(region)[first..];
            dirty.iter_mut().zip(words).for_each(|(dirty, word)| *dirty &= !word);
        }
        self.0.step();
        Ok(())
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.0.state.lock().unwrap().dirty.merge(pages);
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// Takes steps around every batch.
struct Stepping {
    inner: Box<dyn SourceLink>,
    guest: Arc<Guest>,
    batch_pages: u64,
}

impl Link for Stepping {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_batch_bytes: self.batch_pages * 4096, ..self.inner.capabilities() }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.inner.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.inner.register(memory)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl SourceLink for Stepping {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let senders = self.inner.open_senders(channels)?.into_iter();
        Ok(senders
            .map(|inner| -> Box<dyn PageSender> {
                Box::new(SteppingSender { inner, guest: Arc::clone(&self.guest) })
            })
            .collect())
    }
}

struct SteppingSender {
    inner: Box<dyn PageSender>,
    guest: Arc<Guest>,
}

impl PageSender for SteppingSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.guest.step();
        self.guest.stall(Stall::Pages);
        let ticket = self.inner.send(runs)?;
        self.guest.step();
        Ok(ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        // Waiting goes on for as long as it takes, and would use up the script.
        if wait.is_none() {
            self.guest.step();
        }
        self.inner.watermarks(wait)
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.inner.finish()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

/// A destination that leaves one channel's batches lying until the others bring no more.
struct Late {
    inner: Box<dyn DestinationLink>,
    channel: u16,
}

/// No batch for so long: they wait for this one.
const QUIET: Duration = Duration::from_millis(50);

impl Link for Late {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.inner.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.inner.register(memory)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl DestinationLink for Late {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let (batch, batches) = crossbeam_channel::unbounded();
        let receivers = (0..).zip(self.inner.open_receivers(channels, timeout)?);
        Ok(receivers
            .map(|(channel, inner)| -> Box<dyn PageReceiver> {
                let late = (channel == self.channel).then(|| batches.clone());
                Box::new(LateReceiver { inner, late, batch: batch.clone() })
            })
            .collect())
    }
}

struct LateReceiver {
    inner: Box<dyn PageReceiver>,
    /// Batches of the others, until this channel has let them go first.
    late: Option<Receiver<()>>,
    batch: Sender<()>,
}

impl PageReceiver for LateReceiver {
    fn receive(&mut self) -> Result<Received, TransportError> {
        if let Some(batches) = self.late.take() {
            while batches.recv_timeout(QUIET).is_ok() {}
        }
        let received = self.inner.receive()?;
        self.batch.send(()).ok();
        Ok(received)
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

/// Pauses the script; has no state but its memory.
struct Scripted(Arc<Guest>);

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

impl Machine for Scripted {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.0.step();
        self.0.state.lock().unwrap().paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.0.state.lock().unwrap().paused = false;
        self.0.step();
        Ok(())
    }

    fn save(&mut self, _state: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(())
    }

    fn load(&mut self, _state: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }

    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.0.stall(Stall::Release);
        Ok(())
    }

    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

fn a_script() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let write = (0..PAGES.len(), prop::bool::weighted(0.3));
    prop::collection::vec(prop::collection::vec(write, 0..3), 0..200)
}

/// Mostly none, since each costs time.
fn some_stalls() -> impl Strategy<Value = Vec<Stall>> {
    let stall = prop::sample::select(vec![Stall::Pages, Stall::Release]);
    prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec(stall, 1..3)]
}

/// What makes batches short, so that a stripe is sent in several.
#[derive(Debug, Clone, Copy)]
struct LinkLimits {
    batch_pages: u64,
    /// Page bytes a second.
    limit: Option<NonZeroU64>,
}

const SHORT_BATCHES: LinkLimits = LinkLimits { batch_pages: 16, limit: None };

/// A guest's script, and what happens to its link meanwhile.
#[derive(Debug, Clone)]
struct Migration {
    script: Vec<Vec<Write>>,
    stalls: Vec<Stall>,
    channels: u16,
    /// A channel that is lost, once so many pages have gone out on it.
    lose_channel: Option<(u16, u64)>,
    /// Nobody is told: it falls silent, and is closed after half the time in which anything must land.
    silently: Option<Duration>,
    reorder_depth: usize,
    late_channel: Option<u16>,
    link: LinkLimits,
    seed: u64,
}

/// Returns the first of [`PAGES`] that does not hold its newest bytes at the destination, and whether
/// memory is the same otherwise; or why the guest was kept.
fn play(migration: Migration) -> Result<(Option<(u16, u64)>, bool), Error> {
    let Migration { script, stalls, channels, reorder_depth, late_channel, link, seed, .. } =
        migration;
    let lose_channel = migration.lose_channel.map(|(channel, pages)| (channel, pages * 4096));
    let faults = Faults { reorder_depth, ..Faults::default() };
    let (faults, timeouts) = match migration.silently {
        Some(stall) => (
            Faults { silent_channel: lose_channel, ..faults },
            Timeouts { stall, ..Timeouts::default() },
        ),
        None => (Faults { lose_channel, ..faults }, Timeouts::default()),
    };
    let (stalled, wanted) = (!stalls.is_empty(), stalls.len());
    let guest = Guest::new(script, stalls);
    // Something to send between the pages of the script.
    (0..1100).step_by(3).for_each(|page| guest.memory.fill_page(0, page, seed));
    PAGES.iter().enumerate().for_each(|(index, _)| write(&guest.memory, index, 0));
    let there = TestMemory::new(&REGION_PAGES);
    let (here_link, there_link) = memory_transport::pair();
    let stepping = Stepping {
        inner: Box::new(FaultySource::new(Box::new(here_link), faults, seed)),
        guest: Arc::clone(&guest),
        batch_pages: link.batch_pages,
    };
    let there_link: Box<dyn DestinationLink> = match late_channel {
        Some(channel) => Box::new(Late { inner: Box::new(there_link), channel }),
        None => Box::new(there_link),
    };
    let nobody = Guest::new(Vec::new(), Vec::new());
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new().negotiate(there_link).unwrap();
            offer.receive(Scripted(nobody), there.memory()).map(drop)
        });
        let dirty = DirtySources::new(vec![Box::new(Tracker(Arc::clone(&guest)))]);
        let source = if stalled {
            Source::new().downtime_limit(LIMIT)
        } else {
            // Rounds for as long as the script goes on.
            Source::new().downtime_limit(Duration::from_millis(1)).bound(Bound::BestEffort)
        };
        source.handle().limit_bandwidth(link.limit);
        let outcome = source.channels(channels).timeouts(timeouts).max_rounds(10_000).migrate(
            Scripted(Arc::clone(&guest)),
            guest.memory.memory(),
            dirty,
            Box::new(stepping),
        );
        let arrived = receiving.join().unwrap();
        let departed = match outcome {
            Ok(departed) => departed,
            Err(failure) => {
                assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
                assert!(arrived.is_err(), "two guests");
                return Err(failure.error);
            }
        };
        arrived.unwrap();
        // Stalls are noticed; one switchover may have those of several channels.
        let stalls = wanted - guest.state.lock().unwrap().stalls.len();
        let attempts = departed.statistics.switchover_attempts;
        assert!(stalls == 0 || attempts > 1, "{attempts} switchovers with {stalls} stalls");
        assert_eq!(departed.statistics.called_off > Duration::ZERO, attempts > 1);
        Ok(())
    })?;
    let newest = guest.state.lock().unwrap().newest;
    let stale = PAGES.into_iter().zip(newest).find(|((region, page), version)| {
        there.read(*region, *page) != version.to_le_bytes().repeat(512)
    });
    Ok((stale.map(|(page, _)| page), guest.memory.first_difference(&there).is_none()))
}

/// The destination has the newest bytes.
fn assert_newest(migration: Migration) {
    match play(migration) {
        Ok(found) => assert_eq!(found, (None, true)),
        Err(error) => panic!("the guest was kept: {error:?}"),
    }
}

/// A guest that writes on after each way of calling a switchover off, over channels that are lost
/// and lag.
#[test]
fn what_is_written_after_a_switchover_was_called_off_is_not_lost() {
    let script = vec![vec![(6, false), (0, false), (9, true)]; 3000];
    for stalls in [vec![Stall::Pages], vec![Stall::Release], vec![Stall::Release, Stall::Pages]] {
        let migration = Migration {
            script: script.clone(),
            stalls,
            channels: 3,
            lose_channel: Some((1, 40)),
            silently: None,
            reorder_depth: 0,
            late_channel: None,
            link: SHORT_BATCHES,
            seed: 1,
        };
        assert_newest(migration);
    }
}

/// The same where a channel falls silent, so that nobody but the source can know.
#[test]
fn what_a_silent_channel_had_under_way_is_not_lost() {
    let migration = Migration {
        script: vec![vec![(6, false), (0, false), (9, true)]; 3000],
        stalls: vec![Stall::Release],
        channels: 3,
        lose_channel: Some((1, 40)),
        silently: Some(Timeouts::default().stall),
        reorder_depth: 0,
        late_channel: Some(2),
        link: SHORT_BATCHES,
        seed: 1,
    };
    assert_newest(migration);
}

/// The third page of a stripe that changes hands between two channels when a third one is lost,
/// while its first owner's batches are still under way.
#[test]
fn what_a_former_owner_sent_does_not_land_on_newer_bytes() {
    let migration = Migration {
        script: vec![vec![(6, false)]; 2000],
        stalls: Vec::new(),
        channels: 3,
        lose_channel: Some((1, 0)),
        silently: None,
        reorder_depth: 0,
        late_channel: Some(2),
        link: SHORT_BATCHES,
        seed: 1,
    };
    assert_newest(migration);
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
        let id = MigrationId::random().expect("random bytes");
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
