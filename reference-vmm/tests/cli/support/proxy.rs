//! Links through which everything goes until something happens to them: when the guest stands still, or when
//! a test says so.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use pageferry::protocol::Message;
use pageferry_tcp::preamble::{ANSWER_BYTES, Kind, PREAMBLE_BYTES, Preamble};

use super::peer::{frame, try_receive};

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// All connections are cut.
    Cut,
    /// Those of the data channels are. On the other one nothing comes any more.
    DataCut,
    /// Nothing gets through any more, and nobody is told.
    Silence,
    /// The same, when memory is about to be compared.
    SilentComparison,
}

struct Link {
    trouble: Trouble,
    /// Whether it has happened.
    over: AtomicBool,
    /// Both ends of each connection, and what it is for: open for as long as the test's process is there.
    connections: Mutex<Vec<([TcpStream; 2], Kind)>>,
}

/// Listens for a source on its way to `destination`. With its own address.
pub(crate) fn proxy(destination: &str, trouble: Trouble) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = listener.local_addr().expect("an address").to_string();
    let destination = destination.to_owned();
    let link = Link { trouble, over: AtomicBool::new(false), connections: Mutex::default() };
    let link = Arc::new(link);
    thread::spawn(move || {
        for source in listener.incoming().map_while(Result::ok) {
            // What cannot be passed on is not: the source sees it.
            let _ = link.connect(source, &destination);
        }
    });
    address
}

impl Link {
    /// Connects a source with the destination.
    fn connect(self: &Arc<Self>, mut source: TcpStream, destination: &str) -> io::Result<()> {
        let mut there = TcpStream::connect(destination)?;
        let mut bytes = [0; PREAMBLE_BYTES];
        source.read_exact(&mut bytes)?;
        there.write_all(&bytes)?;
        let kind = Preamble::decode(&bytes).map_err(io::Error::other)?.kind;
        let mut answer = [0; ANSWER_BYTES];
        there.read_exact(&mut answer)?;
        source.write_all(&answer)?;
        let ends = [source.try_clone()?, there.try_clone()?];
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push((ends, kind));
        let (from_there, to_source) = (there.try_clone()?, source.try_clone()?);
        let link = Arc::clone(self);
        thread::spawn(move || link.pass(from_there, to_source));
        let link = Arc::clone(self);
        thread::spawn(move || match kind {
            Kind::Control => drop(link.pass_until_it_stands_still(source, there)),
            Kind::Data { .. } | Kind::Lane { .. } => link.pass(source, there),
        });
        Ok(())
    }

    /// Passes on what comes, and its end.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 256 << 10];
        loop {
            let read = from.read(&mut bytes).unwrap_or(0);
            if self.over.load(Ordering::Relaxed) {
                return;
            }
            if read == 0 || to.write_all(&bytes[..read]).is_err() {
                // Fails if it is gone altogether.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
        }
    }

    /// The last pages go out once the guest stands still: that is announced as a round of its own.
    fn pass_until_it_stands_still(&self, mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
        let mut switching = false;
        loop {
            let Ok(message) = try_receive(&mut from) else { return to.shutdown(Shutdown::Write) };
            let is_it = match self.trouble {
                Trouble::SilentComparison => matches!(message, Message::Verify { .. }),
                _ => switching && matches!(message, Message::Round { .. }),
            };
            if is_it {
                break;
            }
            switching = matches!(message, Message::Switchover { .. });
            to.write_all(&frame(&message))?;
        }
        self.over.store(true, Ordering::Relaxed);
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        for (ends, kind) in &*connections {
            let cut = match self.trouble {
                Trouble::Cut => true,
                Trouble::DataCut => *kind != Kind::Control,
                Trouble::Silence | Trouble::SilentComparison => false,
            };
            for end in ends.iter().filter(|_| cut) {
                // It may be gone already.
                let _ = end.shutdown(Shutdown::Both);
            }
        }
        Ok(())
    }
}

/// What a whole link goes through: shut, nothing passes on any of its connections, either way, and
/// nobody is told.
#[derive(Default)]
pub(crate) struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
    /// How often it was shut for good, for the connections that were there.
    walls: AtomicU64,
}

impl Gate {
    pub(crate) fn shut(&self) {
        *self.shut.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    pub(crate) fn open(&self) {
        *self.shut.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.changed.notify_all();
    }

    /// Nothing passes on the connections that are there any more; on others it does.
    pub(crate) fn shut_for_those_that_are_there(&self) {
        self.walls.fetch_add(1, Ordering::SeqCst);
    }

    /// Passes on what comes, and its end.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let walls = self.walls.load(Ordering::SeqCst);
        let mut bytes = vec![0; 64 << 10];
        loop {
            let read = from.read(&mut bytes).unwrap_or(0);
            if self.walls.load(Ordering::SeqCst) != walls {
                // Nobody is told: both ends stay open.
                loop {
                    thread::park();
                }
            }
            let shut = self.shut.lock().unwrap_or_else(PoisonError::into_inner);
            drop(self.changed.wait_while(shut, |shut| *shut));
            if read == 0 || to.write_all(&bytes[..read]).is_err() {
                // Fails if it is gone altogether.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
        }
    }
}

/// Somebody on the way who listens, and may cut everything.
#[derive(Default)]
pub(crate) struct Tap {
    /// What was said first on each connection in each direction, in the order in which they began to say something.
    said: Mutex<Vec<Vec<u8>>>,
    ends: Mutex<Vec<TcpStream>>,
}

impl Tap {
    pub(crate) fn cut(&self) {
        for end in self.ends.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may be gone already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// What a source has said first on its newest control connection.
    pub(crate) fn newest_control(&self) -> Vec<u8> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let is_control = |said: &&Vec<u8>| {
            let preamble = said.first_chunk().map(Preamble::decode);
            matches!(preamble, Some(Ok(Preamble { kind: Kind::Control, .. })))
        };
        said.iter().rev().find(is_control).expect("a source has come").clone()
    }

    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        const FIRST_BYTES: usize = 256;
        let mut bytes = vec![0; 64 << 10];
        let mut place = None;
        while let Ok(read @ 1..) = from.read(&mut bytes) {
            let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
            let place = *place.get_or_insert_with(|| {
                said.push(Vec::new());
                said.len() - 1
            });
            let more = FIRST_BYTES.saturating_sub(said[place].len()).min(read);
            said[place].extend_from_slice(&bytes[..more]);
            drop(said);
            if to.write_all(&bytes[..read]).is_err() {
                break;
            }
        }
        // Fails if it is gone altogether.
        let _ = to.shutdown(Shutdown::Write);
    }
}

/// By way of a tap.
pub(crate) fn tapped(destination: &str, tap: &Arc<Tap>) -> String {
    let (tap, come) = (Arc::clone(tap), Arc::clone(tap));
    let come = move |source: &TcpStream, there: &TcpStream| {
        let ends = [source, there].into_iter().filter_map(|end| end.try_clone().ok());
        come.ends.lock().unwrap_or_else(PoisonError::into_inner).extend(ends);
    };
    passing(destination, come, move |from, to| tap.pass(from, to))
}

/// Listens for a source on its way to `destination`, with its own address, and passes each connection on, both ways.
fn passing(
    destination: &str,
    come: impl Fn(&TcpStream, &TcpStream) + Send + 'static,
    pass: impl Fn(TcpStream, TcpStream) + Clone + Send + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = listener.local_addr().expect("an address").to_string();
    let destination = destination.to_owned();
    thread::spawn(move || {
        for source in listener.incoming().map_while(Result::ok) {
            let Ok(there) = TcpStream::connect(&destination) else { continue };
            come(&source, &there);
            for (from, to) in [(&source, &there), (&there, &source)] {
                let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { continue };
                let pass = pass.clone();
                thread::spawn(move || pass(from, to));
            }
        }
    });
    address
}

/// By way of a gate.
pub(crate) fn gated(destination: &str, gate: &Arc<Gate>) -> String {
    let gate = Arc::clone(gate);
    passing(destination, |_, _| {}, move |from, to| gate.pass(from, to))
}

/// A link that a test cuts as often as it likes: all its connections, and others are let through.
#[derive(Default)]
pub(crate) struct Relay {
    connections: Mutex<Vec<TcpStream>>,
    passed_bytes: AtomicU64,
}

impl Relay {
    /// Waits until so many bytes more have gone through, and cuts it then.
    pub(crate) fn cut_after(&self, bytes: u64) {
        let until = self.passed_bytes.load(Ordering::Relaxed) + bytes;
        while self.passed_bytes.load(Ordering::Relaxed) < until {
            thread::yield_now();
        }
        for end in self.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may be gone already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let read = from.read(&mut bytes).unwrap_or(0);
            self.passed_bytes.fetch_add(read as u64, Ordering::Relaxed);
            if read == 0 || to.write_all(&bytes[..read]).is_err() {
                // Fails if it is gone altogether.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
        }
    }
}

/// By way of a relay.
pub(crate) fn relayed(destination: &str, relay: &Arc<Relay>) -> String {
    let (knows, relay) = (Arc::clone(relay), Arc::clone(relay));
    // Before anything passes: what a cut does not find it does not cut.
    let come = move |source: &TcpStream, there: &TcpStream| {
        let mut connections = knows.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.extend([source, there].into_iter().filter_map(|end| end.try_clone().ok()));
    };
    passing(destination, come, move |from, to| relay.pass(from, to))
}

/// By way of something that changes a bit of every so many bytes on a connection, so many times in all. Whatever is said
/// on a control channel is less.
pub(crate) fn damaging(destination: &str, every_bytes: u64, times: u64) -> String {
    let left = Arc::new(AtomicU64::new(times));
    passing(
        destination,
        |_, _| {},
        move |mut from, mut to| {
            let (mut bytes, mut passed) = (vec![0; 64 << 10], 0);
            loop {
                let read = from.read(&mut bytes).unwrap_or(0);
                let next = (passed / every_bytes + 1) * every_bytes;
                let here = next - passed;
                let less = |left: u64| left.checked_sub(1);
                if here < read as u64
                    && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
                {
                    bytes[usize::try_from(here).expect("less than a buffer")] ^= 0x04;
                }
                passed += read as u64;
                if read == 0 || to.write_all(&bytes[..read]).is_err() {
                    // Fails if it is gone altogether.
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
            }
        },
    )
}
