//! What the conformance suite does not see: registration and its cost, zero-copy and its trial,
//! system calls, links that break with requests under way, and io_uring refused.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::PageRange;
use pageferry::testing::{Random, TestMemory, drain, open_channel, settle, until_asleep};
use pageferry::transport::stream;
use pageferry::transport::{
    Admission, Interrupt, Link, PageReceiver, PageSender, Received, Run, RunKind, SourceLink,
    TransportError,
};
use pageferry_iouring::{
    Feature, IoUringDestinationLink, IoUringOptions, IoUringSourceLink, Rings, Unavailable,
    ZeroCopy,
};
use pageferry_tcp::preamble::{Answer, PREAMBLE_BYTES, Status};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};

const SOON: Duration = Duration::from_secs(20);
const REGION_PAGES: u64 = 4096;

/// A link with one channel and memory on both sides.
struct Opened {
    sender: Box<dyn PageSender>,
    receiver: Box<dyn PageReceiver>,
    source: IoUringSourceLink,
    destination: IoUringDestinationLink,
    here: TestMemory,
    there: TestMemory,
}

fn open(options: &IoUringOptions) -> Opened {
    let rings = Rings::new(options.clone()).expect("this kernel has io_uring");
    let tcp = TcpOptions::default;
    // The source's address is 127.0.0.1: nothing tells that the kernel will copy, before it did.
    let there = TcpOptions { admission: Admission::Anyone, ..tcp() };
    let acceptor = TcpAcceptor::bind("127.0.0.2:0", there).expect("a port of loopback");
    let source = connect(acceptor.local_addr(), tcp()).expect("the acceptor answers");
    let mut source = rings.source_link(source);
    let destination = acceptor.accept(Some(SOON)).expect("a source came");
    let mut destination = rings.destination_link(destination);
    let here = TestMemory::new(&[REGION_PAGES]);
    let there = TestMemory::new(&[REGION_PAGES]);
    let bytes = here.memory().layout().len_bytes();
    let cost = source.register(here.memory()).expect("source memory registers");
    let registers = options.zero_copy == ZeroCopy::On;
    assert_eq!(source.capabilities().needs_registration, registers);
    assert_eq!(cost.registered_bytes, if registers { bytes } else { 0 });
    let cost = destination.register(there.memory()).expect("destination memory registers");
    assert_eq!(cost.registered_bytes, if options.register_destination { bytes } else { 0 });
    assert!(cost.registered_bytes == 0 || !cost.took.is_zero());
    let (sender, receiver) = open_channel(&mut source, &mut destination);
    Opened { sender, receiver, source, destination, here, there }
}

fn data(first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region: 0, first_page, pages }, kind: RunKind::Data }
}

#[test]
fn a_trial_ends_zero_copy_where_the_kernel_copies() {
    let mut opened = open(&IoUringOptions { queue_bytes: 1 << 20, ..IoUringOptions::default() });
    if !opened.source.capabilities().zero_copy {
        eprintln!("skipped: this kernel does not say whether it copies");
        return;
    }
    opened.here.fill(1);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        let mut last = 0;
        for first in (0..REGION_PAGES).step_by(256) {
            last = opened.sender.send(&[data(first, 256)]).expect("a batch goes out");
        }
        settle(&mut *opened.sender, last);
        opened.sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), None);
    let counts = opened.sender.counters().zero_copy;
    assert_eq!(
        (counts.sent, counts.copied_by_kernel),
        (8, 8),
        "loopback always copies: {counts:?}"
    );
}

#[test]
fn forced_zero_copy_is_counted() {
    let options = IoUringOptions { zero_copy: ZeroCopy::On, ..IoUringOptions::default() };
    let mut opened = open(&options);
    opened.here.fill(2);
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        // Long enough, too short, long enough: the second goes with the copied bytes.
        let runs = [data(0, 100), data(200, 2), data(300, 50)];
        let ticket = opened.sender.send(&runs).expect("a batch goes out");
        settle(&mut *opened.sender, ticket);
        opened.sender.finish().expect("the channel ends");
    });
    let counts = opened.sender.counters().zero_copy;
    assert_eq!((counts.sent, counts.sent_bytes), (2, 150 * 4096), "{counts:?}");
    assert_eq!(opened.there.read(0, 201), opened.here.read(0, 201));
    assert_eq!(opened.there.read(0, 349), opened.here.read(0, 349));
}

#[test]
fn many_batches_are_few_system_calls() {
    let mut opened = open(&IoUringOptions::default());
    opened.here.fill(3);
    let batches = 16;
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut *opened.receiver));
        let mut last = 0;
        for batch in 0..batches {
            last = opened.sender.send(&[data(batch * 256, 256)]).expect("a batch goes out");
        }
        // As long as it takes: a wait that is over before anything has come is a call too.
        while opened.sender.watermarks(Some(Duration::MAX)).expect("watermarks").landed < last {}
        opened.sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), None);
    let calls = (opened.sender.counters().system_calls, opened.receiver.counters().system_calls);
    assert!(calls.0 <= 8 && calls.1 <= 8, "{calls:?} for {batches} batches");
}

/// Either end is lost at a random moment, with requests under way: both ends come back with an
/// error, nothing of guest memory is held any more, and it may be freed.
#[test]
fn a_link_may_break_at_any_moment() {
    let random = &mut Random::new(7);
    for round in 0..24_u32 {
        let registered = round % 2 == 0;
        let options = IoUringOptions {
            zero_copy: if registered { ZeroCopy::On } else { ZeroCopy::Auto },
            register_destination: registered,
            queue_bytes: 1 << 20,
            ..IoUringOptions::default()
        };
        let Opened { mut sender, mut receiver, source, destination, here, there } = open(&options);
        let breaks: Arc<dyn Interrupt> =
            if round % 4 < 2 { source.interrupter() } else { destination.interrupter() };
        let batches = random.next_u64() % 40;
        let began = Instant::now();
        thread::scope(|scope| {
            let receiving = scope.spawn(move || {
                let mut receive = || -> Result<(), TransportError> {
                    for _ in 0..batches {
                        receiver.receive()?;
                    }
                    breaks.interrupt();
                    // What was under way may still arrive.
                    loop {
                        receiver.receive()?;
                    }
                };
                let result = receive();
                // As an engine does. A socket that is shut down and still open only closes its
                // window, which a sender that waits for room learns after the user timeout.
                drop((receiver, destination));
                result
            });
            let sending = scope.spawn(move || -> Result<(), TransportError> {
                loop {
                    for first in (0..REGION_PAGES - 64).step_by(64) {
                        sender.send(&[data(first, 48), data(first + 50, 1)])?;
                    }
                    sender.watermarks(Some(Duration::from_millis(1)))?;
                }
            });
            assert!(sending.join().expect("no panic").is_err());
            assert!(receiving.join().expect("no panic").is_err());
        });
        assert!(began.elapsed() < SOON, "only noticed after {:?}", began.elapsed());
        drop(source);
        assert_eq!(Arc::strong_count(here.memory()), 1, "round {round}");
        assert_eq!(Arc::strong_count(there.memory()), 1, "round {round}");
    }
}

/// A channel goes on from thread to thread, each of which ends.
#[test]
fn a_channel_may_change_threads() {
    let options = IoUringOptions { zero_copy: ZeroCopy::On, ..IoUringOptions::default() };
    let mut opened = open(&options);
    opened.here.fill(4);
    for step in 0..8 {
        thread::scope(|scope| {
            let Opened { sender, receiver, .. } = &mut opened;
            scope.spawn(move || {
                let ticket = sender.send(&[data(step * 512, 512)]).expect("a batch goes out");
                settle(&mut **sender, ticket);
            });
            scope.spawn(move || receiver.receive().expect("a batch"));
        });
        // The request for the acknowledgement is taken with the next batch, or here.
        if step == 7 {
            opened.sender.finish().expect("the channel ends");
            assert_eq!(opened.receiver.receive().expect("the end"), Received::End);
        }
    }
    assert_eq!(opened.here.first_difference(&opened.there), None);
}

/// A destination that acknowledges what it never reads, and ends its direction: what is missing are
/// notifications, and they do not come.
#[test]
fn a_wait_for_releases_is_as_long_as_asked_and_ends_with_an_interrupt() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port of loopback");
    // Less than a batch. Connections get it from their listener.
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 4 << 10).expect("a small buffer");
    let address = listener.local_addr().expect("bound");
    let welcome = || {
        let (mut stream, _) = listener.accept().expect("the source comes");
        stream.read_exact(&mut [0; PREAMBLE_BYTES]).expect("a preamble");
        let answer = Answer { status: Status::Ok, reason: String::new() };
        stream.write_all(&answer.encode()).expect("it is let in");
        stream
    };
    let options = IoUringOptions { zero_copy: ZeroCopy::On, ..IoUringOptions::default() };
    let rings = Rings::new(options).expect("this kernel has io_uring");
    let tcp = TcpOptions { send_buffer_bytes: Some(1 << 20), ..TcpOptions::default() };
    let here = TestMemory::new(&[64]);
    let (source, mut sender, (_control, mut pages)) = thread::scope(|scope| {
        let peer = scope.spawn(|| (welcome(), welcome()));
        let mut source = rings.source_link(connect(address, tcp).expect("it is let in"));
        source.register(here.memory()).expect("memory registers");
        let sender = source.open_senders(1).expect("a channel opens").remove(0);
        (source, sender, peer.join().expect("no panic"))
    });
    pages.write_all(&stream::encode_ack(1)).expect("the batch is acknowledged");
    pages.shutdown(Shutdown::Write).expect("its direction is over");
    assert_eq!(sender.send(&[data(0, 64)]).expect("a batch goes out"), 1);
    sender.finish().expect("the kernel has all");

    let wait = Duration::from_millis(200);
    let began = Instant::now();
    let marks = sender.watermarks(Some(wait)).expect("it is not lost");
    assert!(began.elapsed() >= wait, "{:?}", began.elapsed());
    assert_eq!((marks.released, marks.landed), (0, 0), "the kernel has not let go of it");
    let interrupter = source.interrupter();
    let waiting = rustix::thread::gettid();
    thread::scope(|scope| {
        scope.spawn(move || {
            until_asleep(waiting);
            interrupter.interrupt();
        });
        let began = Instant::now();
        let result = sender.watermarks(Some(SOON));
        assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    });
}

#[test]
fn masked_features_are_not_used() {
    let without = Feature::ALL.into_iter().collect();
    let rings = Rings::new(IoUringOptions { without, ..IoUringOptions::default() }).expect("rings");
    assert!(Feature::ALL.into_iter().all(|feature| !rings.features().has(feature)));
}

/// A filter of this thread alone refuses io_uring, as containers do.
#[test]
fn a_seccomp_filter_is_named() {
    let refused = thread::spawn(|| {
        seccomp::forbid_io_uring().expect("a filter is set");
        Rings::new(IoUringOptions::default()).map(drop)
    });
    let refused = refused.join().expect("no panic").expect_err("io_uring is refused");
    assert!(matches!(refused, Unavailable::Refused { .. }), "{refused:?}");
    assert!(refused.to_string().contains("seccomp"), "{refused}");
}

mod seccomp {
    #![expect(unsafe_code, reason = "no safe call sets a filter")]

    use std::io;

    /// Has `io_uring_setup` fail with EPERM for the calling thread.
    pub(crate) fn forbid_io_uring() -> io::Result<()> {
        let step = |code: u32, jump_false, k| libc::sock_filter {
            code: u16::try_from(code).expect("codes are short"),
            jt: 0,
            jf: jump_false,
            k,
        };
        let number = u32::try_from(libc::SYS_io_uring_setup).expect("numbers are small");
        let refused = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).expect("positive");
        let mut filter = [
            // The number of the system call is the first field of `seccomp_data`.
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, number),
            step(libc::BPF_RET | libc::BPF_K, 0, refused),
            step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
        // SAFETY: takes numbers only.
        let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the program and its filter outlive the call, which copies them.
        let set = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if privileges != 0 || set != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
