//! Others who come while the source of a lost link is waited for.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::protocol::{
    FailureReason, Hello, Kind, Message, MigrationKey, PROTOCOL_VERSION, Rejoin,
};
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::memory_transport;
use pageferry::transport::{Link, LinkPurpose, SourceLink};

use crate::trouble::{scene_with, timeouts};

const WAIT: Duration = Duration::from_secs(20);

fn rejoin(epoch: u32) -> Message {
    Message::Rejoin(Rejoin {
        oldest_version: PROTOCOL_VERSION,
        newest_version: PROTOCOL_VERSION,
        key: MigrationKey::random().unwrap(),
        epoch,
        rounds: 1,
        switchovers: 0,
        committed: true,
    })
}

#[test]
fn others_are_turned_away_and_disturb_nobody() {
    let scene = scene_with(timeouts());
    let layout = scene.here.memory().layout().clone();
    let (dialler, rendezvous) = memory_transport::meeting();
    let another = dialler.of_another();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&answers);
    let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
        if purpose == LinkPurpose::Begin {
            let faults =
                Faults { cut_before_message: Some(Kind::Switchover as u16), ..Faults::default() };
            return Ok(Box::new(FaultySource::new(Box::new(link), faults, 1)));
        }
        // Before the source is back: another guest, somebody with another key, silence that leaves, nonsense.
        let hello = Hello::new(MigrationKey::random().unwrap(), layout.clone(), 1, false, vec![]);
        let words = [Message::Hello(hello).encode(), rejoin(1).encode(), vec![], vec![255; 40]];
        for word in words {
            let mut other = another();
            let mut control = other.control().unwrap();
            if word.is_empty() {
                continue;
            }
            control.sender.send(&word, WAIT).unwrap();
            let answer = control.receiver.receive(Some(WAIT)).map(|frame| Message::decode(&frame));
            heard.lock().unwrap().push(answer.unwrap().unwrap());
        }
        Ok(Box::new(link))
    });
    let (departed, arrived) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
    assert_eq!((departed.statistics.rejoins, arrived.statistics.rejoins), (1, 1));
    let answers = answers.lock().unwrap();
    assert_eq!(answers.len(), 3);
    for answer in &*answers {
        let Message::Failed { reason, text } = answer else { panic!("{answer:?}") };
        assert_eq!(*reason, FailureReason::Declined);
        assert!(text.contains("a migration whose link was lost is waited for here"), "{text}");
    }
}

/// Somebody who has seen what a source said on an earlier link.
#[test]
fn what_was_said_before_is_of_no_use_again() {
    let scene = scene_with(timeouts());
    let (dialler, rendezvous) = memory_transport::meeting();
    let another = dialler.of_another();
    let said = Arc::new(Mutex::new(Vec::new()));
    let answers = Arc::new(Mutex::new(Vec::new()));
    let (seen, heard) = (Arc::clone(&said), Arc::clone(&answers));
    let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
        let LinkPurpose::Rejoin { epoch, .. } = purpose else {
            let faults =
                Faults { cut_before_message: Some(Kind::Switchover as u16), ..Faults::default() };
            return Ok(Box::new(FaultySource::new(Box::new(link), faults, 1)));
        };
        if epoch == 1 {
            let seen = Arc::clone(&seen);
            let link =
                pageferry::testing::WrappedSource::new(Box::new(link)).control(move |channel| {
                    let sender =
                        Box::new(Listened { sender: channel.sender, said: Arc::clone(&seen) });
                    pageferry::transport::ControlChannel { sender, receiver: channel.receiver }
                });
            let faults =
                Faults { cut_before_message: Some(Kind::Switchover as u16), ..Faults::default() };
            return Ok(Box::new(FaultySource::new(Box::new(link), faults, 1)));
        }
        let first = seen.lock().unwrap().first().cloned().expect("it was said");
        let mut other = another();
        let mut control = other.control().unwrap();
        control.sender.send(&first, WAIT).unwrap();
        let answer = control.receiver.receive(Some(WAIT)).map(|frame| Message::decode(&frame));
        heard.lock().unwrap().push(answer.unwrap().unwrap());
        Ok(Box::new(link))
    });
    let (departed, _) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
    assert_eq!(departed.statistics.rejoins, 2);
    let first = Message::decode(&said.lock().unwrap()[0]).unwrap();
    assert_eq!(first.kind(), Kind::Rejoin);
    let answers = answers.lock().unwrap();
    assert!(matches!(answers[..], [Message::Failed { .. }]), "{answers:?}");
}

struct Listened {
    sender: Box<dyn pageferry::transport::ControlSender>,
    said: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl pageferry::transport::ControlSender for Listened {
    fn send(
        &mut self,
        frame: &[u8],
        timeout: Duration,
    ) -> Result<(), pageferry::transport::TransportError> {
        self.said.lock().unwrap().push(frame.to_vec());
        self.sender.send(frame, timeout)
    }
}
