//! Peers that say more than anybody could want: a process that listens to them needs little more
//! memory than one that does not, and serves others meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::PageRange;
use pageferry::protocol::{FailureReason, MAX_DATA_RANGES, Message, negotiate};
use pageferry::transport::stream::{ACK_BYTES, encode_batch};
use pageferry::transport::{MAX_BATCH_RUNS, MAX_BATCH_ZERO_PAGES, Run, RunKind};
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, PREAMBLE_BYTES, Status};
use rustix::process::Signal;

use crate::support::long_way::long_way;
use crate::support::peer::{
    Opened, control_preamble, frame, guest_of, hello, hello_of, listen, ok_answer, receive, send,
    take, try_open, try_receive,
};
use crate::support::process::Process;
use crate::support::sides::{SMALL_BYTES, destination, destination_that_stays, source_that_stays};

/// More than a process that is idle has, at most.
const MOST_MORE_BYTES: u64 = 64 << 20;

/// How long a flood goes on before anything else happens.
const FLOOD: Duration = Duration::from_secs(2);

/// How long an honest side may take while others flood.
const SOON: Duration = Duration::from_secs(5);

/// Ends a flood when dropped, and so also when a test panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Floods by several threads as long as `meanwhile` takes, each connecting again whenever it is
/// thrown out. Bytes that went out.
fn flooded(flood: impl Fn(&AtomicBool) -> u64 + Sync, meanwhile: impl FnOnce()) -> u64 {
    const FLOODERS: usize = 3;
    flooded_by(FLOODERS, flood, meanwhile)
}

fn flooded_by(
    flooders: usize,
    flood: impl Fn(&AtomicBool) -> u64 + Sync,
    meanwhile: impl FnOnce(),
) -> u64 {
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..flooders {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    sent.fetch_add(flood(&over), Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&over);
        meanwhile();
    });
    sent.into_inner()
}

/// Writes until the other side has had enough, or time is over.
fn pour(stream: &mut TcpStream, bytes: &[u8], over: &AtomicBool) -> u64 {
    pour_for(FLOOD, stream, bytes, over)
}

fn pour_for(time: Duration, stream: &mut TcpStream, bytes: &[u8], over: &AtomicBool) -> u64 {
    stream.set_write_timeout(Some(Duration::from_millis(100))).expect("set a timeout");
    let until = Instant::now() + time;
    let mut sent = 0;
    while !over.load(Ordering::Relaxed) && Instant::now() < until {
        match stream.write(bytes) {
            // A part of a frame is as good as a frame: nobody has to take either.
            Ok(written) => sent += written as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    sent
}

/// A guest gets from a source to a destination that others disturb, soon, and at the first attempt.
fn assert_gets_in(source: &mut Process, address: &str) {
    let began = Instant::now();
    source.say(format!("migrate {address}"));
    let report = source.await_report();
    let took = began.elapsed();
    report.assert_departed();
    assert!(took < SOON, "after {took:?}");
}

/// What a process needs beyond `idle_bytes` is little.
fn assert_needs_little(process: &mut Process, idle_bytes: u64) {
    let more = process.peak_memory_bytes().saturating_sub(idle_bytes);
    assert!(more < MOST_MORE_BYTES, "{} MiB more than idle", more >> 20);
}

/// A destination is flooded, and meanwhile a real guest comes.
fn assert_destination_stands(more: &[&str], flood: impl Fn(&str, &AtomicBool) -> u64 + Sync) {
    let (mut destination, address) = destination(more);
    let idle_bytes = destination.peak_memory_bytes();
    let mut source = source_that_stays(&["--workload=idle"]);
    let sent = flooded(
        |over| flood(&address, over),
        || {
            let until = Instant::now() + FLOOD;
            while Instant::now() < until && destination.lives() {
                assert_needs_little(&mut destination, idle_bytes);
                thread::yield_now();
            }
            assert_gets_in(&mut source, &address);
        },
    );
    eprintln!("{} KiB went out", sent >> 10);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

/// Connects as a source; `None` if it is turned away, or the destination is gone.
fn try_let_in(address: &str) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.write_all(&control_preamble()).ok()?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer).ok()?;
    let answer = Answer::decode(&answer).ok()?;
    (answer.status == Status::Ok).then_some(stream)
}

#[test]
fn control_frames_at_a_destination() {
    let hello = frame(&hello(2));
    let chunk = frame(&Message::StateChunk(vec![7; 256 << 10]));
    assert_destination_stands(&[], |address, over| {
        let Some(mut stream) = try_let_in(address) else { return 0 };
        let greeted = stream.write_all(&hello).is_ok();
        if greeted { pour(&mut stream, &chunk, over) } else { 0 }
    });
}

#[test]
fn small_control_frames_at_a_destination() {
    let hello = frame(&hello(2));
    let pings = frame(&Message::Ping { number: 1 }).repeat(10_000);
    assert_destination_stands(&[], |address, over| {
        let Some(mut stream) = try_let_in(address) else { return 0 };
        let greeted = stream.write_all(&hello).is_ok();
        if greeted { pour(&mut stream, &pings, over) } else { 0 }
    });
}

/// Somebody who connects, and is no source. It goes on until it is thrown out.
fn strange(address: &str, says: Says, over: &AtomicBool) -> u64 {
    let preamble = control_preamble();
    let Ok(mut stream) = TcpStream::connect(address) else { return 0 };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
    let mut speaks = |bytes: &[u8]| stream.write_all(bytes).map_or(0, |()| bytes.len() as u64);
    let hello = frame(&hello(2));
    let sent = match says {
        Says::Nothing => 0,
        Says::Preamble => speaks(&preamble),
        Says::Garbage => speaks(&preamble) + speaks(&[&[40, 0, 0, 0][..], &[0xff; 40]].concat()),
        Says::HalfAHello => speaks(&preamble) + speaks(&hello[..hello.len() / 2]),
        Says::Hello | Says::HelloAndLeaves => speaks(&preamble) + speaks(&hello),
    };
    let (mut heard, mut piece) = (0, [0; 4096]);
    while !over.load(Ordering::Relaxed) {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(more) => heard += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        if matches!(says, Says::HelloAndLeaves) && heard > ANSWER_BYTES {
            break;
        }
    }
    sent
}

#[derive(Debug, Clone, Copy)]
enum Says {
    Nothing,
    Preamble,
    Garbage,
    HalfAHello,
    Hello,
    /// When it is welcomed.
    HelloAndLeaves,
}

impl Says {
    const ALL: [Self; 6] = [
        Self::Nothing,
        Self::Preamble,
        Self::Garbage,
        Self::HalfAHello,
        Self::Hello,
        Self::HelloAndLeaves,
    ];
}

/// Several of them come again and again.
fn assert_destination_stands_strangers(says: Says) {
    assert_destination_stands(&[], |address, over| strange(address, says, over));
}

#[test]
fn strangers_that_say_nothing() {
    assert_destination_stands_strangers(Says::Nothing);
}

#[test]
fn strangers_that_say_a_preamble() {
    assert_destination_stands_strangers(Says::Preamble);
}

#[test]
fn strangers_that_say_garbage() {
    assert_destination_stands_strangers(Says::Garbage);
}

#[test]
fn strangers_that_say_half_a_hello() {
    assert_destination_stands_strangers(Says::HalfAHello);
}

#[test]
fn strangers_that_greet_and_fall_silent() {
    assert_destination_stands_strangers(Says::Hello);
}

#[test]
fn strangers_that_greet_and_leave() {
    assert_destination_stands_strangers(Says::HelloAndLeaves);
}

/// Whoever else is there, a source that is far away gets in at the first attempt.
#[test]
fn strangers_of_all_kinds_beside_a_source_that_is_far_away() {
    let (mut destination, address) = destination(&[]);
    let far = long_way(&address, Duration::from_millis(700));
    let mut source = source_that_stays(&["--workload=idle", "--downtime-limit=20s"]);
    let kinds = Says::ALL.len();
    let next = AtomicUsize::new(0);
    let strange = |over: &AtomicBool| {
        let says = Says::ALL[next.fetch_add(1, Ordering::Relaxed) % kinds];
        let mut sent = 0;
        while !over.load(Ordering::Relaxed) {
            sent += strange(&address, says, over);
        }
        sent
    };
    flooded_by(kinds, strange, || {
        source.say(format!("migrate {far}"));
        source.await_report().assert_departed();
    });
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

/// It waits for an answer no longer than any source, and half a second and three more is what each that was
/// there before it may take.
#[test]
fn who_is_so_far_away_that_its_turn_comes_too_late_hears_why() {
    const MANY: usize = 20;
    let (_destination, address) = destination_that_stays(&[]);
    let far = long_way(&address, Duration::from_millis(1500));
    let mut source = source_that_stays(&["--workload=idle"]);
    let strange = |over: &AtomicBool| strange(&address, Says::Hello, over);
    flooded_by(MANY, strange, || {
        source.say(format!("migrate {far}"));
        let report = source.await_report();
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "source"));
        let error = report.text("error");
        assert!(error.contains("refused by "), "{error}");
    });
}

#[test]
fn half_open_connections_at_a_destination() {
    assert_destination_stands(&[], |address, over| {
        let (mut held, mut opened) = (Vec::new(), 0);
        while !over.load(Ordering::Relaxed) {
            let Ok(mut stream) = TcpStream::connect(address) else { break };
            opened += 1;
            // Nothing, half a preamble, or a whole one and nothing more.
            let preamble = control_preamble();
            let said = stream.write_all(&preamble[..[0, 16, 32][opened % 3]]);
            if said.is_ok() {
                held.push(stream);
            }
            if held.len() > 100 {
                held.remove(0);
            }
        }
        opened as u64
    });
}

/// What a small guest of the tests has: all of it fits into one batch of zero pages.
const PAGES: u32 = 16 << 10;

/// What a source sends, over and over; or once, if it may not.
struct Flood {
    bytes: Vec<u8>,
    against_the_rules: bool,
}

/// Hears that it is thrown out, or is.
fn assert_thrown_out(control: &mut TcpStream) {
    control.set_read_timeout(Some(SOON)).expect("set a timeout");
    match try_receive(control) {
        Ok(Message::Failed {
            reason: FailureReason::PeerMisbehaved | FailureReason::Transport,
            ..
        }) => {}
        Err(error) if error.kind() != ErrorKind::WouldBlock => {}
        other => panic!("not thrown out: {other:?}"),
    }
}

/// Sources that are as good as any until they flood: they have the place until they break a rule or
/// leave, and then the next one has it, whatever they have left in the queues of their sockets. The
/// destination has the memory that they may write to, [`PAGES`], and little more.
fn assert_destination_stands_sources(
    more: &[&str],
    guest_bytes: u64,
    floods: &[Flood],
    way: impl Fn(&mut Opened) -> &mut TcpStream,
) {
    let (mut destination, address) = destination_that_stays(more);
    let idle_bytes = destination.peak_memory_bytes() + SMALL_BYTES;
    let mut source = source_that_stays(&["--workload=idle", "--verify"]);
    let hello = hello_of(guest_of(guest_bytes), 1);
    let (until, never) = (Instant::now() + FLOOD, AtomicBool::new(false));
    let (mut sent, mut last) = (0, None);
    for flood in floods.iter().cycle() {
        drop(last.take());
        // Gets the place of the one before, which has just left.
        let mut opened = try_open(&address, &hello).expect("it waits its turn");
        if flood.against_the_rules {
            // Once, for nothing else is to be what it is thrown out for. It may not even take it all.
            let _ = way(&mut opened).write_all(&flood.bytes);
            sent += flood.bytes.len() as u64;
            assert_thrown_out(&mut opened.control);
        } else {
            sent += pour_for(FLOOD / 8, way(&mut opened), &flood.bytes, &never);
        }
        assert_needs_little(&mut destination, idle_bytes);
        last = Some(opened);
        if Instant::now() >= until {
            break;
        }
    }
    eprintln!("{} KiB went out", sent >> 10);
    drop(last);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    let arrived = destination.await_report();
    assert_eq!((arrived.text("outcome"), arrived.text("guest_at")), ("completed", "destination"));
    assert_eq!(arrived.flag("memory_match"), Some(true), "{arrived:?}");
    // It stays for this: who has ended has no memory.
    assert_needs_little(&mut destination, idle_bytes);
    destination.await_message("the guest runs here; Ctrl-C ends it");
    destination.signal(Signal::INT);
    destination.finish().assert_status(0);
}

fn range(first_page: u32, pages: u32) -> PageRange {
    PageRange { region: 0, first_page: first_page.into(), pages }
}

fn zero_run(first_page: u32, pages: u32) -> Run {
    Run { range: range(first_page, pages), kind: RunKind::Zero }
}

/// Each batch is 128 bytes or 8 KiB, and 64 MiB to zero: a queue of a socket holds an hour of that.
/// Who comes next does not wait for it.
#[test]
fn zero_runs_at_a_destination() {
    let most = u32::try_from(MAX_BATCH_ZERO_PAGES).expect("few");
    assert_eq!(most, PAGES);
    let runs = u32::try_from(MAX_BATCH_RUNS).expect("few");
    let (each, all) = (PAGES / runs, vec![zero_run(0, PAGES)]);
    let pieces: Vec<_> = (0..runs).map(|run| zero_run(run * each, each)).collect();
    let the_same: Vec<_> = (0..runs).map(|_| zero_run(0, PAGES)).collect();
    let flood = |runs: &[Run], against_the_rules| {
        let batch = |ticket| {
            let mut batch = Vec::new();
            encode_batch(ticket, runs, false, &mut batch);
            batch
        };
        let batches = if against_the_rules { 1 } else { 2000 };
        Flood { bytes: (1..=batches).flat_map(batch).collect(), against_the_rules }
    };
    let floods = [
        flood(&all, false),
        flood(&pieces, false),
        flood(&the_same, true),
        flood(&[&all[..], &all[..]].concat(), true),
    ];
    assert_destination_stands_sources(&[], SMALL_BYTES, &floods, |opened| &mut opened.data[0]);
}

/// Each range is of one page, and there are as many as one message may have; more messages are against
/// the rules, and so are ranges over others, of which each is all memory.
#[test]
fn data_ranges_at_a_destination() {
    const ALL: u32 = 512 << 10;
    let most = u32::try_from(MAX_DATA_RANGES).expect("few");
    assert_eq!(most, PAGES);
    let flood = |of: &dyn Fn(u32) -> PageRange, times| {
        let ranges = (0..most).map(of).collect();
        let bytes = frame(&Message::DataRanges(ranges)).repeat(times);
        Flood { bytes, against_the_rules: true }
    };
    let floods = [flood(&|page| range(page, 1), 10), flood(&|_| range(0, ALL), 1)];
    assert_destination_stands_sources(
        &["--populate=2"],
        u64::from(ALL) * 4096,
        &floods,
        |opened| &mut opened.control,
    );
}

/// The next connection of a source, its preamble answered.
fn take_next(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = listener.accept().expect("accept");
    stream.read_exact(&mut [0; PREAMBLE_BYTES]).expect("read the preamble");
    stream.write_all(&ok_answer()).expect("answer");
    stream
}

/// What a destination has to say on a data channel is how much has landed, as often as it is asked.
#[test]
fn acknowledgements_at_a_source() {
    // Each transport reads them in a way of its own; the other is io_uring, where there is one.
    for transport in ["--transport=tcp", "--transport=auto"] {
        acknowledgements_over(transport);
    }
}

fn acknowledgements_over(transport: &str) {
    let mut source = source_that_stays(&["--workload=idle", "--channels=1", transport]);
    let idle_bytes = source.peak_memory_bytes();
    let (listener, address) = listen();
    source.say(format!("migrate {address}"));
    let mut control = take_next(&listener);
    let Message::Hello(hello) = receive(&mut control) else { panic!("no greeting") };
    let (_, welcome) = negotiate(&hello, 1, false).expect("it fits");
    send(&mut control, &Message::Welcome(welcome).encode());
    assert_eq!(receive(&mut control), welcome.agreed(&hello));
    send(&mut control, &Message::Registered.encode());
    assert_eq!(receive(&mut control), Message::Registered);
    let mut data = take_next(&listener);
    send(&mut control, &Message::Ready.encode());
    let nothing = [0; ACK_BYTES].repeat(100_000);
    let sent = pour(&mut data, &nothing, &AtomicBool::new(false));
    eprintln!("{} KiB went out, {transport}", sent >> 10);
    assert_needs_little(&mut source, idle_bytes);
    // Not held up by what is still to be read.
    source.say("cancel");
    let report = source.await_report();
    assert_eq!(report.text("guest_at"), "source");
    let (mut destination, address) = destination(&[]);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

/// A destination that answers the greeting of a source with a flood.
#[test]
fn control_frames_at_a_source() {
    let chunk = Message::StateChunk(vec![7; 256 << 10]);
    let mut source = source_that_stays(&["--workload=idle"]);
    let idle_bytes = source.peak_memory_bytes();
    for flood in [frame(&Message::Pong { number: 1 }).repeat(10_000), frame(&chunk)] {
        let (listener, address) = listen();
        source.say(format!("migrate {address}"));
        let mut stream = take(&listener);
        stream.write_all(&ok_answer()).expect("answer");
        assert!(matches!(receive(&mut stream), Message::Hello(_)));
        pour(&mut stream, &flood, &AtomicBool::new(false));
        assert_needs_little(&mut source, idle_bytes);
        drop(stream);
        let report = source.await_report();
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "source"));
    }
    let (mut destination, address) = destination(&[]);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}
