//! What the tests share.

pub(crate) mod log;
pub(crate) mod memory;
pub(crate) mod raw;
pub(crate) mod relay;

use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::{GuestMemory, PageRange};
pub(crate) use pageferry::testing::drain;
use pageferry::testing::until_asleep;
use pageferry::transport::{
    Admission, DestinationLink, Interrupt, Link, PageReceiver, PageSender, Run, RunKind,
    SourceLink, Ticket, TransportError,
};
use pageferry_tcp::{TcpAcceptor, TcpDestinationLink, TcpOptions, TcpSourceLink, connect};

/// Long enough for any machine; only a failure takes it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Random numbers that a seed reproduces (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    /// From `PAGEFERRY_TEST_SEED`, or fresh; printed, so that a failure can be repeated.
    pub(crate) fn new(what: &str) -> Self {
        let seed = std::env::var("PAGEFERRY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let id = pageferry::transport::MigrationId::random().unwrap();
            u64::from_le_bytes(id.0[..8].try_into().unwrap())
        });
        eprintln!("{what}: PAGEFERRY_TEST_SEED={seed}");
        Self::with_seed(seed)
    }

    pub(crate) fn with_seed(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

pub(crate) struct Pair {
    pub(crate) source: TcpSourceLink,
    pub(crate) destination: TcpDestinationLink,
}

pub(crate) fn acceptor(options: &TcpOptions) -> TcpAcceptor {
    TcpAcceptor::bind("127.0.0.1:0", of_anyone(options)).unwrap()
}

/// The links of these tests have a protocol of their own.
pub(crate) fn of_anyone(options: &TcpOptions) -> TcpOptions {
    TcpOptions { admission: Admission::Anyone, ..options.clone() }
}

/// A link over the loopback.
pub(crate) fn pair(options: &TcpOptions) -> Pair {
    pair_at("127.0.0.1:0", options)
}

/// A link to an address of the loopback. To another than the first, the ends have different
/// addresses, so that nothing tells them that they are on one host.
pub(crate) fn pair_at(address: &str, options: &TcpOptions) -> Pair {
    let acceptor = TcpAcceptor::bind(address, of_anyone(options)).unwrap();
    let source = connect(acceptor.local_addr(), options.clone()).unwrap();
    let destination = acceptor.accept(Some(PATIENCE)).unwrap();
    Pair { source, destination }
}

pub(crate) struct Ends {
    pub(crate) senders: Vec<Box<dyn PageSender>>,
    pub(crate) receivers: Vec<Box<dyn PageReceiver>>,
}

impl Pair {
    pub(crate) fn open(
        &mut self,
        from: &Arc<GuestMemory>,
        to: &Arc<GuestMemory>,
        channels: u16,
    ) -> Ends {
        self.source.register(from).unwrap();
        self.destination.register(to).unwrap();
        let senders = self.source.open_senders(channels).unwrap();
        let receivers = self.destination.open_receivers(channels, PATIENCE).unwrap();
        Ends { senders, receivers }
    }
}

pub(crate) fn data(region: u16, first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region, first_page, pages }, kind: RunKind::Data }
}

pub(crate) fn zero(region: u16, first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region, first_page, pages }, kind: RunKind::Zero }
}

/// Waits until everything up to `ticket` has landed.
pub(crate) fn until_landed(sender: &mut dyn PageSender, ticket: Ticket) {
    loop {
        let marks = sender.watermarks(Some(PATIENCE)).unwrap();
        assert!(marks.released >= marks.landed);
        if marks.landed >= ticket {
            assert_eq!(marks.landed, ticket);
            return;
        }
    }
}

/// Runs `blocking` in a thread, waits until it sleeps, interrupts it, and hands out its result.
pub(crate) fn interrupted<T: Send>(
    interrupter: &dyn Interrupt,
    blocking: impl FnOnce() -> Result<T, TransportError> + Send,
) {
    std::thread::scope(|scope| {
        let (announce, announced) = std::sync::mpsc::channel();
        let thread = scope.spawn(move || {
            announce.send(rustix::thread::gettid()).unwrap();
            blocking().err()
        });
        until_asleep(announced.recv().unwrap());
        interrupter.interrupt();
        let error = thread.join().unwrap().expect("it was interrupted");
        assert!(matches!(error, TransportError::Interrupted), "{error}");
    });
}
