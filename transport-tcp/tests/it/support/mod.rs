//! What the tests share.

pub(crate) mod log;
pub(crate) mod memory;
pub(crate) mod raw;
pub(crate) mod relay;

use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::testing::until_asleep;
pub(crate) use pageferry::testing::{Random, data, drain, zero};
use pageferry::transport::{
    Admission, DestinationLink, Interrupt, Link, PageReceiver, PageSender, SourceLink, Ticket,
    TransportError,
};
use pageferry_tcp::{TcpAcceptor, TcpDestinationLink, TcpOptions, TcpSourceLink, connect};

/// Long enough for any machine; only a failure takes it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

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
