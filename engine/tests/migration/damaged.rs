//! Pages that are changed between the two sides.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pageferry::memory::{GuestMemory, PageRange};
use pageferry::protocol::Message;
use pageferry::testing::WrappedSource;
use pageferry::transport::{
    Capabilities, ChannelCounters, ControlChannel, ControlReceiver, Interrupt, PageSender, Run,
    RunKind, SourceLink, Ticket, TransportError, Watermarks,
};
use pageferry::{Blame, Error, Event, PageChecks, SwitchoverStage};

use crate::scene::{Outcome, Scene, WORKING_SET};

/// A channel whose page bytes have a bit changed on the way, so many times: in guest memory for as long as it takes to
/// send them, since this transport takes them from there at once.
struct Damaging {
    inner: Box<dyn PageSender>,
    memory: Arc<GuestMemory>,
    left: Arc<AtomicU32>,
}

impl Damaging {
    /// Pages that the guest leaves alone.
    fn still(runs: &[Run]) -> Vec<PageRange> {
        let pages = runs.iter().filter(|run| run.kind == RunKind::Data).flat_map(|run| {
            let PageRange { region, first_page, pages } = run.range;
            let pages = first_page..first_page + u64::from(pages);
            pages.map(move |first_page| PageRange { region, first_page, pages: 1 })
        });
        pages.filter(|page| page.region > 0 || page.first_page >= WORKING_SET).collect()
    }

    fn flip(&self, pages: &[PageRange]) {
        let mut bytes = Vec::new();
        for page in pages {
            self.memory.copy_out(*page, &mut bytes).unwrap();
            bytes[77] ^= 0x10;
            self.memory.copy_in(*page, &bytes).unwrap();
        }
    }
}

impl PageSender for Damaging {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        let less = |left: u32| left.checked_sub(1);
        let mut pages = Self::still(runs);
        if pages.is_empty()
            || self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_err()
        {
            pages.clear();
        }
        self.flip(&pages);
        let sent = self.inner.send(runs);
        self.flip(&pages);
        sent
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
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

/// Has the destination's word of damaged pages come late.
struct Late(Box<dyn ControlReceiver>, Duration);

impl ControlReceiver for Late {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let frame = self.0.receive(timeout)?;
        let message = Message::decode(&frame);
        if matches!(message, Ok(Message::Prepared(prepared)) if !prepared.damaged.is_empty()) {
            std::thread::sleep(self.1);
        }
        Ok(frame)
    }
}

/// Of a transport that is as `capabilities` make of this one.
fn play(
    scene: Scene,
    damages: u32,
    capabilities: impl Fn(Capabilities) -> Capabilities + Send + 'static,
) -> Outcome {
    play_late(scene, damages, Duration::ZERO, capabilities)
}

fn play_late(
    scene: Scene,
    damages: u32,
    late: Duration,
    capabilities: impl Fn(Capabilities) -> Capabilities + Send + 'static,
) -> Outcome {
    let (memory, left) = (Arc::clone(scene.here.memory()), Arc::new(AtomicU32::new(damages)));
    scene.play(|link| -> Box<dyn SourceLink> {
        let channels = move |_, inner| -> Box<dyn PageSender> {
            let (memory, left) = (Arc::clone(&memory), Arc::clone(&left));
            Box::new(Damaging { inner, memory, left })
        };
        let control = move |ControlChannel { sender, receiver }| ControlChannel {
            sender,
            receiver: Box::new(Late(receiver, late)),
        };
        let link = WrappedSource::new(link).capabilities(capabilities);
        Box::new(link.control(control).channels(channels))
    })
}

/// Without the digest of all memory, which would find it too, and not mend it.
fn scene(checks: PageChecks) -> Scene {
    let mut scene = Scene::new();
    scene.source = scene.source.verify(false).page_checks(checks);
    scene
}

/// A page that the guest does not write, and that is otherwise there.
fn difference(outcome: &Outcome) -> Option<(u16, u64)> {
    let pages = (WORKING_SET..3000).map(|page| (0, page)).chain((0..700).map(|page| (1, page)));
    let differs = |(region, page): &(u16, u64)| {
        outcome.here.read(*region, *page) != outcome.there.read(*region, *page)
    };
    pages.into_iter().find(differs)
}

fn unprotected(capabilities: Capabilities) -> Capabilities {
    Capabilities { protects_pages: false, ..capabilities }
}

#[test]
fn pages_that_arrive_damaged_are_sent_again() {
    for (damages, checks) in [(1, PageChecks::On), (3, PageChecks::Auto), (20, PageChecks::Auto)] {
        let called_off = Arc::new(AtomicU32::new(0));
        let heard = Arc::clone(&called_off);
        let mut scene = scene(checks);
        scene.source = scene.source.on_event(move |event| {
            if let Event::CalledOff { stage: Some(SwitchoverStage::DamagedPages), .. } = event {
                heard.fetch_add(1, Ordering::SeqCst);
            }
        });
        let outcome = play(scene, damages, unprotected);
        assert_eq!(difference(&outcome), None, "{damages} damages");
        let departed = outcome.source.expect("the source hands over");
        let arrived = outcome.destination.expect("the greeting fits").expect("the guest arrives");
        assert!(arrived.machine.is_running() && !departed.machine.is_running());
        let called_off = called_off.load(Ordering::SeqCst);
        assert!(called_off > 0 && departed.statistics.damaged_pages > 0, "{damages} damages");
        assert_eq!(departed.statistics.switchover_attempts, 1 + called_off);
    }
}

/// After the switchover was called off for taking too long.
#[test]
fn word_of_damaged_pages_counts_also_when_it_comes_late() {
    let late = Duration::from_millis(400);
    let mut scene = scene(PageChecks::On);
    scene.source = scene.source.downtime_limit(late / 2);
    let outcome = play_late(scene, 3, late, unprotected);
    assert_eq!(difference(&outcome), None);
    let departed = outcome.source.expect("the source hands over");
    assert!(
        departed.statistics.damaged_pages > 0 && departed.statistics.called_off > Duration::ZERO
    );
}

/// What the checks are good for: nobody would know.
#[test]
fn unchecked_pages_arrive_damaged() {
    for (checks, protects_pages) in [(PageChecks::Off, false), (PageChecks::Auto, true)] {
        let outcome = play(scene(checks), 3, move |it| Capabilities { protects_pages, ..it });
        assert!(difference(&outcome).is_some(), "{checks:?}");
        outcome.source.expect("the source hands over");
    }
}

#[test]
fn a_link_that_damages_whatever_is_sent_is_given_up_and_the_guest_stays() {
    let outcome = play(scene(PageChecks::On), u32::MAX, unprotected);
    let (error, destination) = outcome.expect_kept();
    let Error::PagesDamaged { times, .. } = error else { panic!("{error:?}") };
    assert_eq!((times, error.blame()), (9, Blame::Transport));
    let destination = destination.expect("it failed too").to_string();
    assert!(destination.contains("pages arrived otherwise"), "{destination}");
}

/// The destination sees no page land, as over RDMA: some pages are compared.
#[test]
fn damage_of_a_one_sided_transport_is_found_by_samples() {
    let one_sided = |capabilities| Capabilities {
        one_sided_write: true,
        tells_landings: false,
        ..unprotected(capabilities)
    };
    let (error, destination) = play(scene(PageChecks::Auto), u32::MAX, one_sided).expect_kept();
    assert_eq!(error.blame(), Blame::PeerFailed, "{error:?}");
    assert!(matches!(destination, Some(Error::SamplesDiffer { of: 256, .. })), "{destination:?}");
    // And nothing else is taken for damage.
    let outcome = play(scene(PageChecks::Auto), 0, one_sided);
    assert_eq!(outcome.source.expect("it hands over").statistics.damaged_pages, 0);
}

#[test]
fn checks_that_a_transport_has_no_way_for_are_refused() {
    let untold = |capabilities| Capabilities { tells_landings: false, ..unprotected(capabilities) };
    let (error, _) = play(scene(PageChecks::On), 0, untold).expect_kept();
    assert_eq!(error.blame(), Blame::Configuration, "{error:?}");
    // Not asked for, they are done without.
    play(scene(PageChecks::Auto), 0, untold).source.expect("it hands over");
}
