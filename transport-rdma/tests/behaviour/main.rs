//! What the conformance suite does not see: registration and its cost, what is refused, peers that
//! die, and that nothing is left behind. Like the suite, where there is an RDMA device.

mod connecting;
#[path = "../support/mod.rs"]
mod support;

use std::error::Error;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::{PAGE_BYTES, PageRange};
use pageferry::testing::{TestMemory, drain, settle};
use pageferry::transport::{
    ControlChannel, DestinationLink, Link, PageReceiver, PageSender, Received, Registration, Run,
    RunKind, SourceLink, TransportError,
};
use pageferry_rdma::{
    Mtu, RdmaAcceptor, RdmaDestinationLink, RdmaOptions, RdmaSourceLink, RegistrationMode, connect,
};
use support::{SOON, address, linked, of_anyone};

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
        drop(
            RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens"),
        );
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

/// Nobody receives, so marks are not answered: after 32 of them there is no credit for another.
#[test]
fn a_wait_is_as_long_as_asked_without_a_credit_for_a_mark() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    opened.here.fill(3);
    let sender = &mut opened.sender;
    thread::scope(|scope| {
        let interrupter = sender.interrupter();
        let (done, waited) = std::sync::mpsc::channel();
        scope.spawn(move || {
            for page in 0..40 {
                sender.send(&[data(page, 1)]).expect("a batch goes out");
                sender.watermarks(Some(Duration::from_millis(1))).expect("it is not lost");
            }
            // The other end may have given up waiting.
            let _ = done.send(());
        });
        if waited.recv_timeout(SOON).is_err() {
            interrupter.interrupt();
            panic!("a wait of a millisecond went on");
        }
    });
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        settle(&mut *opened.sender, 40);
        // As long as there is, and no longer than there is something to wait for.
        assert_eq!(opened.sender.watermarks(Some(Duration::MAX)).expect("watermarks").landed, 40);
        opened.sender.send(&[data(0, 1)]).expect("a batch goes out");
        assert_eq!(opened.sender.watermarks(Some(Duration::MAX)).expect("watermarks").landed, 41);
        opened.sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), Some((0, 40)));
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
        scope.spawn(|| drain(&mut *opened.receiver));
        let all = u32::try_from(CHUNKS * CHUNK_PAGES).expect("small");
        let ticket = opened.sender.send(&[data(0, all)]).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
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
        scope.spawn(|| drain(&mut *opened.receiver));
        // The end of one chunk and the beginning of the next, then the last: it is announced late.
        let runs = [data(2 * CHUNK_PAGES - 5, 10), data(CHUNKS * CHUNK_PAGES - 3, 3)];
        let ticket = opened.sender.send(&runs).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
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
            scope.spawn(|| drain(&mut *opened.receiver));
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
            let receiving = scope.spawn(move || drain(&mut *receiver));
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
    let acceptor =
        RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens");
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

/// The smaller of what both sides want; pages move with it.
#[test]
fn path_mtus_that_differ_are_agreed_on() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let with = |mtu| RdmaOptions { mtu, ..RdmaOptions::default() };
    let largest = linked(&address, &with(None), &with(None)).0.path_mtu();
    for (here, there, agreed) in [
        (Some(Mtu::Bytes2048), Some(Mtu::Bytes1024), Mtu::Bytes1024),
        (Some(Mtu::Bytes512), None, Mtu::Bytes512),
        (None, Some(Mtu::Bytes256), Mtu::Bytes256),
        (Some(Mtu::Bytes4096), None, largest),
    ] {
        let (mut source, mut destination) = linked(&address, &with(here), &with(there));
        assert_eq!((source.path_mtu(), destination.path_mtu()), (agreed, agreed));
        let (from, to) = (memory(), memory());
        from.fill(6);
        source.register(from.memory()).expect("source memory registers");
        destination.register(to.memory()).expect("destination memory registers");
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut receivers = destination.open_receivers(1, SOON).expect("a channel");
                drain(&mut *receivers[0]);
            });
            let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
            sender.send(&[data(0, 64)]).expect("a batch goes out");
            sender.finish().expect("the channel ends");
        });
        assert!((0..64).all(|page| from.read(0, page) == to.read(0, page)));
    }
}

#[test]
fn gids_are_those_of_the_connection_manager() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let with = |gid_index| RdmaOptions { gid_index, ..RdmaOptions::default() };
    // ci/lab: the address of IPv4 has the GID with index 1, and 0 is link-local.
    drop(linked(&address, &with(Some(1)), &with(Some(1))));
    let acceptor = RdmaAcceptor::bind((&*address, 0), with(None)).expect("listens");
    for index in [0, 200] {
        let error =
            connect(acceptor.local_addr(), with(Some(index))).map(drop).expect_err("no way");
        eprintln!("{}", chain(&error));
        assert!(matches!(error, TransportError::Connect { .. }), "{error:?}");
    }
    let acceptor = RdmaAcceptor::bind((&*address, 0), with(Some(0))).expect("listens");
    let error = connect(acceptor.local_addr(), with(None)).map(drop).expect_err("another GID");
    assert!(error.to_string().contains("has the GID with index 1, not 0"), "{error}");
}

#[test]
fn addresses_of_devices_are_named_where_one_does_not_do() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let found = pageferry_rdma::addresses().expect("there is a device");
    assert!(found.iter().any(|found| found.address.to_string() == address), "{found:?}");
    assert!(!found.iter().any(|found| found.address.is_loopback()), "{found:?}");
    let loopback = "127.0.0.1:0".parse::<std::net::SocketAddr>().expect("an address");
    let refused = [
        RdmaAcceptor::bind(loopback, RdmaOptions::default()).map(drop).expect_err("no device"),
        connect("127.0.0.1:9", RdmaOptions::default()).map(drop).expect_err("no device"),
    ];
    for error in refused {
        let text = chain(&error);
        assert!(
            text.contains("addresses of RDMA devices here: ") && text.contains(&address),
            "{text}"
        );
    }
}

/// The network interface below the device.
fn interface() -> String {
    let shown = Command::new("rdma").args(["link", "show"]).output().expect("rdma of iproute2");
    let shown = String::from_utf8(shown.stdout).expect("text");
    let words: Vec<_> = shown.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "netdev").expect("a device of Ethernet");
    words[at + 1].to_owned()
}

fn set(interface: &str, state: &str) {
    let changed = Command::new("ip").args(["link", "set", interface, state]).status();
    assert!(changed.expect("ip of iproute2").success(), "{interface} {state}");
}

/// Nothing is sent meanwhile: rxe gives up a queue pair at once whose port is down, where a NIC sends
/// again.
#[test]
fn a_port_that_is_down_for_a_moment_ends_nothing() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    opened.here.fill(7);
    let interface = interface();
    let mut control = opened.destination.control().expect("once").receiver;
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        set(&interface, "down");
        // As long as the port is down, somebody sleeps who hears of it.
        let waited = control.receive(Some(Duration::from_millis(300)));
        set(&interface, "up");
        assert!(matches!(waited, Err(TransportError::TimedOut { .. })), "{waited:?}");
        let ticket = opened.sender.send(&[data(0, 16)]).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    assert!((0..16).all(|page| opened.here.read(0, page) == opened.there.read(0, page)));
}

/// Two seconds by default, as long as the queue pairs would have sent again.
#[test]
fn a_port_that_stays_down_ends_a_link_on_which_nothing_is_sent() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let mut opened = open(&address, RegistrationMode::AtStart, RegistrationMode::AtStart);
    let interface = interface();
    let mut control = opened.destination.control().expect("once").receiver;
    set(&interface, "down");
    let began = Instant::now();
    let waited = control.receive(Some(SOON));
    let took = began.elapsed();
    set(&interface, "up");
    let error = waited.expect_err("the port is down");
    assert!(chain(&error).contains("the port went down, and stayed so"), "{error:?}");
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(4), "{took:?}");
}

/// A process that was stopped, say: its NIC takes what it has room for, and nobody reads it.
#[test]
fn a_control_send_to_who_reads_nothing_has_an_end() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let both = options(RegistrationMode::AtStart);
    let (mut source, mut destination) = linked(&address, &both, &both);
    let _unread = destination.control().expect("once");
    let ControlChannel { mut sender, receiver: _idle } = source.control().expect("once");
    let (frame, patience) = (vec![1; 1 << 20], Duration::from_millis(300));
    let began = Instant::now();
    let error = sender.send(&frame, patience).expect_err("there is no room for it");
    let took = began.elapsed();
    assert!(
        matches!(error, TransportError::TimedOut { after, .. } if after == patience),
        "{error:?}"
    );
    assert!(took >= patience && took < SOON / 4, "{took:?}");
    sender.send(&[1], SOON).expect_err("part of a frame is out");
    assert!(began.elapsed() < SOON / 2, "at once");
}

/// Also while it waits for what another connection is to bring.
#[test]
fn one_channel_is_interrupted_and_the_other_goes_on() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let (mut source, mut destination) =
        linked(&address, &options(RegistrationMode::AtStart), &options(RegistrationMode::Ahead));
    let (here, there) = (memory(), memory());
    here.fill(8);
    source.register(here.memory()).expect("source memory registers");
    destination.register(there.memory()).expect("destination memory registers");
    let (mut senders, mut receivers) = thread::scope(|scope| {
        let accepted = scope.spawn(|| destination.open_receivers(2, SOON));
        let senders = source.open_senders(2).expect("channels open");
        (senders, accepted.join().expect("no panic").expect("channels are accepted"))
    });
    let (mut other, mut ended) = (senders.remove(1), senders.remove(0));
    let (mut receiver, mut lost) = (receivers.remove(1), receivers.remove(0));
    let interrupter = ended.interrupter();
    thread::scope(|scope| {
        // Nobody registers it as long as nobody receives.
        let waiting = scope.spawn(move || {
            let result = ended.send(&[data(3 * CHUNK_PAGES, 1)]);
            (ended, result)
        });
        thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished(), "the page's memory is registered");
        interrupter.interrupt();
        let (mut ended, result) = waiting.join().expect("no panic");
        assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
        let again = ended.watermarks(None);
        assert!(matches!(again, Err(TransportError::Interrupted)), "{again:?}");
        let at_the_other_end = loop {
            match lost.receive() {
                Ok(Received::Batch(_)) => {}
                end => break end,
            }
        };
        assert!(
            matches!(at_the_other_end, Err(TransportError::Lost { .. })),
            "{at_the_other_end:?}"
        );
        scope.spawn(|| drain(&mut *receiver));
        other.send(&[data(0, 16)]).expect("a batch goes out");
        other.finish().expect("the channel ends");
    });
    assert!((0..16).all(|page| here.read(0, page) == there.read(0, page)));
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
        let acceptor =
            RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens");
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
    settle(&mut *sender, ticket);
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
    let acceptor =
        RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens");
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
