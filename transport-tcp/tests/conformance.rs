//! TCP passes the conformance suite: on IPv4, on IPv6, with and without zero-copy sends, and with
//! socket buffers so small that nothing ever fits in one piece. So do sockets that the host has connected, of any kind.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use pageferry::testing::conformance::Pair;
use pageferry::testing::conformance::acceptors::Venue;
use pageferry::transport::{Admission, DestinationLink, SourceLink, TransportError};
use pageferry_tcp::testing::{Authority, shared_key};
use pageferry_tcp::{
    GivenSockets, KernelTls, Security, TcpAcceptor, TcpOptions, Tls, ZeroCopy, connect,
};
use socket2::{Domain, SockAddr, Socket, Type};

fn pair(address: &str, options: TcpOptions) -> Pair {
    let there = TcpOptions { admission: Admission::Anyone, ..options.clone() };
    let acceptor = TcpAcceptor::bind(address, there).expect("a port of loopback");
    let source = connect(acceptor.local_addr(), options).expect("the acceptor answers");
    let destination = acceptor.accept(Some(Duration::from_secs(10))).expect("a source came");
    (Box::new(source), Box::new(destination))
}

fn ipv4() -> Pair {
    pair("127.0.0.1:0", TcpOptions::default())
}

fn small_buffers() -> Pair {
    let options = TcpOptions {
        send_buffer_bytes: Some(4096),
        receive_buffer_bytes: Some(4096),
        ..TcpOptions::default()
    };
    pair("127.0.0.1:0", options)
}

fn zero_copy() -> Pair {
    pair("127.0.0.1:0", TcpOptions { zero_copy: ZeroCopy::On, ..TcpOptions::default() })
}

fn tls() -> Pair {
    pair("127.0.0.1:0", shared_key(KernelTls::Off))
}

fn tls_with_small_buffers() -> Pair {
    let (send_buffer_bytes, receive_buffer_bytes) = (Some(4096), Some(4096));
    let options =
        TcpOptions { send_buffer_bytes, receive_buffer_bytes, ..shared_key(KernelTls::Off) };
    pair("127.0.0.1:0", options)
}

fn plain() -> Pair {
    pair("127.0.0.1:0", TcpOptions { zero_copy: ZeroCopy::Off, ..TcpOptions::default() })
}

mod over_ipv4 {
    use super::*;
    pageferry::conformance_suite!(ipv4);
}

mod with_zero_copy {
    use super::*;
    pageferry::conformance_suite!(zero_copy);
}

mod without_zero_copy {
    use super::*;
    pageferry::conformance_suite!(plain);
}

mod with_small_buffers {
    use super::*;
    pageferry::conformance_suite!(small_buffers);
}

mod with_tls {
    use super::*;
    pageferry::conformance_suite!(tls);
}

mod with_tls_and_small_buffers {
    use super::*;
    pageferry::conformance_suite!(tls_with_small_buffers);
}

#[test]
fn with_certificates() {
    let authority = Authority::new("ours");
    let tls = authority.tls(&authority.issue(&["127.0.0.1"]));
    let security = Security::Tls(Tls { kernel: KernelTls::Off, ..tls });
    let options = TcpOptions { security, ..TcpOptions::default() };
    pageferry::testing::conformance::run_all(&|| pair("127.0.0.1:0", options.clone()));
}

#[test]
fn with_tls_by_the_kernel() {
    if let Some(why) = pageferry_tcp::kernel_tls_unavailable() {
        eprintln!("with_tls_by_the_kernel skipped, because {why}");
        return;
    }
    pageferry::testing::conformance::run_all(&|| pair("127.0.0.1:0", shared_key(KernelTls::On)));
}

#[test]
fn over_ipv6() {
    if let Err(error) = TcpListener::bind("[::1]:0") {
        eprintln!("skipped, because there is no IPv6 loopback: {error}");
        return;
    }
    let ipv6 = || pair("[::1]:0", TcpOptions::default());
    pageferry::testing::conformance::run_all(&ipv6);
}

/// A link over such sockets: as many as any case has channels.
fn given<S: Into<OwnedFd>>(pair: impl Fn() -> io::Result<(S, S)>) -> Pair {
    given_with(&TcpOptions::default(), pair)
}

fn given_with<S: Into<OwnedFd>>(
    options: &TcpOptions,
    pair: impl Fn() -> io::Result<(S, S)>,
) -> Pair {
    const CHANNELS: usize = 8;
    let pair = || -> (OwnedFd, OwnedFd) {
        let (here, there) = pair().expect("two sockets");
        (here.into(), there.into())
    };
    let (control, their_control) = pair();
    let (data, their_data) = (0..CHANNELS).map(|_| pair()).unzip();
    let ends = [(control, data), (their_control, their_data)];
    let [here, there] = ends.map(|(control, data)| {
        GivenSockets::new(control, data, options.clone()).expect("connected streams")
    });
    thread::scope(|scope| {
        let destination = scope.spawn(|| there.destination().expect("the source's end is there"));
        let source = here.source().expect("the destination's end is there");
        (Box::new(source) as _, Box::new(destination.join().expect("no panic")) as _)
    })
}

fn unix() -> Pair {
    given(UnixStream::pair)
}

mod over_unix_sockets {
    use super::*;
    pageferry::conformance_suite!(unix);
}

#[test]
fn over_unix_sockets_with_tls() {
    let options = shared_key(KernelTls::Auto);
    pageferry::testing::conformance::run_all(&|| given_with(&options, UnixStream::pair));
}

#[test]
fn over_connections_of_tcp_that_were_given() {
    let pair = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let here = TcpStream::connect(listener.local_addr()?)?;
        Ok((here, listener.accept()?.0))
    };
    pageferry::testing::conformance::run_all(&|| given(pair));
}

#[test]
fn over_vsock() {
    let listen = || {
        let listener = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        // Any port, of this machine.
        listener.bind(&SockAddr::vsock(libc::VMADDR_CID_LOCAL, libc::VMADDR_PORT_ANY))?;
        listener.listen(1)?;
        Ok::<_, io::Error>(listener)
    };
    if let Err(error) = listen() {
        eprintln!("over_vsock skipped, because there is no vsock loopback: {error}");
        return;
    }
    let pair = || {
        let listener = listen()?;
        let here = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        here.connect(&listener.local_addr()?)?;
        Ok((here, listener.accept()?.0))
    };
    pageferry::testing::conformance::run_all(&|| given(pair));
}

struct Port(TcpAcceptor, TcpOptions);

impl Venue for Port {
    fn connect(&self) -> Result<Box<dyn SourceLink>, TransportError> {
        Ok(Box::new(connect(self.0.local_addr(), self.1.clone())?))
    }

    fn accept(&self, timeout: Duration) -> Result<Box<dyn DestinationLink>, TransportError> {
        Ok(Box::new(self.0.accept(Some(timeout))?))
    }
}

fn port_with(options: &TcpOptions) -> Box<dyn Venue> {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", options.clone());
    Box::new(Port(acceptor.expect("a port of loopback"), options.clone()))
}

fn port() -> Box<dyn Venue> {
    port_with(&TcpOptions::default())
}

pageferry::acceptor_suite!(port);

mod acceptor_with_tls {
    use super::*;

    fn port() -> Box<dyn Venue> {
        port_with(&shared_key(KernelTls::Auto))
    }

    pageferry::acceptor_suite!(port);
}
