//! TCP passes the conformance suite: on IPv4, on IPv6, with and without zero-copy sends, and with
//! socket buffers so small that nothing ever fits in one piece.

use std::time::Duration;

use pageferry::testing::conformance::Pair;
use pageferry::testing::conformance::acceptors::Venue;
use pageferry::transport::{Admission, DestinationLink, SourceLink, TransportError};
use pageferry_tcp::{TcpAcceptor, TcpOptions, ZeroCopy, connect};

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

#[test]
fn over_ipv6() {
    if let Err(error) = std::net::TcpListener::bind("[::1]:0") {
        eprintln!("skipped, because there is no IPv6 loopback: {error}");
        return;
    }
    let ipv6 = || pair("[::1]:0", TcpOptions::default());
    pageferry::testing::conformance::run_all(&ipv6);
}

struct Port(TcpAcceptor);

impl Venue for Port {
    fn connect(&self) -> Result<Box<dyn SourceLink>, TransportError> {
        Ok(Box::new(connect(self.0.local_addr(), TcpOptions::default())?))
    }

    fn accept(&self, timeout: Duration) -> Result<Box<dyn DestinationLink>, TransportError> {
        Ok(Box::new(self.0.accept(Some(timeout))?))
    }
}

fn port() -> Box<dyn Venue> {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default());
    Box::new(Port(acceptor.expect("a port of loopback")))
}

pageferry::acceptor_suite!(port);
