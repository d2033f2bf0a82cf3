//! The bare loop: the least that moves the same memory over the same number of connections.
//!
//! Each connection has a thread on both sides and its own contiguous part of the memory. The
//! sender calls `write` with up to [`CHUNK_BYTES`] straight from memory until its part is out.
//! The receiver calls `read` for all that is still missing, straight into memory; the kernel
//! returns what has come, without being told to wait for more. When its part is there it sends
//! one byte back, and the transfer is over when the source has all of these bytes.
//!
//! There is no format, no check, no zero page, no flow control but TCP's. Against an engine that encrypts in its
//! process it does that too ([`super::bare_sealed`]).

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};
use pageferry_cli::outcome::Failure;
use pageferry_tcp::KernelTls;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile, VolatileMemoryError,
    VolatileSlice, WriteVolatile,
};

use super::bare_sealed;
use super::memory::parts;
use super::wire::{Measured, Setup};
use crate::usage::CpuWindow;

/// Most bytes of one `write`.
const CHUNK_BYTES: usize = 1 << 20;

/// A byte that says "ready", and one that says "all here".
const READY: [u8; 1] = [1];
const ARRIVED: [u8; 1] = [2];

/// Moves all memory to `address`.
pub(super) fn send(
    memory: &GuestMemoryMmap<()>,
    setup: &Setup,
    address: SocketAddr,
) -> Result<Measured, Failure> {
    let mut streams = Vec::new();
    for index in 0..setup.channels {
        let mut stream = TcpStream::connect(address)
            .map_err(|error| format!("failed to connect to {address}: {error}"))?;
        stream.set_nodelay(true)?;
        stream.write_all(&index.to_le_bytes())?;
        streams.push(stream);
    }
    for stream in &mut streams {
        stream.read_exact(&mut [0; READY.len()])?;
    }
    let calls = AtomicU64::new(0);
    let window = CpuWindow::default();
    let (started, ended) = thread::scope(|scope| -> Result<_, Failure> {
        let mut threads = Vec::new();
        let mut starts = Vec::new();
        for (stream, part) in streams.into_iter().zip(parts_of(setup)) {
            let (start, wait) = bounded(1);
            starts.push(start);
            let (calls, sealed) = (&calls, is_sealed(setup));
            let body = move || send_part(stream, memory, &part, sealed, &wait, calls);
            threads.push(named("bare-send").spawn_scoped(scope, body)?);
        }
        // As the engine: threads wait for work, and the clock runs before they get it.
        window.begin();
        let started = Instant::now();
        for start in starts {
            start.send(())?;
        }
        let mut ended = started;
        for end in join(threads)? {
            ended = ended.max(end);
        }
        window.end();
        Ok((started, ended))
    })?;
    Ok(Measured {
        nanoseconds: u64::try_from(ended.duration_since(started).as_nanos())?,
        payload_bytes: setup.memory_bytes,
        cpu_nanoseconds: window.nanoseconds(),
        system_calls: calls.into_inner(),
        ..Measured::default()
    })
}

/// Takes in what [`send`] sends to `listener`.
pub(super) fn receive(
    memory: &GuestMemoryMmap<()>,
    setup: &Setup,
    listener: &TcpListener,
) -> Result<Measured, Failure> {
    let mut streams = Vec::new();
    streams.resize_with(usize::from(setup.channels), || None);
    for _ in 0..setup.channels {
        let (mut stream, peer) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut index = [0; 2];
        stream.read_exact(&mut index)?;
        let place = streams.get_mut(usize::from(u16::from_le_bytes(index)));
        let Some(place @ None) = place else {
            return Err(format!("failed to accept connections: {peer} is not the source").into());
        };
        *place = Some(stream);
    }
    let calls = AtomicU64::new(0);
    let window = CpuWindow::default();
    window.begin();
    thread::scope(|scope| -> Result<_, Failure> {
        let mut threads = Vec::new();
        for (stream, part) in streams.into_iter().flatten().zip(parts_of(setup)) {
            let (calls, sealed) = (&calls, is_sealed(setup));
            let body = move || receive_part(stream, memory, &part, sealed, calls);
            threads.push(named("bare-recv").spawn_scoped(scope, body)?);
        }
        join(threads)
    })?;
    window.end();
    Ok(Measured {
        payload_bytes: setup.memory_bytes,
        cpu_nanoseconds: window.nanoseconds(),
        system_calls: calls.into_inner(),
        ..Measured::default()
    })
}

/// For who looks at the program with a profiler.
fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.to_owned())
}

/// Whether it encrypts too: where the engine does in its process.
fn is_sealed(setup: &Setup) -> bool {
    setup.way.transport.kernel_tls() == Some(KernelTls::Off)
}

fn parts_of(setup: &Setup) -> impl Iterator<Item = Range<u64>> {
    parts(setup.memory_bytes, usize::from(setup.channels))
}

fn slice<'a>(memory: &'a GuestMemoryMmap<()>, part: &Range<u64>) -> io::Result<VolatileSlice<'a>> {
    let len = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
    memory.get_slice(GuestAddress(part.start), len).map_err(io::Error::other)
}

fn send_part(
    mut stream: TcpStream,
    memory: &GuestMemoryMmap<()>,
    part: &Range<u64>,
    sealed: bool,
    wait: &Receiver<()>,
    calls: &AtomicU64,
) -> io::Result<Instant> {
    let part = slice(memory, part)?;
    // Nobody gives the word when something failed elsewhere.
    wait.recv().map_err(io::Error::other)?;
    let mut done = 0;
    let mut count = 0;
    if sealed {
        count = bare_sealed::send(&stream, &part)?;
        done = part.len();
    }
    while done < part.len() {
        let chunk_bytes = CHUNK_BYTES.min(part.len() - done);
        let chunk = part.subslice(done, chunk_bytes).map_err(io::Error::other)?;
        count += 1;
        done += moved(stream.write_volatile(&chunk))?;
    }
    let mut arrived = [0];
    stream.read_exact(&mut arrived)?;
    let ended = Instant::now();
    calls.fetch_add(count + 1, Ordering::Relaxed);
    if arrived != ARRIVED {
        return Err(io::Error::other("the destination answered nonsense"));
    }
    Ok(ended)
}

fn receive_part(
    mut stream: TcpStream,
    memory: &GuestMemoryMmap<()>,
    part: &Range<u64>,
    sealed: bool,
    calls: &AtomicU64,
) -> io::Result<()> {
    let part = slice(memory, part)?;
    stream.write_all(&READY)?;
    let mut done = 0;
    let mut count = 0;
    if sealed {
        count = bare_sealed::receive(&stream, &part)?;
        done = part.len();
    }
    while done < part.len() {
        let mut rest = part.offset(done).map_err(io::Error::other)?;
        count += 1;
        match moved(stream.read_volatile(&mut rest))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => done += bytes,
        }
    }
    stream.write_all(&ARRIVED)?;
    calls.fetch_add(count + 1, Ordering::Relaxed);
    Ok(())
}

/// A call that a signal interrupted moved nothing.
fn moved(result: Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    match result {
        Ok(bytes) => Ok(bytes),
        Err(VolatileMemoryError::IOError(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

fn join<T>(threads: Vec<ScopedJoinHandle<'_, io::Result<T>>>) -> Result<Vec<T>, Failure> {
    threads
        .into_iter()
        .map(|thread| {
            let result = thread.join().map_err(|_| "a thread of the bare loop panicked")?;
            result
                .map_err(|error| format!("failed to move memory by the bare loop: {error}").into())
        })
        .collect()
}
