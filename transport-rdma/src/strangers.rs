//! Those that an acceptor must bear with, where there is an RDMA device (`ci/lab run --rxe`). Its
//! address is in `PAGEFERRY_RDMA_ADDRESS`. In the crate, since strangers say what no source does.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::testing::greeting;
use pageferry::transport::reception::TurnedAway;
use pageferry::transport::ways::Way;
use pageferry::transport::{
    Admission, ControlChannel, ControlReceiver, Link, LinkId, TransportError,
};
use pageferry_identity::Security;

use crate::cm::{Id, RemoteAccess};
use crate::dial::{Workshop, resolve};
use crate::pipe::{Inlet, KEEPALIVE, Message, Outlet, SLOT_BYTES};
use crate::preamble::Purpose;
use crate::reception::MAX_WAITING;
use crate::state::LinkState;
use crate::{RdmaAcceptor, RdmaDestinationLink, RdmaOptions, RdmaSourceLink, connect};

/// A bound on what should take no time.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// Within which a source gets in, whoever else is there.
pub(crate) const GETS_IN: Duration = Duration::from_secs(5);

pub(crate) fn acceptor_of(admission: Admission) -> Option<RdmaAcceptor> {
    if let Err(unavailable) = crate::available() {
        eprintln!("tests over RDMA skipped, because {unavailable}");
        return None;
    }
    let Ok(address) = std::env::var("PAGEFERRY_RDMA_ADDRESS") else {
        eprintln!("tests over RDMA skipped, because PAGEFERRY_RDMA_ADDRESS names no device");
        return None;
    };
    let options =
        RdmaOptions { admission, security: Security::PlainText, ..RdmaOptions::default() };
    Some(RdmaAcceptor::bind((&*address, 0), options).expect("listens"))
}

/// Of sources that need not greet.
pub(crate) fn acceptor() -> Option<RdmaAcceptor> {
    acceptor_of(Admission::Anyone)
}

/// Somebody who is about to connect, and can say anything.
pub(crate) fn stranger(to: SocketAddr) -> Workshop {
    stranger_with(to, RdmaOptions::default())
}

pub(crate) fn stranger_with(to: SocketAddr, options: RdmaOptions) -> Workshop {
    let state = LinkState::new(|| {}).expect("an event counter");
    let way = Way { to, from: None };
    let id = resolve(way, &options, &state).expect("a way");
    Workshop::at(&id, way, options, state).expect("a device")
}

/// Says something; why it was refused.
fn refused(to: SocketAddr, say: impl Fn(&Workshop) -> Vec<u8>) -> String {
    let workshop = stranger(to);
    let said = say(&workshop);
    match workshop.dial_outlet(&said, RemoteAccess::Nothing) {
        Err(TransportError::Refused { reason, .. }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

fn preamble(purpose: Purpose, migration: LinkId) -> impl Fn(&Workshop) -> Vec<u8> {
    move |workshop| workshop.preamble(purpose, migration).to_vec()
}

/// One half of a control channel, and nobody behind it.
fn half(to: SocketAddr, migration: LinkId) -> Outlet {
    let workshop = stranger(to);
    let say = workshop.preamble(Purpose::Control, migration);
    workshop.dial_outlet(&say, RemoteAccess::Nothing).expect("accepted")
}

pub(crate) fn other_half(to: SocketAddr, migration: LinkId) -> Inlet {
    let workshop = stranger(to);
    let say = workshop.preamble(Purpose::ControlBack, migration);
    workshop.dial_inlet(&say).expect("accepted")
}

pub(crate) fn serve(acceptor: &RdmaAcceptor) -> (RdmaSourceLink, RdmaDestinationLink) {
    let to = acceptor.local_addr();
    let began = Instant::now();
    let link = thread::scope(|scope| {
        let source = scope.spawn(move || connect(to, RdmaOptions::default()));
        let destination = acceptor.accept(Some(SOON)).expect("a source came");
        (source.join().expect("no panic").expect("the acceptor answers"), destination)
    });
    assert!(began.elapsed() < GETS_IN, "it took {:?}", began.elapsed());
    link
}

/// A source's first word.
fn hello() -> Vec<u8> {
    // In several pieces.
    greeting(vec![7; 3 * SLOT_BYTES])
}

/// A source that has greeted.
fn greet(acceptor: &RdmaAcceptor) -> (RdmaSourceLink, ControlChannel) {
    greet_with(acceptor, RdmaOptions::default())
}

fn greet_with(acceptor: &RdmaAcceptor, options: RdmaOptions) -> (RdmaSourceLink, ControlChannel) {
    let mut source = connect(acceptor.local_addr(), options).expect("it is let in");
    let mut control = source.control().expect("once");
    control.sender.send(&hello(), SOON).expect("it goes out");
    (source, control)
}

/// Accepts one who has greeted, and hears the greeting.
fn accept(acceptor: &RdmaAcceptor) -> (RdmaDestinationLink, ControlChannel) {
    let mut link = acceptor.accept(Some(SOON)).expect("a source came");
    let mut control = link.control().expect("once");
    assert_eq!(control.receiver.receive(Some(SOON)).expect("it is there"), hello());
    (link, control)
}

/// The first attempt of a source succeeds.
fn assert_gets_in(acceptor: &RdmaAcceptor) {
    let began = Instant::now();
    let (source, _from) = greet(acceptor);
    let (link, mut to) = accept(acceptor);
    assert_eq!(link.link_id(), source.link_id());
    to.sender.send(b"welcome", SOON).expect("it goes out");
    assert!(began.elapsed() < GETS_IN, "it took {:?}", began.elapsed());
}

pub(crate) fn assert_turned_away(receiver: &mut dyn ControlReceiver, why: &str) {
    for _ in 0..2 {
        match receiver.receive(Some(SOON)) {
            Err(TransportError::Refused { reason, .. }) => assert_eq!(reason, why),
            other => panic!("not turned away: {other:?}"),
        }
    }
}

/// What a stranger says, and hears.
fn says(to: SocketAddr, migration: u8, messages: &[&[u8]]) -> (Outlet, Inlet) {
    let migration = LinkId([migration; 16]);
    let (mut outlet, inlet) = (half(to, migration), other_half(to, migration));
    for message in messages {
        outlet.message(message, Some(Instant::now() + SOON)).expect("it goes out");
    }
    outlet.flush(SOON).expect("it is there");
    (outlet, inlet)
}

#[test]
fn who_has_not_greeted_keeps_nobody_out() {
    let Some(acceptor) = acceptor_of(Admission::Greeted) else { return };
    let to = acceptor.local_addr();
    let half_a_hello = [&[1, 0, 0, 1, 0][..], &hello()[..100]].concat();
    let _strangers: Vec<_> = (0..9)
        .map(|stranger| match stranger % 3 {
            0 => says(to, stranger, &[]),
            1 => says(to, stranger, &[&[1, 9, 0, 0, 0, 1, 0]]),
            _ => says(to, stranger, &[&half_a_hello]),
        })
        .collect();
    let nobody = acceptor.accept(Some(Duration::from_millis(50)));
    assert!(matches!(nobody, Err(TransportError::TimedOut { .. })), "{nobody:?}");
    assert_gets_in(&acceptor);
}

#[test]
fn nonsense_is_told_so_and_costs_nobody_else_anything() {
    let Some(acceptor) = acceptor_of(Admission::Greeted) else { return };
    let to = acceptor.local_addr();
    for (said, why) in [
        (&[1, 9, 0, 0, 0, 20, 0][..], "no greeting: message of type 20 where a greeting is due"),
        (&[1, 0, 0, 15, 0, 1][..], "no greeting: field hello has length"),
        (&[2], "the other side sent pieces of control frames"),
        (&[9; 40], "the other side sent pieces of control frames"),
    ] {
        let (_outlet, mut inlet) = says(to, 7, &[said]);
        let heard = inlet.next(Some(Instant::now() + SOON)).expect("a word");
        let Some(Message::Bytes(heard)) = heard else { panic!("{heard:?}") };
        assert_eq!(heard[0], 3);
        let heard = String::from_utf8_lossy(&heard[1..]);
        assert!(heard.starts_with(why), "{heard}");
        assert_gets_in(&acceptor);
    }
}

/// What a source connects with that comes from another address of the device that it connects to.
pub(crate) fn from_elsewhere(acceptor: &RdmaAcceptor) -> Option<RdmaOptions> {
    let here = acceptor.local_addr().ip();
    let id = Id::new().expect("an id");
    id.bind(SocketAddr::new(here, 0)).expect("the device's address");
    let context = id.context().expect("its device");
    let index = (0..16).find(|&index| {
        let address = context.gid_address(id.port(), index).ok().flatten();
        address.is_some_and(|address| address.is_ipv4() && address != here)
    });
    if index.is_none() {
        eprintln!("a test over RDMA skipped, because {here} is the only address of its device");
    }
    index.map(|index| RdmaOptions {
        gid_index: Some(index),
        security: Security::PlainText,
        ..RdmaOptions::default()
    })
}

/// From another address of the device, which looks like two hosts: a source does not go there, and a destination lets
/// nobody in, who was not told that plain text will do.
#[test]
fn plain_text_goes_no_further_than_this_host() {
    let Some(acceptor) = acceptor() else { return };
    let Some(elsewhere) = from_elsewhere(&acceptor) else { return };
    let careful = RdmaOptions { security: Security::WithinHost, ..elsewhere.clone() };
    let error = connect(acceptor.local_addr(), careful).map(drop).expect_err("another host");
    assert!(matches!(error, TransportError::Security { .. }), "{error:?}");
    let here = acceptor.local_addr().ip();
    let careful = RdmaOptions { admission: Admission::Anyone, ..RdmaOptions::default() };
    let careful = RdmaAcceptor::bind((here, 0), careful).expect("listens");
    let error = connect(careful.local_addr(), elsewhere).map(drop).expect_err("another host");
    let TransportError::Refused { reason, .. } = &error else { panic!("{error:?}") };
    assert!(reason.contains("plain text from or to another host"), "{reason}");
    // Without the detour it is one host.
    connect(careful.local_addr(), RdmaOptions::default()).expect("it is let in");
}

/// All places of those that wait, and more, while nobody accepts the one that came first.
#[test]
fn many_sources_of_one_address_keep_none_of_another_out() {
    let Some(acceptor) = acceptor_of(Admission::Greeted) else { return };
    let Some(elsewhere) = from_elsewhere(&acceptor) else { return };
    let (holder, _from_holder) = greet(&acceptor);
    let mut many: Vec<_> = (0..MAX_WAITING).map(|_| greet(&acceptor)).collect();
    let (source, _control) = greet_with(&acceptor, elsewhere);
    many.extend((0..2).map(|_| greet(&acceptor)));
    // Those that waited longest make room for the last three.
    for (_, control) in &mut many[..3] {
        assert_turned_away(&mut *control.receiver, &TurnedAway::Crowded.to_string());
    }
    let (link, to) = accept(&acceptor);
    assert_eq!(link.link_id(), holder.link_id());
    drop((link, to));
    let (link, _to) = accept(&acceptor);
    assert_ne!(link.peer_addr().ip(), acceptor.local_addr().ip());
    assert_eq!(link.link_id(), source.link_id());
}

#[test]
fn garbage_is_refused_at_once_and_another_version_told_so() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    let id = LinkId([1; 16]);
    assert_eq!(
        refused(to, |_| b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        "a request that is not pageferry's"
    );
    assert_eq!(refused(to, |_| Vec::new()), "a request that is not pageferry's");
    let changed = |at: usize| {
        move |workshop: &Workshop| {
            let mut said = preamble(Purpose::Control, id)(workshop);
            said[at] ^= 0x40;
            said
        }
    };
    assert_eq!(refused(to, changed(4)), "a version that is not spoken here");
    assert_eq!(refused(to, changed(5)), "a request for nothing that is known");
    assert_eq!(refused(to, changed(26)), "a request for nothing that is known");
    let reason = refused(to, changed(24));
    assert!(reason.contains("path MTU"), "{reason}");
    serve(&acceptor);
}

/// More than any queue holds; once that was the end of an acceptor.
#[test]
fn requests_of_migrations_that_nobody_serves_are_refused_at_once() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    for stranger in 0..100 {
        let purpose = match stranger % 3 {
            0 => Purpose::ControlBack,
            1 => Purpose::Table { rail: 0 },
            _ => Purpose::Pages { channel: 0, rail: 0 },
        };
        let reason = refused(to, preamble(purpose, LinkId([stranger; 16])));
        assert_eq!(reason, "no migration with this id is being served");
    }
    serve(&acceptor);
}

#[test]
fn many_silent_sources_lock_nobody_out() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    let mut kept = Vec::new();
    for stranger in 0..20 {
        kept.push(half(to, LinkId([stranger; 16])));
    }
    serve(&acceptor);
}

#[test]
fn a_source_that_leaves_half_way_ends_nothing() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| acceptor.accept(Some(SOON)));
        drop(half(to, LinkId([1; 16])));
        // This one comes to the end of connecting.
        let _kept = (half(to, LinkId([2; 16])), other_half(to, LinkId([2; 16])));
        let first = accepting.join().expect("no panic").expect("one who came").link_id();
        assert_eq!(first, LinkId([2; 16]));
    });
    serve(&acceptor);
}

#[test]
fn a_source_that_gave_up_before_it_was_accepted_is_forgotten() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    let migration = LinkId([1; 16]);
    drop((half(to, migration), other_half(to, migration)));
    let source = connect(to, RdmaOptions::default()).expect("it is let in");
    let mut accepted = acceptor.accept(Some(SOON)).expect("one of them");
    if accepted.link_id() == migration {
        // Before it was known that it has left.
        drop(accepted);
        accepted = acceptor.accept(Some(SOON)).expect("the other one");
    }
    assert_eq!(accepted.link_id(), source.link_id());
}

#[test]
fn a_second_source_is_told_to_come_later_and_data_channels_must_be_free() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    let (source, destination) = serve(&acceptor);
    let mut second = connect(to, RdmaOptions::default()).expect("it may wait");
    let mut control = second.control().expect("once");
    assert_turned_away(&mut *control.receiver, "another migration is being served");
    let ours = destination.link_id();
    assert_eq!(ours, source.link_id());
    let workshop = stranger(to);
    let channel = workshop.preamble(Purpose::Pages { channel: 0, rail: 0 }, ours);
    thread::scope(|scope| {
        // Nobody takes it.
        let waiting = scope.spawn(|| workshop.dial_outlet(&channel, RemoteAccess::Nothing));
        let taken = preamble(Purpose::Pages { channel: 0, rail: 0 }, ours);
        let began = Instant::now();
        loop {
            let workshop = stranger(to);
            // The one above may not have come yet; a second one waits no longer than it.
            let second = RdmaOptions { connect_timeout: GETS_IN / 5, ..workshop.options.clone() };
            let workshop = Workshop { options: second, ..workshop };
            let said = taken(&workshop);
            match workshop.dial_outlet(&said, RemoteAccess::Nothing) {
                Err(TransportError::Refused { reason, .. }) => {
                    assert_eq!(reason, "data channel 0 is connected already");
                    break;
                }
                other => assert!(began.elapsed() < GETS_IN, "{other:?}"),
            }
        }
        let beyond = preamble(Purpose::Pages { channel: 256, rail: 0 }, ours);
        assert_eq!(refused(to, beyond), "data channel 256 of only 256 channels");
        drop((source, destination));
        waiting.join().expect("no panic").map(drop).expect_err("its migration is over");
    });
    serve(&acceptor);
}

/// Whoever has nothing to send for minutes has somebody look after that half of the channel.
#[test]
fn who_only_receives_frames_answers_when_asked_whether_anybody_is_there() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    let migration = LinkId([4; 16]);
    let (outlet, mut inlet) = (half(to, migration), other_half(to, migration));
    let mut link = acceptor.accept(Some(SOON)).expect("it came");
    let mut control = link.control().expect("once");
    thread::scope(|scope| {
        let receiving = scope.spawn(move || control.receiver.receive(None));
        // Asks after one KEEPALIVE, and is answered within another.
        let answer = inlet.next(Some(Instant::now() + 3 * KEEPALIVE));
        assert!(matches!(answer, Ok(Some(Message::Mark))), "{answer:?}");
        drop((outlet, inlet));
        receiving.join().expect("no panic").expect_err("nobody is there any more");
    });
}
