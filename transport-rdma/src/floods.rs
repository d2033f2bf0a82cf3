//! Peers that send more than they were given credits for, against real processes: where there is an RDMA
//! device, and `PAGEFERRY_VMM` is a `pageferry-vmm` that was built for it.

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol;
use pageferry::transport::{Admission, Link, LinkId, TransportError};

use crate::RdmaAcceptor;
use crate::cm::RemoteAccess;
use crate::connection::Connection;
use crate::dial::Workshop;
use crate::pipe::{ACKS, Inlet, RECEIVES, SLOT_BYTES};
use crate::preamble::Purpose;
use crate::strangers::{GETS_IN, SOON, acceptor, acceptor_of, other_half, serve, stranger};
use crate::verbs::{Access, Completion, MemoryRegion, ProtectionDomain, Request, Span, Verb};

/// More than a process that is idle has, at most.
const MOST_MORE_BYTES: u64 = 64 << 20;
/// How long a flood goes on before anything else happens.
const FLOOD: Duration = Duration::from_secs(2);
/// How long a flooder waits before it looks whether that is enough.
const TURN: Duration = Duration::from_millis(100);
/// Messages of a flooder that are under way.
const UNDER_WAY: usize = 64;

/// Frames of one message each that get through from who reads no word about them: at most all of the room
/// for each word that is there or under way, and all of it twice after the last.
const MOST_FRAMES: u32 = 2 * ACKS * RECEIVES + 2 * RECEIVES;

/// Somebody's memory, and a message in it; none for a mark.
fn message(bytes: &mut MemoryRegion, message: &[u8]) -> Option<Span> {
    bytes.put(0, message);
    let len_bytes = u32::try_from(message.len()).expect("a message");
    let span = Span { address: bytes.address(), len_bytes, key: bytes.local_key() };
    Some(span).filter(|span| span.len_bytes > 0)
}

fn memory(pd: &Arc<ProtectionDomain>) -> MemoryRegion {
    MemoryRegion::own(pd, SLOT_BYTES, Access::Local).expect("memory")
}

/// Sends a message, or marks, over and over, whatever it was given credits for, and reads no word about
/// them. Until the connection ends, or enough has gone out; how many did.
fn pour(
    connection: &mut Connection,
    pd: &Arc<ProtectionDomain>,
    said: &[u8],
    is_enough: impl Fn(u64) -> bool,
) -> u64 {
    let mut bytes = memory(pd);
    let span = message(&mut bytes, said);
    let (mut posted, mut under_way, mut found) = (0, 0, Vec::new());
    while !is_enough(posted) {
        let more = (under_way..UNDER_WAY).map(|_| {
            posted += 1;
            Request { work: posted, verb: Verb::Send, span, signalled: true }
        });
        found.clear();
        let turn = Instant::now() + TURN;
        if connection.qp.post(more).is_err()
            || connection.completions(&mut found, Some(turn)).is_err()
            || found.iter().any(Completion::is_error)
        {
            break;
        }
        let sent = found.iter().filter(|completion| completion.work <= posted).count();
        under_way = UNDER_WAY - sent;
    }
    posted
}

/// Sends a greeting, in pieces; false if it does not get there.
fn greet(connection: &mut Connection, pd: &Arc<ProtectionDomain>, mut greeting: &[u8]) -> bool {
    let (mut bytes, mut found) = (memory(pd), Vec::new());
    while !greeting.is_empty() {
        let (now, later) = greeting.split_at(greeting.len().min(SLOT_BYTES - 5));
        let left = u32::try_from(greeting.len()).expect("short").to_le_bytes();
        let span = message(&mut bytes, &[&[1][..], &left, now].concat());
        let request = Request { work: 1, verb: Verb::Send, span, signalled: true };
        found.clear();
        if connection.qp.post([request]).is_err()
            || connection.completions(&mut found, Some(Instant::now() + SOON)).is_err()
            || found.iter().any(Completion::is_error)
        {
            return false;
        }
        greeting = later;
    }
    true
}

/// A source's half of a control channel, which has no room for a word.
fn deaf_half(workshop: &Workshop, migration: LinkId) -> Result<Connection, TransportError> {
    let path = workshop.path(RemoteAccess::Nothing, workshop.mtu);
    let depths = (u32::try_from(UNDER_WAY).unwrap_or(1) + RECEIVES, ACKS);
    let mut connection = workshop.prepare(workshop.way()?, depths, path)?;
    let say = workshop.preamble(Purpose::Control, migration);
    workshop.ask(&mut connection, &say, path)?;
    workshop.await_answer(&mut connection, RemoteAccess::Nothing)?;
    Ok(connection)
}

/// Somebody who connects as a source does; `None` if it is turned away.
fn connect_deaf(to: SocketAddr, migration: LinkId) -> Option<(Connection, Inlet, Workshop)> {
    let workshop = stranger(to);
    let outlet = deaf_half(&workshop, migration).ok()?;
    let inlet = workshop.dial_inlet(&workshop.preamble(Purpose::ControlBack, migration)).ok()?;
    Some((outlet, inlet, workshop))
}

/// A frame as one message.
fn whole(frame: &[u8]) -> Vec<u8> {
    let length = u32::try_from(frame.len()).expect("short").to_le_bytes();
    [&[1][..], &length, frame].concat()
}

/// A frame of about as many bytes as a message has.
fn chunk() -> Vec<u8> {
    whole(&protocol::Message::StateChunk(vec![7; SLOT_BYTES - 100]).encode())
}

/// A `pageferry-vmm`, killed when dropped.
struct Vmm {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    /// The line that it said when it was ready.
    said: String,
}

impl Vmm {
    /// Started, and so far that it says something. `None` where there is no such program.
    fn start(args: &[&str], until: &str) -> Option<Self> {
        let Ok(program) = std::env::var("PAGEFERRY_VMM") else {
            eprintln!("floods over RDMA skipped, because PAGEFERRY_VMM names no pageferry-vmm");
            return None;
        };
        let mut child = Command::new(program)
            .args(args)
            .args(["--with-parent", "--json", "--transport", "rdma"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let stderr = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut messages = stderr.map_while(Result::ok).inspect(|line| eprintln!("{line}"));
        let said = messages.find(|line| line.contains(until)).expect("it says so");
        thread::spawn(move || messages.for_each(drop));
        Some(Self { child, stdout, said })
    }

    fn destination(address: &str) -> Option<Self> {
        let listen = format!("{address}:0");
        Self::start(&["receive", "--listen", &listen, "--run-for", "100ms"], "listening on ")
    }

    /// Its guest stays until it is told to go.
    fn source() -> Option<Self> {
        let guest = ["--guest=process", "--memory=32M", "--working-set=4M", "--backing=memfd"];
        let run = ["run", "--on-demand", "--workload=idle", "--downtime-limit=2s"];
        Self::start(&[&run[..], &guest].concat(), "pageferry guest: ")
    }

    fn address(&self) -> SocketAddr {
        let address = self.said.trim_start_matches("listening on ");
        address.parse().expect("an address")
    }

    fn go_to(&mut self, to: SocketAddr) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "migrate {to}").expect("it reads");
    }

    /// The next report; the guest is where it says.
    fn assert_guest_at(&mut self, place: &str) {
        let report = self.stdout.next().expect("a report").expect("its stdout");
        assert!(report.contains(&format!(r#""guest_at":"{place}""#)), "{report}");
    }

    /// The most memory it has had so far, in bytes.
    fn peak_memory_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("its status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it lives");
        let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        kib << 10
    }

    fn assert_needs_little(&self, idle_bytes: u64) {
        let more = self.peak_memory_bytes().saturating_sub(idle_bytes);
        assert!(more < MOST_MORE_BYTES, "{} MiB more than idle", more >> 20);
    }

    fn assert_ends_well(&mut self) {
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Fails where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest gets from a source to a destination that others disturb, soon, and at the first attempt.
fn assert_gets_in(source: &mut Vmm, destination: &mut Vmm) {
    let began = Instant::now();
    source.go_to(destination.address());
    source.assert_guest_at("destination");
    let took = began.elapsed();
    eprintln!("a guest got in after {took:?}");
    assert!(took < GETS_IN, "after {took:?}");
    destination.assert_guest_at("destination");
}

/// The greeting of a source, which a destination would take.
fn greeting_of(source: &mut Vmm, acceptor: &RdmaAcceptor) -> Vec<u8> {
    source.go_to(acceptor.local_addr());
    let mut link = acceptor.accept(Some(SOON)).expect("it comes");
    let mut control = link.control().expect("once");
    let greeting = control.receiver.receive(Some(SOON)).expect("it greets");
    drop((control, link));
    source.assert_guest_at("source");
    greeting
}

/// Ends a flood when dropped, and so also when a test panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Each message waits for a credit, unless its sender takes what he was not given.
#[test]
fn a_source_that_floods_is_told_off_and_costs_no_more_than_its_credits() {
    let Some(acceptor) = acceptor() else { return };
    let to = acceptor.local_addr();
    let migration = LinkId([3; 16]);
    let workshop = stranger(to);
    let mut outlet = deaf_half(&workshop, migration).expect("it is let in");
    let _inlet = other_half(to, migration);
    let mut link = acceptor.accept(Some(SOON)).expect("it came");
    let mut control = link.control().expect("once");
    thread::scope(|scope| {
        scope.spawn(move || {
            let began = Instant::now();
            // Frames of one byte.
            pour(&mut outlet, &workshop.pd, &[1, 1, 0, 0, 0, 7], |posted| {
                assert!(began.elapsed() < SOON, "nobody minds {posted} messages");
                false
            })
        });
        // As a host that is busy for a moment: what comes meanwhile waits.
        thread::sleep(Duration::from_millis(300));
        let mut frames = 0;
        let error = loop {
            match control.receiver.receive(Some(SOON)) {
                Ok(_) => frames += 1,
                Err(error) => break error,
            }
        };
        eprintln!("told off after {frames} frames");
        assert!(matches!(error, TransportError::Violation(_)), "{error:?}");
        assert!(frames <= MOST_FRAMES, "{frames} frames");
        drop((control, link));
    });
    serve(&acceptor);
}

/// Sources come again and again, greet, and flood without room for a word: with marks, short frames and
/// long ones; some before they have greeted.
#[test]
fn messages_without_receives_at_a_destination() {
    const FLOODERS: u8 = 2;
    let Some(acceptor) = acceptor_of(Admission::Greeted) else { return };
    let address = acceptor.local_addr().ip().to_string();
    let Some(mut source) = Vmm::source() else { return };
    let Some(mut destination) = Vmm::destination(&address) else { return };
    let greeting = greeting_of(&mut source, &acceptor);
    let ping = whole(&protocol::Message::Ping { number: 1 }.encode());
    let floods: [(&[u8], &[u8]); 4] =
        [(&[], &[]), (&greeting, &[]), (&greeting, &ping), (&greeting, &chunk())];
    let (idle_bytes, to) = (destination.peak_memory_bytes(), destination.address());
    let (over, next, sent) = (AtomicBool::new(false), AtomicU8::new(0), AtomicU64::new(0));
    let flooder = || {
        while !over.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let (greeting, flood) = floods[usize::from(number) % floods.len()];
            let Some((mut outlet, _inlet, workshop)) = connect_deaf(to, LinkId([number; 16]))
            else {
                continue;
            };
            if greet(&mut outlet, &workshop.pd, greeting) {
                let is_enough = |_| over.load(Ordering::Relaxed);
                let went = pour(&mut outlet, &workshop.pd, flood, is_enough);
                sent.fetch_add(went, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..FLOODERS {
            scope.spawn(flooder);
        }
        let _stop = Stop(&over);
        let until = Instant::now() + FLOOD;
        while Instant::now() < until {
            destination.assert_needs_little(idle_bytes);
            thread::yield_now();
        }
        assert_gets_in(&mut source, &mut destination);
    });
    eprintln!("{sent:?} messages went out from {next:?} sources");
    source.assert_ends_well();
    destination.assert_ends_well();
}

/// A destination that lets a source in and answers its greeting with a flood. It has room for the first
/// words only, and reads none.
#[test]
fn messages_without_receives_at_a_source() {
    let Some(acceptor) = acceptor_of(Admission::Greeted) else { return };
    let address = acceptor.local_addr().ip().to_string();
    let Some(mut source) = Vmm::source() else { return };
    let Some(mut destination) = Vmm::destination(&address) else { return };
    let idle_bytes = source.peak_memory_bytes();
    let pong = whole(&protocol::Message::Pong { number: 1 }.encode());
    for flood in [&[][..], &pong, &chunk()] {
        source.go_to(acceptor.local_addr());
        let (arrival, place) = acceptor.desk.accept(Some(SOON)).expect("it comes");
        let mut outlet = arrival.outlet.expect("both halves");
        let began = Instant::now();
        let sent = pour(&mut outlet.connection, &arrival.workshop.pd, flood, |_| {
            source.assert_needs_little(idle_bytes);
            began.elapsed() >= SOON
        });
        eprintln!("{sent} messages went out in {:?}", began.elapsed());
        // Those behind the last one that it took are under way.
        assert!(sent <= u64::from(MOST_FRAMES) + UNDER_WAY as u64, "nobody minds");
        source.assert_guest_at("source");
        source.assert_needs_little(idle_bytes);
        drop((outlet, arrival.inlet, place));
    }
    assert_gets_in(&mut source, &mut destination);
    source.assert_ends_well();
    destination.assert_ends_well();
}
