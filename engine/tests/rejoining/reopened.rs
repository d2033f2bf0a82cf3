//! Data channels that are lost while their link lives: another link has all of them.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pageferry::protocol::Kind;
use pageferry::testing::TestMemory;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::memory_transport;
use pageferry::transport::{Interrupt, Link, SourceLink, TransportError};

use crate::scene::Scene;
use crate::support::SoftwareLog;
use crate::trouble::{Told, meeting, number, scene_with, timeouts};

fn scene(told: &Told) -> Scene {
    let mut scene = scene_with(timeouts());
    scene.source = scene.source.on_event(told.sink());
    scene
}

/// Channel 1 is lost in the first round.
fn lost() -> Faults {
    Faults { lose_channel: Some((1, 300 * 4096)), ..Faults::default() }
}

#[test]
fn a_channel_that_is_lost_is_there_again_on_another_link() {
    let told = Told::default();
    let (dialler, rendezvous) = meeting(|link| if link == 0 { lost() } else { Faults::default() });
    // Of those that are left none counts as lost.
    let mut scene = scene(&told);
    scene.source = scene.source.channels(4);
    let outcome = scene.play_by(Box::new(dialler), Box::new(rendezvous));
    let (departed, arrived) = outcome.expect_moved();
    assert_eq!(told.all(), ["channel 1 lost", "1 reopened by 1", "there"]);
    for statistics in [&departed.statistics, &arrived.statistics] {
        let channels = (statistics.lost_channels, statistics.reopened_channels);
        assert_eq!((channels, statistics.rejoins), ((1, 1), 1));
    }
}

/// What the other channels had sent is not sent again.
#[test]
fn nothing_is_sent_again_for_the_sake_of_a_lost_channel_but_what_it_had_under_way() {
    let pages = |faults: Faults| {
        let told = Told::default();
        let mut scene = scene(&told);
        (scene.here, scene.there) = (TestMemory::new(&[20_000]), TestMemory::new(&[20_000]));
        (0..15_000).for_each(|page| scene.here.fill_page(0, page, 1));
        scene.log = SoftwareLog::new(&scene.here);
        // No page is dirtied on the way.
        scene.paused = true;
        scene.source = scene.source.verify(false);
        let (dialler, rendezvous) =
            meeting(move |link| if link == 0 { faults } else { Faults::default() });
        let outcome = scene.play_by(Box::new(dialler), Box::new(rendezvous));
        let rejoins = outcome.source.expect("it left").statistics.rejoins;
        let arrived = outcome.destination.expect("greeted").expect("it arrived");
        (rejoins, arrived.statistics.pages.data)
    };
    let (undisturbed, lost) = (pages(Faults::default()), pages(lost()));
    assert_eq!((undisturbed.0, lost.0), (0, 1));
    // A batch of 4 MiB that broke.
    let broken = 1024;
    assert!(lost.1 <= undisturbed.1 + broken, "{} pages, {} with a loss", undisturbed.1, lost.1);
}

/// The others go on, and a while later it can be.
#[test]
fn a_destination_that_cannot_be_reached_just_then_is_asked_again_later() {
    let told = Told::default();
    let (dialler, rendezvous) = memory_transport::meeting();
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
        let link_number = number(purpose);
        if link_number > 0 && counted.fetch_add(1, Ordering::Relaxed) == 0 {
            let address = "of the test".to_owned();
            let cause = ErrorKind::ConnectionRefused.into();
            return Err(TransportError::Connect { address, cause });
        }
        let faults = if link_number == 0 { lost() } else { Faults::default() };
        // The first round takes some seconds.
        let faults = Faults { rate: Some(2 << 20), ..faults };
        Ok(Box::new(FaultySource::new(Box::new(link), faults, link_number.into())))
    });
    let outcome = scene(&told).play_by(Box::new(dialler), Box::new(rendezvous));
    let (departed, _) = outcome.expect_moved();
    assert_eq!(attempts.load(Ordering::Relaxed), 2);
    assert_eq!(told.all(), ["channel 1 lost", "1 reopened by 2", "there"]);
    assert_eq!((departed.statistics.rejoins, departed.statistics.reopened_channels), (1, 1));
}

/// Then there is no link at all, and the next one has all channels too.
#[test]
fn a_link_for_lost_channels_may_be_lost_itself() {
    for kind in [Kind::Rejoin, Kind::Registered, Kind::Round] {
        let told = Told::default();
        let (dialler, rendezvous) = meeting(move |link| match link {
            0 => lost(),
            1 => Faults { cut_before_message: Some(kind as u16), ..Faults::default() },
            _ => Faults::default(),
        });
        let outcome = scene(&told).play_by(Box::new(dialler), Box::new(rendezvous));
        let (departed, arrived) = outcome.expect_moved();
        let reopened: &[&str] = if kind == Kind::Round { &["1 reopened by 1"] } else { &[] };
        let expected = [&["channel 1 lost"], reopened, &["lost", "rejoined 2", "there"]].concat();
        assert_eq!(told.all(), expected, "{kind}");
        assert_eq!(departed.statistics.reopened_channels, 1, "{kind}");
        assert_eq!(arrived.statistics.reopened_channels, 1, "{kind}");
    }
}

/// Each link loses one at once: what is left has to do, between attempts that get fewer.
#[test]
fn channels_that_are_lost_again_and_again_are_done_without() {
    let told = Told::default();
    let (dialler, rendezvous) = meeting(|_| lost());
    let (departed, _) =
        scene(&told).play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
    let statistics = &departed.statistics;
    assert!((1..=3).contains(&statistics.rejoins), "{:?}", told.all());
    assert!(statistics.lost_channels >= statistics.reopened_channels);
}

/// What ends then is no reason to give up the next links.
#[test]
fn a_link_may_be_lost_while_another_is_dialled_for_its_channels() {
    let told = Told::default();
    let (dialler, rendezvous) = memory_transport::meeting();
    let mut first: Option<Arc<dyn Interrupt>> = None;
    let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
        match number(purpose) {
            0 => first = Some(link.interrupter()),
            1 => {
                first.take().expect("it came before").interrupt();
                // A way that takes its time, in which whoever listens on the first link sees its end.
                std::thread::sleep(Duration::from_millis(300));
                let (address, cause) = ("of the test".to_owned(), ErrorKind::TimedOut.into());
                return Err(TransportError::Connect { address, cause });
            }
            _ => {}
        }
        let faults = if number(purpose) == 0 { lost() } else { Faults::default() };
        Ok(Box::new(FaultySource::new(Box::new(link), faults, 1)))
    });
    let outcome = scene(&told).play_by(Box::new(dialler), Box::new(rendezvous));
    outcome.expect_moved();
    assert_eq!(told.all(), ["channel 1 lost", "lost", "rejoined 2", "there"]);
}
