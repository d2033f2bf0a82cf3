use super::*;
use crate::testing::memory_transport;
use crate::threads::StdThreads;
use crate::transport::Link;

type Wait = fn(&mut Session<u32>, Patience) -> Result<Item<u32>, Error>;

/// A session, and the other end of its link.
fn session() -> (Session<u32>, ControlChannel, impl Sized) {
    let (mut source, mut destination) = memory_transport::pair();
    let settings = SessionSettings {
        side: Side::Source,
        spawn: Arc::new(StdThreads),
        shared: Shared::new(),
        send_timeout: Duration::from_secs(9),
        life_signs: None,
    };
    let opened = Session::on(&mut source, settings, Conversation::default());
    (opened.unwrap(), destination.control().unwrap(), destination)
}

#[test]
fn who_never_stops_talking_does_not_hold_a_driver() {
    let (mut session, _theirs, _destination) = session();
    let feed = session.feed();
    for wait in [Session::next as Wait, Session::next_committed] {
        let patience = Patience::now("silence", Duration::from_millis(20));
        let error = loop {
            assert!(patience.since.elapsed() < Duration::from_secs(10), "it is held");
            // There is always something to hear.
            feed.send(Input::Report(7)).unwrap();
            match wait(&mut session, patience) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::TimedOut { what: "silence", .. }), "{error:?}");
    }
}

#[test]
fn a_link_that_was_ended_for_what_the_peer_said_is_explained_by_that() {
    for (said, expected) in [
        (Message::Pong { number: 1 }.encode(), "it sent pong at the stage silence"),
        (vec![255], "the peer misbehaved"),
    ] {
        let (mut session, mut theirs, _destination) = session();
        theirs.sender.send(&said, Duration::from_secs(9)).unwrap();
        // As a send finds it that was interrupted for that.
        let error = session.explain(Error::Transport(TransportError::Closed));
        assert!(error.chain().to_string().contains(expected), "{error:?}");
    }
}
#[test]
fn who_has_said_the_last_word_goes_on_with_nothing_and_says_it_once() {
    let (mut session, mut theirs, _destination) = session();
    let wait = Some(Duration::from_secs(9));
    let error = session.wait_in(|| {
        theirs.sender.send(&[255], Duration::from_secs(9)).unwrap();
        let told = Message::decode(&theirs.receiver.receive(wait).unwrap()).unwrap();
        assert!(matches!(told, Message::Failed { .. }), "{told:?}");
        // As a call that ends well at the same moment.
        Ok(())
    });
    let error = error.expect_err("the last word is out");
    assert!(matches!(error, Error::PeerMisbehaved(_)), "{error:?}");
    session.tell(&error);
    drop(session);
    let end = theirs.receiver.receive(wait);
    assert!(matches!(end, Err(TransportError::Closed)), "{end:?}");
}
#[test]
fn a_link_that_was_ended_for_what_is_no_frame_is_explained_by_that() {
    let (mut session, _theirs, _destination) = session();
    let nonsense = Error::Transport(TransportError::Violation("nonsense"));
    session.feed().send(Input::ControlEnded(nonsense)).unwrap();
    session.shared().end_peer(None);
    let error = session.explain(Error::Transport(TransportError::Closed));
    assert_eq!(error.blame(), Blame::PeerMisbehaved, "{error:?}");
}
