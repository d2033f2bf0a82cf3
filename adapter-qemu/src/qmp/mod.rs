//! QEMU's machine protocol, as a client: docs/interop/qmp-spec.rst of QEMU.
//!
//! One JSON object a line. A command has an identifier, and its answer has it too; between answers come
//! events. A thread reads, so that an event is known when it comes and not when somebody asks.

mod error;
mod message;

use std::io::{self, BufRead, BufReader, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use error::QmpError;
pub use message::{Event, Version, VersionNumbers};
use message::{Message, greeting};

/// The longest message that is read. The longest that QEMU 10 has, its schema, is of 300 KiB.
const MOST_BYTES: u64 = 16 << 20;

/// Events that nobody has asked for are forgotten beyond so many, the oldest first.
const MOST_EVENTS: usize = 4096;

/// How long QEMU has for a command that it does at once.
const PROMPT: Duration = Duration::from_secs(10);

/// A connection to the monitor of a running QEMU. QEMU talks to one client of a monitor at a time.
///
/// # Thread safety
///
/// `Send` and `Sync`. Commands of several threads are done in the order in which they come.
///
/// # Resource cleanup
///
/// Dropping it closes the connection and ends its thread. QEMU runs on.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Held while a command is written.
    writing: Mutex<()>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
    version: Version,
    reader: Option<JoinHandle<()>>,
}

/// What the reading thread and the others share.
#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    changed: Condvar,
}

/// Called for what is heard.
struct Watch(Arc<dyn Fn(Notice<'_>) + Send + Sync>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

/// What a watch is told.
#[derive(Debug)]
pub enum Notice<'n> {
    /// An event.
    Event(&'n Event),
    /// Nothing more will be heard, and why.
    Ended(&'n QmpError),
}

#[derive(Debug, Default)]
struct Heard {
    /// Commands whose answers somebody waits for.
    asked: Vec<u64>,
    answers: Vec<(u64, Result<Value, message::Refusal>)>,
    events: Vec<Event>,
    watch: Option<Watch>,
    /// Why nothing more will be heard.
    ended: Option<QmpError>,
}

impl Heard {
    fn forget(&mut self, id: u64) {
        self.asked.retain(|asked| *asked != id);
        self.answers.retain(|(of, _)| *of != id);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        // Nothing panics between two changes of what it holds.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, why: &QmpError) {
        let watch = {
            let mut heard = self.lock();
            heard.ended = Some(why.clone());
            heard.watch.as_ref().map(|watch| Arc::clone(&watch.0))
        };
        self.changed.notify_all();
        if let Some(watch) = watch {
            watch(Notice::Ended(why));
        }
    }

    /// Waits until `found` has something, the connection is over or time is up.
    fn wait_for<T>(
        &self,
        deadline: Instant,
        mut found: impl FnMut(&mut Heard) -> Option<T>,
    ) -> Result<Option<T>, QmpError> {
        let mut heard = self.lock();
        loop {
            if let Some(found) = found(&mut heard) {
                return Ok(Some(found));
            }
            if let Some(why) = &heard.ended {
                return Err(why.clone());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Ok(None);
            };
            heard =
                self.changed.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Qmp {
    /// Connects to the Unix socket of a monitor (`-qmp unix:PATH,server=on,wait=off`).
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let failed = |cause| QmpError::Connect { path: path.to_owned(), cause: Arc::new(cause) };
        Self::over(UnixStream::connect(path).map_err(failed)?)
    }

    /// Over a socket that is connected to a monitor.
    pub fn over(stream: UnixStream) -> Result<Self, QmpError> {
        let failed = |cause| QmpError::Io(Arc::new(cause));
        let mut lines = BufReader::new(stream.try_clone().map_err(failed)?);
        stream.set_read_timeout(Some(PROMPT)).map_err(failed)?;
        // One that does not read must not hold up who writes to it for ever.
        stream.set_write_timeout(Some(PROMPT)).map_err(failed)?;
        let first = read_line(&mut lines).map_err(|error| match error {
            QmpError::Io(cause) if is_timeout(&cause) => QmpError::NoGreeting { waited: PROMPT },
            error => error,
        })?;
        let version = greeting(&first)?;
        stream.set_read_timeout(None).map_err(failed)?;
        let shared = Arc::new(Shared::default());
        let heard = Arc::clone(&shared);
        let reader = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || heard.end(&listen(&mut lines, &heard)))
            .map_err(failed)?;
        let (writing, next_id) = (Mutex::new(()), AtomicU64::new(1));
        let qmp = Self { stream, writing, shared, next_id, version, reader: Some(reader) };
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// QEMU's version.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The process that listens at the socket: QEMU, unless somebody else made the socket for it.
    pub fn peer_pid(&self) -> Result<u32, QmpError> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream)
            .map_err(|cause| QmpError::Io(Arc::new(cause.into())))?;
        Ok(peer.pid.as_raw_nonzero().get().unsigned_abs())
    }

    /// Has QEMU do something and waits for its answer. Arguments are an object, or null for none.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(PROMPT, command, arguments, None)
    }

    /// The same, and understands the answer.
    pub fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments)?;
        serde_json::from_value(answer)
            .map_err(|why| QmpError::Unexpected { command: command.into(), why: why.to_string() })
    }

    /// The same as [`execute`](Self::execute), with a descriptor beside the command and a time for the answer.
    pub fn execute_within(
        &self,
        time: Duration,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let deadline = Instant::now().checked_add(time).unwrap_or_else(far_away);
        self.shared.lock().asked.push(id);
        let written = self.write(&message, descriptor);
        let answer = written.and_then(|()| {
            self.shared.wait_for(deadline, |heard| {
                let at = heard.answers.iter().position(|(of, _)| *of == id)?;
                Some(heard.answers.swap_remove(at).1)
            })
        });
        self.shared.lock().forget(id);
        match answer? {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(refusal)) => Err(QmpError::Refused {
                command: command.into(),
                class: refusal.class,
                description: refusal.desc,
            }),
            None => Err(QmpError::TimedOut { command: command.into(), waited: time }),
        }
    }

    /// Waits for an event of which that is true, takes it and forgets those before it; `None` when time is up.
    pub fn wait_event(
        &self,
        time: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Option<Event>, QmpError> {
        let deadline = Instant::now().checked_add(time).unwrap_or_else(far_away);
        self.shared.wait_for(deadline, |heard| {
            let at = heard.events.iter().position(&mut wanted)?;
            heard.events.drain(..=at).next_back()
        })
    }

    /// Has that called, by the reading thread, for each event that comes from now on and when nothing more will. It
    /// must not wait for an answer.
    pub fn watch(&self, watch: impl Fn(Notice<'_>) + Send + Sync + 'static) {
        let ended = {
            let mut heard = self.shared.lock();
            heard.watch = Some(Watch(Arc::new(watch)));
            heard.ended.clone().zip(heard.watch.as_ref().map(|watch| Arc::clone(&watch.0)))
        };
        if let Some((why, watch)) = ended {
            watch(Notice::Ended(&why));
        }
    }

    /// Forgets the events that have come up to now.
    pub fn forget_events(&self) {
        self.shared.lock().events.clear();
    }

    fn write(&self, message: &Value, descriptor: Option<BorrowedFd<'_>>) -> Result<(), QmpError> {
        let mut line = message.to_string();
        line.push('\n');
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &self.shared.lock().ended {
            return Err(why.clone());
        }
        let written = self.write_all(line.as_bytes(), descriptor);
        written.map_err(|cause| match cause.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed,
            _ => QmpError::Io(Arc::new(cause)),
        })
    }

    fn write_all(&self, mut bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() {
            beside.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        while !bytes.is_empty() {
            match sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    // It went with the first byte.
                    beside.clear();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Reads until nothing more comes, and says why.
fn listen(lines: &mut impl BufRead, shared: &Shared) -> QmpError {
    loop {
        let message = match read_line(lines).and_then(|line| Message::parse(&line)) {
            Ok(message) => message,
            Err(why) => return why,
        };
        let mut heard = shared.lock();
        match message {
            Message::Answer { id, answer } if heard.asked.contains(&id) => {
                heard.answers.push((id, answer));
            }
            Message::Answer { id, .. } => tracing::debug!(id, "an answer that came too late"),
            Message::Event(event) => {
                tracing::debug!(name = event.name, data = %event.data, "QEMU's event");
                if let Some(watch) = heard.watch.as_ref().map(|watch| Arc::clone(&watch.0)) {
                    drop(heard);
                    watch(Notice::Event(&event));
                    heard = shared.lock();
                }
                if heard.events.len() >= MOST_EVENTS {
                    heard.events.remove(0);
                }
                heard.events.push(event);
            }
        }
        drop(heard);
        shared.changed.notify_all();
    }
}

fn read_line(lines: &mut impl BufRead) -> Result<Vec<u8>, QmpError> {
    let mut line = Vec::new();
    let read = lines.take(MOST_BYTES).read_until(b'\n', &mut line);
    match read {
        Ok(_) if line.ends_with(b"\n") => Ok(line),
        Ok(read) if read as u64 >= MOST_BYTES => Err(QmpError::TooLong { limit_bytes: MOST_BYTES }),
        Ok(_) => Err(QmpError::Closed),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(QmpError::Closed),
        Err(error) => Err(QmpError::Io(Arc::new(error))),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A time limit that cannot be reckoned with is none.
fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(365 * 24 * 3600)
}

#[cfg(test)]
mod tests;
