//! A peer that closes, resets, stops to read, or sends nonsense at any moment, and links that are
//! cancelled: both ends come back with an error that says what happened, none of their requests is
//! under way then, and guest memory, once they are dropped, is used for something else at once:
//! neither does anybody write to it any more, nor is any of it sent.
//!
//! On its own, since it looks at all rings and all pinned memory of the process. `ci/test asan`
//! has it under AddressSanitizer too.

mod memory;
mod relay;

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memory::{Lent, NEXT_USE};
use pageferry::memory::PageRange;
use pageferry::testing::{Random, open_channel};
use pageferry::transport::{
    Admission, DestinationLink, Interrupt, PageSender, Run, RunKind, SourceLink, TransportError,
};
use pageferry_iouring::{Feature, Features, IoUringOptions, Rings, ZeroCopy};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};
use relay::{Fault, Relay};

/// Within which a loss must be noticed. Shorter than the time after which the kernel gives up a
/// peer that takes nothing, which would be no answer to what happens here.
const BOUND: Duration = Duration::from_secs(20);
const PAGES: u64 = 2048;

/// Whether the source's and the destination's end is by io_uring; by tcp otherwise.
const ENDS: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

#[test]
fn whatever_a_peer_does_memory_comes_back() {
    let first = std::env::var("PAGEFERRY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut seed = first.unwrap_or(1);
    for fault in Fault::ALL {
        for ends in ENDS {
            for zero_copy in [ZeroCopy::On, ZeroCopy::Auto, ZeroCopy::Off] {
                round(seed, fault, ends, zero_copy);
                seed += 1;
            }
        }
    }
}

/// One end, on a thread of its own.
struct End<T> {
    failed: Receiver<TransportError>,
    /// Has it drop what it has.
    go_on: Sender<()>,
    thread: JoinHandle<Option<T>>,
}

impl<T: Send + 'static> End<T> {
    /// Works until it fails. The thread stays until it is told to go on, since the kernel ends the
    /// requests of threads that end; it drops what it has itself, or gives it back.
    fn start(
        mut all: T,
        drops: bool,
        work: impl FnOnce(&mut T) -> TransportError + Send + 'static,
    ) -> Self {
        let (fail, failed) = channel();
        let (go_on, going_on) = channel();
        let thread = thread::spawn(move || {
            let error = work(&mut all);
            // If the test has failed meanwhile, nobody listens, and nobody speaks.
            let _ = (fail.send(error), going_on.recv());
            (!drops).then_some(all)
        });
        Self { failed, go_on, thread }
    }

    fn error(&self, which: &str) -> TransportError {
        self.failed.recv_timeout(BOUND).unwrap_or_else(|_| panic!("the {which} noticed nothing"))
    }

    fn give_up(self) {
        self.go_on.send(()).expect("the thread waits");
        // Channels go before links, as in an engine.
        drop(self.thread.join().expect("no panic"));
    }
}

fn rings(zero_copy: ZeroCopy, random: &mut Random) -> Rings {
    let bound = [Feature::SingleIssuer, Feature::DeferTaskrun];
    let without = match random.below(3) {
        0 => Features::none(),
        1 => bound.into_iter().collect(),
        _ => Feature::ALL.into_iter().filter(|feature| *feature != Feature::SendZc).collect(),
    };
    let options = IoUringOptions {
        zero_copy,
        zero_copy_threshold_bytes: 4096 << random.below(6),
        register_destination: random.below(2) == 0,
        queue_bytes: 1 << (16 + random.below(9)),
        sq_poll: (random.below(4) == 0).then_some(Duration::from_millis(1)),
        without,
        ..IoUringOptions::default()
    };
    eprintln!("  {options:?}");
    Rings::new(options).expect("this kernel has io_uring")
}

fn round(seed: u64, fault: Fault, ends: (bool, bool), zero_copy: ZeroCopy) {
    eprintln!("PAGEFERRY_TEST_SEED={seed}: {fault:?}, io_uring at {ends:?}, {zero_copy:?}");
    let random = &mut Random::new(seed);
    assert_eq!(pinned_kib(), 0, "before it begins");
    let (here, from) = Lent::new(PAGES, random);
    let (there, to) = Lent::new(PAGES, random);

    // Links with a channel, and the relay between them.
    let tcp = TcpOptions { zero_copy, ..TcpOptions::default() };
    let welcoming = TcpOptions { admission: Admission::Anyone, ..tcp.clone() };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", welcoming).expect("a port of loopback");
    let relay = Relay::start(acceptor.local_addr());
    let source = connect(relay.address(), tcp).expect("the acceptor answers");
    let destination = acceptor.accept(Some(BOUND)).expect("a source came");
    let mut source: Box<dyn SourceLink> = if ends.0 {
        Box::new(rings(zero_copy, random).source_link(source))
    } else {
        Box::new(source)
    };
    let mut destination: Box<dyn DestinationLink> = if ends.1 {
        Box::new(rings(zero_copy, random).destination_link(destination))
    } else {
        Box::new(destination)
    };
    source.register(&here).expect("source memory registers");
    destination.register(&there).expect("destination memory registers");
    drop((here, there));
    let (sender, receiver) = open_channel(&mut *source, &mut *destination);

    // In the head of a batch, in the first of them, or anywhere.
    let moment = match random.below(3) {
        0 => random.below(256),
        1 => random.below(64 << 10),
        _ => random.below(32 << 20),
    };
    let (struck, strikes) = channel();
    let cancelled: Vec<Arc<dyn Interrupt>> = match fault {
        Fault::CancelSource => vec![source.interrupter()],
        Fault::CancelDestination => vec![destination.interrupter()],
        Fault::Stall => vec![source.interrupter(), destination.interrupter()],
        _ => Vec::new(),
    };
    relay.plan(fault, moment, Random::new(random.next_u64()), move || {
        for end in cancelled {
            end.interrupt();
        }
        struck.send(Instant::now()).expect("the test waits");
    });

    let drop_themselves = random.below(2) == 0;
    let sending = End::start((sender, source), drop_themselves, move |(sender, _)| {
        send(&mut **sender, fault != Fault::Stall).expect_err("it ends by an error only")
    });
    let receiving = End::start((receiver, destination), drop_themselves, |(receiver, _)| {
        loop {
            if let Err(error) = receiver.receive() {
                return error;
            }
        }
    });
    let errors = [sending.error("source"), receiving.error("destination")];
    assert_eq!(requests_under_way(), Vec::<String>::new(), "after {errors:?}");
    let struck = strikes.recv_timeout(BOUND).expect("the moment came before that");
    eprintln!("  at byte {moment}, after {:?}: {errors:?}", struck.elapsed());
    for (error, expected) in errors.iter().zip(expected(fault)) {
        assert_eq!(Said::of(error), expected, "{error:?}");
    }

    sending.give_up();
    receiving.give_up();
    assert!(from.is_returned() && to.is_returned(), "somebody keeps guest memory");
    // No other thread can have the kernel take the buffers of a ring back at once: closing it does,
    // in a moment.
    let closed = Instant::now();
    while !drop_themselves && pinned_kib() > 0 && closed.elapsed() < BOUND {
        thread::yield_now();
    }
    assert_eq!(pinned_kib(), 0, "some of it is pinned");
    let rest = relay.rest();
    let stale = rest.chunks_exact(64).position(|bytes| bytes == [NEXT_USE; 64]);
    assert_eq!(stale, None, "sent after it was given back, of {} bytes", rest.len());
    assert_eq!(from.first_disturbed(), None, "written to at the source");
    assert_eq!(to.first_disturbed(), None, "written to at the destination");
}

/// Sends until that fails; may wait for what was sent to land, too.
fn send(sender: &mut dyn PageSender, waits: bool) -> Result<Infallible, TransportError> {
    let run = |first_page, pages| Run {
        range: PageRange { region: 0, first_page, pages },
        kind: RunKind::Data,
    };
    loop {
        for first_page in (0..PAGES).step_by(64) {
            sender.send(&[run(first_page, 48), run(first_page + 50, 1)])?;
        }
        sender.watermarks(waits.then_some(Duration::from_millis(1)))?;
    }
}

/// What an error blames.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Lost,
    Malformed,
    Interrupted,
    SomethingElse,
}

impl Said {
    fn of(error: &TransportError) -> Self {
        match error {
            TransportError::Lost { .. } => Self::Lost,
            TransportError::Malformed(_) => Self::Malformed,
            TransportError::Interrupted => Self::Interrupted,
            _ => Self::SomethingElse,
        }
    }
}

/// At the source and at the destination.
fn expected(fault: Fault) -> [Said; 2] {
    match fault {
        Fault::CancelSource => [Said::Interrupted, Said::Lost],
        Fault::CancelDestination => [Said::Lost, Said::Interrupted],
        Fault::Stall => [Said::Interrupted, Said::Interrupted],
        _ => [Said::Lost, Said::Lost],
    }
}

/// Requests of this process that wait in a ring or for a socket, as the kernel tells.
fn requests_under_way() -> Vec<String> {
    let fds = fs::read_dir("/proc/self/fd").expect("what is open");
    let fds = fds.map(|fd| fd.expect("an entry").path());
    let rings = fds.filter(|fd| {
        fs::read_link(fd).is_ok_and(|target| target.as_os_str() == "anon_inode:[io_uring]")
    });
    rings.flat_map(|ring| requests_of(ring.file_name().expect("a number"))).collect()
}

fn requests_of(ring: &OsStr) -> Vec<String> {
    let path = Path::new("/proc/self/fdinfo").join(ring);
    loop {
        let info = fs::read_to_string(&path).expect("a ring that nobody closes");
        // The kernel leaves it out while somebody is in the ring.
        let Some((queue, polled)) = info.split_once("PollList:\n") else { continue };
        let field = |name| {
            let line = queue.lines().find(|line| line.starts_with(name));
            line.expect("the kernel says so").split_whitespace().nth(1).expect("a number")
        };
        let queued = (field("SqHead:") != field("SqTail:")).then(|| "not taken".to_owned());
        let polled = polled.lines().take_while(|line| line.starts_with(' ')).map(str::to_owned);
        return queued.into_iter().chain(polled).collect();
    }
}

/// Memory of this process that is pinned by registration.
fn pinned_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("what the kernel says");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).expect("since 3.2");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
