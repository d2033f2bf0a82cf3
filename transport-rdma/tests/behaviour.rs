//! What the conformance suite does not see: registration and its cost, what is refused, peers that
//! die, and that nothing is left behind. Like the suite, where there is an RDMA device.

mod support;

use std::error::Error;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::{PAGE_BYTES, PageRange};
use pageferry::testing::TestMemory;
use pageferry::transport::{
    ControlChannel, DestinationLink, Link, PageReceiver, PageSender, Received, Registration, Run,
    RunKind, SourceLink, TransportError,
};
use pageferry_rdma::{
    Mtu, RdmaAcceptor, RdmaDestinationLink, RdmaOptions, RdmaSourceLink, RegistrationMode, connect,
};
use support::{SOON, address, linked};

const CHUNK_BYTES: u64 = 1 << 20;
const CHUNK_PAGES: u64 = CHUNK_BYTES / PAGE_BYTES;
const CHUNKS: u64 = 8;
const MEMORY_BYTES: u64 = CHUNKS * CHUNK_BYTES;

/// One test at a time: they count what the device holds.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(registration: RegistrationMode) -> RdmaOptions {
    RdmaOptions { registration, chunk_bytes: CHUNK_BYTES, ..RdmaOptions::default() }
}

fn memory() -> TestMemory {
    TestMemory::new(&[CHUNKS * CHUNK_PAGES])
}

fn data(first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region: 0, first_page, pages }, kind: RunKind::Data }
}

/// A link with one channel and memory on both sides.
struct Opened {
    sender: Box<dyn PageSender>,
    receiver: Box<dyn PageReceiver>,
    source: RdmaSourceLink,
    destination: RdmaDestinationLink,
    here: TestMemory,
    there: TestMemory,
    /// What registering cost before the channels opened, at the source and at the destination.
    costs: (Registration, Registration),
}

fn open(address: &str, source: RegistrationMode, destination: RegistrationMode) -> Opened {
    let (mut source, mut destination) = linked(address, &options(source), &options(destination));
    let (here, there) = (memory(), memory());
    let costs = (
        source.register(here.memory()).expect("source memory registers"),
        destination.register(there.memory()).expect("destination memory registers"),
    );
    let (mut senders, mut receivers) = thread::scope(|scope| {
        let accepted = scope.spawn(|| destination.open_receivers(1, SOON));
        let senders = source.open_senders(1).expect("a channel opens");
        (senders, accepted.join().expect("no panic").expect("a channel is accepted"))
    });
    let (sender, receiver) = (senders.remove(0), receivers.remove(0));
    Opened { sender, receiver, source, destination, here, there, costs }
}

fn drain(receiver: &mut Box<dyn PageReceiver>) {
    while let Received::Batch(_) = receiver.receive().expect("a batch or the end") {}
}

fn settle(sender: &mut Box<dyn PageSender>, ticket: u64) {
    let began = Instant::now();
    while sender.watermarks(Some(Duration::from_millis(10))).expect("watermarks").landed < ticket {
        assert!(began.elapsed() < SOON, "batch {ticket} never landed");
    }
}

/// An error and its causes, in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes =
        std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// How many of each kind of object the device holds, as the kernel counts them.
fn resources() -> String {
    // librdmacm opens the device when it is first used, and keeps its context until the process ends.
    static OPENED: Once = Once::new();
    OPENED.call_once(|| {
        let address = address().expect("a device");
        drop(RdmaAcceptor::bind((&*address, 0), RdmaOptions::default()).expect("listens"));
    });
    let shown = Command::new("rdma").args(["resource", "show"]).output().expect("rdma of iproute2");
    assert!(shown.status.success(), "{shown:?}");
    String::from_utf8(shown.stdout).expect("text")
}

/// The kernel lets go of closed connections a little later (TIMEWAIT).
fn expect_resources(before: &str) {
    let began = Instant::now();
    while resources() != before {
        assert!(began.elapsed() < SOON, "left behind: {} instead of {before}", resources());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn registration_at_start_is_paid_before_the_first_page() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    for cost in [opened.costs.0, opened.costs.1] {
        assert_eq!(cost.registered_bytes, MEMORY_BYTES);
        assert!(!cost.took.is_zero());
    }
    assert_ne!(resources(), before, "registered memory is seen");
    opened.here.fill(1);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut opened.receiver));
        let all = u32::try_from(CHUNKS * CHUNK_PAGES).expect("small");
        let ticket = opened.sender.send(&[data(0, all)]).expect("a batch goes out");
        settle(&mut opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), None);
    for counters in [opened.sender.counters(), opened.receiver.counters()] {
        assert_eq!(counters.registered, Registration::default());
        assert_eq!(counters.user_copied_bytes, 0);
    }
    drop(opened);
    expect_resources(&before);
}

/// Nothing is registered before the first page; then the destination goes through all of its
/// memory, and the source through what it sends, and a chunk more.
#[test]
fn registration_ahead_is_paid_on_the_way() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let mut opened = open(&address, RegistrationMode::Ahead, RegistrationMode::Ahead);
    assert_eq!(opened.costs, (Registration::default(), Registration::default()));
    opened.here.fill(2);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut opened.receiver));
        // The end of one chunk and the beginning of the next, then the last: it is announced late.
        let runs = [data(2 * CHUNK_PAGES - 5, 10), data(CHUNKS * CHUNK_PAGES - 3, 3)];
        let ticket = opened.sender.send(&runs).expect("a batch goes out");
        settle(&mut opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    for page in [2 * CHUNK_PAGES - 5, 2 * CHUNK_PAGES + 4, CHUNKS * CHUNK_PAGES - 1] {
        assert!(opened.here.read(0, page) == opened.there.read(0, page), "page {page}");
    }
    assert!(opened.there.read(0, 0).iter().all(|byte| *byte == 0));
    let registered = opened.sender.counters().registered;
    assert_eq!(registered.registered_bytes, 3 * CHUNK_BYTES, "chunks 1, 2 and the last");
    let registered = opened.receiver.counters().registered;
    assert_eq!(registered.registered_bytes, MEMORY_BYTES);
    assert!(!registered.took.is_zero());
    drop(opened);
    expect_resources(&before);
}

/// Each side chooses for itself.
#[test]
fn modes_may_differ() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    for (source, destination) in [
        (RegistrationMode::AtStart, RegistrationMode::Ahead),
        (RegistrationMode::Ahead, RegistrationMode::AtStart),
    ] {
        let mut opened = open(&address, source, destination);
        opened.here.fill(3);
        thread::scope(|scope| {
            scope.spawn(|| drain(&mut opened.receiver));
            for chunk in 0..CHUNKS {
                let pages = u32::try_from(CHUNK_PAGES).expect("small");
                opened.sender.send(&[data(chunk * CHUNK_PAGES, pages)]).expect("a batch goes out");
            }
            opened.sender.finish().expect("the channel ends");
        });
        assert_eq!(opened.here.first_difference(&opened.there), None);
    }
}

/// A page whose chunk nobody has registered at the destination waits; an interrupt ends that, and
/// so does the destination once it gets there.
#[test]
fn a_page_waits_for_its_chunk() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    for interrupted in [true, false] {
        let Opened { mut sender, mut receiver, source, destination: _kept, here, there, .. } =
            open(&address, RegistrationMode::AtStart, RegistrationMode::Ahead);
        here.fill(4);
        thread::scope(|scope| {
            let sending = scope.spawn(move || {
                let result = sender.send(&[data(3 * CHUNK_PAGES, 1)]);
                (sender, result)
            });
            thread::sleep(Duration::from_millis(300));
            assert!(!sending.is_finished(), "nobody has registered the page's memory");
            if interrupted {
                source.interrupter().interrupt();
                let (_, result) = sending.join().expect("no panic");
                assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
                return;
            }
            let receiving = scope.spawn(move || drain(&mut receiver));
            let (mut sender, result) = sending.join().expect("no panic");
            result.expect("the batch goes out");
            sender.finish().expect("the channel ends");
            receiving.join().expect("no panic");
        });
        if !interrupted {
            assert!(here.read(0, 3 * CHUNK_PAGES) == there.read(0, 3 * CHUNK_PAGES));
        }
    }
}

/// A source that ends early does not make the destination's last words fail.
#[test]
fn a_channel_may_end_before_all_is_registered() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let Opened { mut sender, mut receiver, source, .. } =
        open(&address, RegistrationMode::AtStart, RegistrationMode::Ahead);
    sender.finish().expect("the channel ends");
    drop((sender, source));
    assert_eq!(receiver.receive().expect("the end"), Received::End);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let acceptor = RdmaAcceptor::bind((&*address, 0), RdmaOptions::default()).expect("listens");
    let options = RdmaOptions { device: Some("mlx5_9".into()), ..RdmaOptions::default() };
    let refused = [
        RdmaAcceptor::bind((&*address, 0), options.clone()).map(drop).expect_err("no such device"),
        connect(acceptor.local_addr(), options).map(drop).expect_err("no such device"),
    ];
    for error in refused {
        let text = chain(&error);
        assert!(text.contains("there is no RDMA device mlx5_9; there are: "), "{text}");
    }
}

#[test]
fn an_address_without_a_device_is_refused() {
    let (_alone, Some(_)) = (alone(), address()) else { return };
    let to = "127.0.0.1:9".parse::<std::net::SocketAddr>().expect("an address");
    let error = connect(to, RdmaOptions::default()).map(drop).expect_err("no device there");
    assert!(matches!(error, TransportError::Connect { .. }), "{error:?}");
}

#[test]
fn path_mtus_that_differ_are_refused_and_told() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let with = |mtu| RdmaOptions { mtu: Some(mtu), ..RdmaOptions::default() };
    let acceptor = RdmaAcceptor::bind((&*address, 0), with(Mtu::Bytes1024)).expect("listens");
    let to = acceptor.local_addr();
    thread::scope(|scope| {
        let source = scope.spawn(|| connect(to, with(Mtu::Bytes2048)).map(drop));
        let there = acceptor.accept(Some(SOON)).map(drop).expect_err("MTUs differ");
        let here = source.join().expect("no panic").expect_err("MTUs differ");
        for error in [here, there] {
            let TransportError::Refused { reason, .. } = &error else { panic!("{error:?}") };
            assert!(reason.contains("2048") && reason.contains("1024"), "{reason}");
        }
    });
    drop(acceptor);
    expect_resources(&before);
}

// --- peers that die ----------------------------------------------------------------------------

const OTHER_SIDE: &str = "PAGEFERRY_TEST_OTHER_SIDE";

/// This test program once more, as the other side. It has a link, and says so.
fn other_side(role: &str) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "the_other_side", "--ignored", "--nocapture"])
        .env(OTHER_SIDE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut lines = lines.map(|line| line.expect("text"));
    let said = lines.find_map(|line| line.split_once("other side: ").map(|(_, said)| said.into()));
    (child, said.expect("the other side says something"))
}

/// Holds its end of a link until it is killed.
#[test]
#[ignore = "the other side of two tests, which start it: ci/test rdma"]
fn the_other_side() {
    let (Some(address), Ok(role)) = (address(), std::env::var(OTHER_SIDE)) else { return };
    let memory = memory();
    let mut keep: Vec<Box<dyn std::any::Any>> = Vec::new();
    if role == "destination" {
        let acceptor = RdmaAcceptor::bind((&*address, 0), RdmaOptions::default()).expect("listens");
        println(&acceptor.local_addr().to_string());
        let mut link = acceptor.accept(Some(SOON)).expect("a source came");
        link.register(memory.memory()).expect("memory registers");
        let receivers = link.open_receivers(1, SOON).expect("a channel is accepted");
        for mut receiver in receivers {
            thread::spawn(move || while let Ok(Received::Batch(_)) = receiver.receive() {});
        }
        keep.push(Box::new(link));
    } else {
        let to = role.parse::<std::net::SocketAddr>().expect("an address");
        let mut link = connect(to, RdmaOptions::default()).expect("the acceptor answers");
        link.register(memory.memory()).expect("memory registers");
        keep.push(Box::new(link.open_senders(1).expect("a channel opens")));
        keep.push(Box::new(link));
        println("here");
    }
    // Until it is killed, or the test has ended.
    let _ = std::io::stdin().read(&mut [0]);
}

#[expect(clippy::print_stdout, reason = "what the other side says")]
fn println(what: &str) {
    println!("other side: {what}");
}

fn is_gone(error: &TransportError) -> bool {
    matches!(error, TransportError::Lost { .. } | TransportError::Closed)
}

#[test]
fn a_killed_destination_is_noticed() {
    let (_alone, Some(_)) = (alone(), address()) else { return };
    let before = resources();
    let (mut child, to) = other_side("destination");
    let to = to.parse::<std::net::SocketAddr>().expect("an address");
    let mut source = connect(to, RdmaOptions::default()).expect("the other side answers");
    let ControlChannel { sender: to_them, receiver: mut control } = source.control().expect("once");
    let here = memory();
    here.fill(5);
    source.register(here.memory()).expect("memory registers");
    let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
    let ticket = sender.send(&[data(0, 16)]).expect("a batch goes out");
    settle(&mut sender, ticket);
    child.kill().expect("it was alive");
    let killed = Instant::now();
    let error = loop {
        let sent = sender.send(&[data(0, 16)]);
        match sent.and_then(|_| sender.watermarks(Some(Duration::from_millis(10)))) {
            Ok(_) => assert!(killed.elapsed() < SOON, "never noticed"),
            Err(error) => break error,
        }
    };
    assert!(is_gone(&error), "{error:?}");
    let error = control.receive(Some(SOON)).expect_err("nobody is there");
    assert!(is_gone(&error), "{error:?}");
    eprintln!("noticed after {:?}: {}", killed.elapsed(), chain(&error));
    child.wait().expect("it has ended");
    drop((sender, control, to_them, source));
    expect_resources(&before);
}

#[test]
fn a_killed_source_is_noticed_by_those_who_only_wait() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let acceptor = RdmaAcceptor::bind((&*address, 0), RdmaOptions::default()).expect("listens");
    let to = acceptor.local_addr().to_string();
    let there = memory();
    thread::scope(|scope| {
        let starting = scope.spawn(move || other_side(&to));
        let mut link = acceptor.accept(Some(SOON)).expect("a source came");
        let ControlChannel { sender: _kept, receiver: mut control } = link.control().expect("once");
        link.register(there.memory()).expect("memory registers");
        let mut receiver = link.open_receivers(1, SOON).expect("a channel").remove(0);
        let (mut child, _) = starting.join().expect("no panic");
        child.kill().expect("it was alive");
        let killed = Instant::now();
        for error in [
            receiver.receive().map(drop).expect_err("nobody is there"),
            control.receive(Some(SOON)).map(drop).expect_err("nobody is there"),
        ] {
            assert!(is_gone(&error), "{error:?}");
            assert!(killed.elapsed() < SOON, "only noticed after {:?}", killed.elapsed());
            eprintln!("noticed after {:?}: {}", killed.elapsed(), chain(&error));
        }
        child.wait().expect("it has ended");
    });
    drop(acceptor);
    expect_resources(&before);
}
