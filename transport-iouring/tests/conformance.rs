//! io_uring passes the conformance suite: with all that this kernel has, with each of its newer
//! features masked, with socket buffers so small that nothing ever fits in one piece, and with
//! tcp at either end.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use pageferry::testing::TestMemory;
use pageferry::testing::conformance::acceptors::{self, Venue};
use pageferry::testing::conformance::{Pair, run_all};
use pageferry::transport::{Admission, DestinationLink, SourceLink, TransportError};
use pageferry_iouring::{Feature, Features, IoUringOptions, Rings, ZeroCopy};
use pageferry_tcp::testing::shared_key;
use pageferry_tcp::{
    GivenSockets, KernelTls, TcpAcceptor, TcpDestinationLink, TcpOptions, TcpSourceLink, connect,
};

fn connected(tcp: &TcpOptions) -> (TcpSourceLink, TcpDestinationLink) {
    let there = TcpOptions { admission: Admission::Anyone, ..tcp.clone() };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there).expect("a port of loopback");
    let source = connect(acceptor.local_addr(), tcp.clone()).expect("the acceptor answers");
    let destination = acceptor.accept(Some(Duration::from_secs(10))).expect("a source came");
    (source, destination)
}

fn rings(options: IoUringOptions) -> Rings {
    Rings::new(options).expect("this kernel has io_uring")
}

fn pair_of(tcp: &TcpOptions, options: IoUringOptions) -> Pair {
    let rings = rings(options);
    let (source, destination) = connected(tcp);
    (Box::new(rings.source_link(source)), Box::new(rings.destination_link(destination)))
}

fn small_buffers() -> TcpOptions {
    TcpOptions {
        send_buffer_bytes: Some(4096),
        receive_buffer_bytes: Some(4096),
        ..TcpOptions::default()
    }
}

/// As small as an end with tcp, or one that sends zero-copy, takes without waiting for the kernel's
/// probes of a shut window all the time.
fn modest_buffers() -> TcpOptions {
    TcpOptions {
        send_buffer_bytes: Some(16 << 10),
        receive_buffer_bytes: Some(16 << 10),
        ..TcpOptions::default()
    }
}

fn always() -> IoUringOptions {
    IoUringOptions {
        zero_copy: ZeroCopy::On,
        zero_copy_threshold_bytes: 4096,
        register_destination: true,
        ..IoUringOptions::default()
    }
}

/// Over sockets that the host has connected: as many as any case has channels.
#[test]
fn over_unix_sockets() {
    over_unix_sockets_with(&TcpOptions::default(), &IoUringOptions::default());
}

/// The kernel encrypts for sockets of TCP alone, and there is nothing for rings to do.
#[test]
fn over_unix_sockets_with_tls() {
    let options = IoUringOptions { require_rings: false, ..IoUringOptions::default() };
    over_unix_sockets_with(&shared_key(KernelTls::Auto), &options);
}

fn over_unix_sockets_with(tcp: &TcpOptions, options: &IoUringOptions) {
    let pair = || {
        let [here, there] = unix_sockets(1 + 8).map(|mut sockets| {
            let control = sockets.remove(0);
            GivenSockets::new(control, sockets, tcp.clone()).expect("connected streams")
        });
        let (source, destination) = thread::scope(|scope| {
            let destination = scope.spawn(|| there.destination().expect("a source"));
            (here.source().expect("a destination"), destination.join().expect("no panic"))
        });
        let rings = rings(options.clone());
        let source: Box<dyn SourceLink> = Box::new(rings.source_link(source));
        let destination: Box<dyn DestinationLink> = Box::new(rings.destination_link(destination));
        (source, destination)
    };
    run_all(&pair);
}

fn unix_sockets(count: usize) -> [Vec<OwnedFd>; 2] {
    let pair = |_| {
        let (here, there) = UnixStream::pair().expect("two sockets");
        (OwnedFd::from(here), OwnedFd::from(there))
    };
    let (here, there) = (0..count).map(pair).unzip();
    [here, there]
}

mod with_all_features {
    use super::*;
    fn pair() -> Pair {
        pair_of(&TcpOptions::default(), IoUringOptions::default())
    }
    pageferry::conformance_suite!(pair);
}

mod with_small_buffers {
    use super::*;
    fn pair() -> Pair {
        pair_of(&small_buffers(), IoUringOptions::default())
    }
    pageferry::conformance_suite!(pair);
}

mod always_zero_copy {
    use super::*;
    fn pair() -> Pair {
        pair_of(&TcpOptions::default(), always())
    }
    pageferry::conformance_suite!(pair);
}

mod from_tcp {
    use super::*;
    fn pair() -> Pair {
        let (source, destination) = connected(&TcpOptions::default());
        let rings = rings(IoUringOptions::default());
        (Box::new(source), Box::new(rings.destination_link(destination)))
    }
    pageferry::conformance_suite!(pair);
}

mod to_tcp {
    use super::*;
    fn pair() -> Pair {
        let (source, destination) = connected(&TcpOptions::default());
        let rings = rings(IoUringOptions::default());
        (Box::new(rings.source_link(source)), Box::new(destination))
    }
    pageferry::conformance_suite!(pair);
}

#[test]
fn always_zero_copy_with_small_buffers() {
    run_all(&|| pair_of(&modest_buffers(), always()));
}

#[test]
fn mixed_pairs_with_small_buffers() {
    run_all(&|| {
        let (source, destination) = connected(&modest_buffers());
        let rings = rings(IoUringOptions::default());
        (Box::new(source), Box::new(rings.destination_link(destination)))
    });
    run_all(&|| {
        let (source, destination) = connected(&modest_buffers());
        let rings = rings(IoUringOptions::default());
        (Box::new(rings.source_link(source)), Box::new(destination))
    });
}

/// Each rung of the ladder: a kernel that has all but one feature, and those that depend on it.
#[test]
fn without_each_feature() {
    for feature in Feature::ALL {
        eprintln!("without {feature:?}");
        let without = Features::none().with(feature);
        run_all(&|| pair_of(&TcpOptions::default(), IoUringOptions { without, ..always() }));
    }
}

/// A kernel as old as they get, and Linux 6.1.
#[test]
fn without_what_older_kernels_lack() {
    let ladder = [
        (Feature::ALL.into_iter().collect(), small_buffers()),
        (
            Features::none().with(Feature::ReportUsage).with(Feature::CloneBuffers),
            TcpOptions::default(),
        ),
    ];
    for (without, tcp) in ladder {
        run_all(&|| pair_of(&tcp, IoUringOptions { without, ..always() }));
    }
}

#[test]
fn with_a_polling_kernel_thread() {
    let sq_poll = Some(Duration::from_millis(5));
    run_all(&|| pair_of(&TcpOptions::default(), IoUringOptions { sq_poll, ..always() }));
}

#[test]
fn without_zero_copy() {
    let options = IoUringOptions { zero_copy: ZeroCopy::Off, ..IoUringOptions::default() };
    run_all(&|| pair_of(&TcpOptions::default(), options.clone()));
}

/// Where TLS is in the process there is nothing for rings to do, and tcp goes on.
#[test]
fn with_tls() {
    let options = IoUringOptions { require_rings: false, ..IoUringOptions::default() };
    run_all(&|| pair_of(&shared_key(KernelTls::Off), options.clone()));
}

#[test]
fn with_tls_by_the_kernel() {
    if let Some(why) = pageferry_tcp::kernel_tls_unavailable() {
        eprintln!("io_uring with_tls_by_the_kernel skipped, because {why}");
        return;
    }
    run_all(&|| pair_of(&shared_key(KernelTls::On), IoUringOptions::default()));
}

#[test]
fn who_asks_for_rings_or_zero_copy_sends_does_not_get_tls_without_a_word() {
    let memory = TestMemory::new(&[1]);
    let error = |kernel, options| {
        let (mut source, _destination) = pair_of(&shared_key(kernel), options);
        source.register(memory.memory()).expect("memory");
        source.open_senders(1).err().expect("no senders")
    };
    let no_rings = error(KernelTls::Off, IoUringOptions::default());
    assert!(
        matches!(no_rings, TransportError::Io { operation: "use io_uring", .. }),
        "{no_rings:?}"
    );
    let copied = error(KernelTls::Off, always());
    assert!(matches!(copied, TransportError::Unsupported(_)), "{copied:?}");
}

/// Tcp's acceptor, and io_uring at both ends.
struct Port(TcpAcceptor, Rings);

impl Venue for Port {
    fn connect(&self) -> Result<Box<dyn SourceLink>, TransportError> {
        let source = connect(self.0.local_addr(), TcpOptions::default())?;
        Ok(Box::new(self.1.source_link(source)))
    }

    fn accept(&self, timeout: Duration) -> Result<Box<dyn DestinationLink>, TransportError> {
        Ok(Box::new(self.1.destination_link(self.0.accept(Some(timeout))?)))
    }
}

#[test]
fn who_is_turned_away_hears_why() {
    acceptors::run_all(&|| {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default());
        let rings = rings(IoUringOptions::default());
        Box::new(Port(acceptor.expect("a port of loopback"), rings))
    });
}
