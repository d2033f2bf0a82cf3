//! The way between two sides, which stops at a given message until a test has said what becomes of it and of the
//! way.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::Message;
use pageferry::transport::stream::FRAME_HEADER_BYTES;
use pageferry_tcp::preamble::{ANSWER_BYTES, Kind, PREAMBLE_BYTES, Preamble};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::connect_unspec;

use crate::support::PATIENCE;
use crate::support::peer::whole_frame;

use super::model::{Step, Way};

/// How often who waits for bytes looks whether it still has to.
const GLANCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// What becomes of a message that is held.
pub(super) enum Verdict {
    /// It goes on.
    Deliver,
    /// It is lost.
    Drop,
    /// This arrives in its place.
    Replace(Vec<u8>),
}

/// Whether new connections get through.
#[derive(Clone, Copy)]
enum Open {
    Always,
    From(Instant),
    Never,
}

/// A connection that goes by this way.
struct Connection {
    kind: Kind,
    /// Towards the source, and towards the destination.
    ends: [TcpStream; 2],
}

struct State {
    steps: VecDeque<Step>,
    connections: Vec<Connection>,
    /// By [`Way`].
    blocked: [bool; 2],
    open: Open,
    /// Nothing more is expected: threads end.
    over: bool,
}

struct Shared {
    destination: String,
    state: Mutex<State>,
    changed: Condvar,
    held: Mutex<Sender<Vec<u8>>>,
    verdicts: Mutex<Receiver<Verdict>>,
}

/// Ends with all its connections when dropped.
pub(super) struct Path {
    pub(super) address: String,
    shared: Arc<Shared>,
    held: Receiver<Vec<u8>>,
    verdicts: Sender<Verdict>,
}

impl Path {
    /// To a destination. It stops at each of the steps, in this order.
    pub(super) fn to(destination: &str, steps: &[Step]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = listener.local_addr().expect("an address").to_string();
        let ((held_in, held), (verdicts, verdicts_out)) = (channel(), channel());
        let shared = Arc::new(Shared {
            destination: destination.to_owned(),
            state: Mutex::new(State {
                steps: steps.iter().copied().collect(),
                connections: Vec::new(),
                blocked: [false; 2],
                open: Open::Always,
                over: false,
            }),
            changed: Condvar::new(),
            held: Mutex::new(held_in),
            verdicts: Mutex::new(verdicts_out),
        });
        let listening = Arc::clone(&shared);
        thread::spawn(move || listening.listen(&listener));
        Self { address, shared, held, verdicts }
    }

    /// Waits until the message of the next step has come. As it came.
    pub(super) fn await_step(&self) -> Option<Vec<u8>> {
        self.held.recv_timeout(PATIENCE).ok()
    }

    /// How many connections have gone by it.
    pub(super) fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    pub(super) fn go_on(&self, verdict: Verdict) {
        // Its thread waits for this.
        self.verdicts.send(verdict).expect("somebody holds a message");
    }

    /// Resets connections, those that are for this.
    pub(super) fn reset(&self, which: impl Fn(Kind) -> bool) -> usize {
        let state = self.shared.lock();
        let these = state.connections.iter().filter(|connection| which(connection.kind));
        let ends: Vec<_> = these.flat_map(|connection| &connection.ends).collect();
        for end in &ends {
            reset(end);
        }
        ends.len()
    }

    /// From now on nothing passes this way, and nobody is told.
    pub(super) fn block(&self, way: Way) {
        self.shared.lock().blocked[way as usize] = true;
    }

    /// The control connection ends in order this way only.
    pub(super) fn close_half(&self, way: Way) {
        let state = self.shared.lock();
        let of_control = |each: &&Connection| each.kind == Kind::Control;
        if let Some(control) = state.connections.iter().rev().find(of_control) {
            // Whoever it is for may be gone already.
            let _ = control.ends[way.towards()].shutdown(Shutdown::Write);
        }
    }

    /// All connections are reset, and others are for a while.
    pub(super) fn cut_for(&self, time: Duration) {
        self.cut(Open::From(Instant::now() + time));
    }

    /// All connections are reset, and others are too.
    pub(super) fn cut_for_good(&self) {
        self.cut(Open::Never);
    }

    fn cut(&self, open: Open) {
        self.shared.lock().open = open;
        self.reset(|_| true);
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        self.reset(|_| true);
        // Wakes who listens.
        let _ = TcpStream::connect(&self.address);
    }
}

/// The other side sees a reset, whoever else has this end too.
fn reset(end: &TcpStream) {
    // Busy while somebody writes to it, which takes until there is room; and it may be gone already.
    let deadline = Instant::now() + PATIENCE;
    while connect_unspec(end) == Err(Errno::BUSY) && Instant::now() < deadline {
        thread::yield_now();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the test of a message, and hears what becomes of it.
    fn ask(&self, frame: Vec<u8>) -> Option<Verdict> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).send(frame).ok()?;
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
    }

    fn is_over(&self) -> bool {
        self.lock().over
    }

    fn listen(self: &Arc<Self>, listener: &TcpListener) {
        for source in listener.incoming().map_while(Result::ok) {
            if self.is_over() {
                return;
            }
            let shared = Arc::clone(self);
            // What cannot be passed on is not: the source sees it.
            thread::spawn(move || shared.connect(&source));
        }
    }

    /// Connects a source with the destination.
    fn connect(self: &Arc<Self>, source: &TcpStream) -> io::Result<()> {
        let open = match self.lock().open {
            Open::Always => true,
            Open::From(time) => Instant::now() >= time,
            Open::Never => false,
        };
        if !open {
            reset(source);
            return Ok(());
        }
        let destination = TcpStream::connect(&self.destination)?;
        let mut first = vec![0; PREAMBLE_BYTES];
        self.read_exact(source, &mut first)?;
        let kind = first.first_chunk().map(Preamble::decode);
        let kind = kind.and_then(Result::ok).ok_or(io::ErrorKind::InvalidData)?.kind;
        // Before anything passes: what a reset does not find it does not end.
        let ends = [source.try_clone()?, destination.try_clone()?];
        self.lock().connections.push(Connection { kind, ends });
        for (way, from, to) in
            [(Way::ToDestination, source, &destination), (Way::ToSource, &destination, source)]
        {
            let pump = Pump {
                shared: Arc::clone(self),
                way,
                from: from.try_clone()?,
                to: to.try_clone()?,
                said: None,
            };
            let first = if way == Way::ToDestination { first.clone() } else { Vec::new() };
            thread::spawn(move || pump.run(kind, &first));
        }
        Ok(())
    }

    fn read_exact(&self, from: &TcpStream, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.read(from, &mut bytes[filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        Ok(())
    }

    /// Waits by poll: a reset is not possible while somebody waits by reading.
    fn read(&self, mut from: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
        let from_fd = from.as_fd();
        loop {
            if self.is_over() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match poll(&mut [PollFd::from_borrowed_fd(from_fd, PollFlags::IN)], Some(&GLANCE)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return from.read(bytes),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Passes on what goes one way on one connection.
struct Pump {
    shared: Arc<Shared>,
    way: Way,
    from: TcpStream,
    to: TcpStream,
    /// The message before.
    said: Option<Message>,
}

impl Pump {
    fn run(mut self, kind: Kind, first: &[u8]) {
        let passed = match kind {
            Kind::Control => self.pass_frames(first),
            Kind::Data { .. } | Kind::Lane { .. } => self.pass(first),
        };
        match passed {
            // Fails if it is gone altogether.
            Ok(()) => drop(self.to.shutdown(Shutdown::Write)),
            Err(_) => reset(&self.to),
        }
    }

    /// Passes on what comes, up to its end.
    fn pass(&self, first: &[u8]) -> io::Result<()> {
        self.write(first)?;
        let mut bytes = vec![0; 64 << 10];
        loop {
            match self.shared.read(&self.from, &mut bytes)? {
                0 => return Ok(()),
                read => self.write(&bytes[..read])?,
            }
        }
    }

    /// The same, frame by frame.
    fn pass_frames(&mut self, first: &[u8]) -> io::Result<()> {
        self.write(first)?;
        if self.way == Way::ToSource {
            let mut answer = [0; ANSWER_BYTES];
            self.shared.read_exact(&self.from, &mut answer)?;
            self.write(&answer)?;
        }
        let (mut bytes, mut held) = (vec![0; 64 << 10], Vec::new());
        loop {
            let read = self.shared.read(&self.from, &mut bytes)?;
            if read == 0 {
                return self.write(&held);
            }
            held.extend_from_slice(&bytes[..read]);
            while let Some(length) = whole_frame(&held) {
                let frame: Vec<_> = held.drain(..length).collect();
                if length == FRAME_HEADER_BYTES {
                    // A refusal, which is no frame.
                    self.write(&frame)?;
                    return self.pass(&std::mem::take(&mut held));
                }
                self.pass_frame(&frame)?;
            }
        }
    }

    fn pass_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let message = Message::decode(&frame[FRAME_HEADER_BYTES..]).map_err(io::Error::other)?;
        let mut state = self.shared.lock();
        let due = state
            .steps
            .front()
            .is_some_and(|step| step.way() == self.way && step.is(self.said.as_ref(), &message));
        if due {
            state.steps.pop_front();
        }
        drop(state);
        self.said = Some(message);
        if !due {
            return self.write(frame);
        }
        match self.shared.ask(frame.to_vec()) {
            Some(Verdict::Deliver) => self.write(frame),
            Some(Verdict::Drop) => Ok(()),
            Some(Verdict::Replace(other)) => self.write(&other),
            // The test has ended.
            None => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let state = self.shared.lock();
        let way = self.way as usize;
        let state = self
            .shared
            .changed
            .wait_while(state, |state| state.blocked[way] && !state.over)
            .unwrap_or_else(PoisonError::into_inner);
        if state.over {
            return Err(io::ErrorKind::Interrupted.into());
        }
        drop(state);
        (&self.to).write_all(bytes)
    }
}
