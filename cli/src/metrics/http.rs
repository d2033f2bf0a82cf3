//! A page that a scraper fetches. Some dozen peers at a time, each with a second for its request and the answer: whoever
//! says nothing costs that, and a few KiB, and holds up nobody.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// For all that one peer wants.
const PATIENCE: Duration = Duration::from_secs(1);
/// Peers at a time. If there are more, who has waited longest goes.
const MOST_PEERS: usize = 64;
/// Longest request.
const REQUEST_BYTES: usize = 8 << 10;
/// Most header lines of one.
const HEADERS: usize = 64;

/// What a peer is told, all of it.
fn answer(request: &[u8], content_type: &str, page: impl FnOnce() -> String) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let (status, body) = match parsed.parse(request) {
        Ok(httparse::Status::Partial) if request.len() < REQUEST_BYTES => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            ("431 Request Header Fields Too Large", Err("a request is at most 8 KiB"))
        }
        Err(_) => ("400 Bad Request", Err("this is no HTTP request")),
        Ok(httparse::Status::Complete(_)) => match (parsed.method, parsed.path.map(path)) {
            (Some("GET" | "HEAD"), Some("/metrics")) => ("200 OK", Ok(page())),
            (Some("GET" | "HEAD"), _) => ("404 Not Found", Err("metrics are at /metrics")),
            _ => ("405 Method Not Allowed\r\nAllow: GET, HEAD", Err("only GET and HEAD")),
        },
    };
    let (content_type, body) = match body {
        Ok(page) => (content_type, page),
        Err(complaint) => ("text/plain; charset=utf-8", format!("{complaint}\n")),
    };
    let length = body.len();
    let body = if parsed.method == Some("HEAD") { "" } else { &body };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close"
    );
    Some(format!("{head}\r\n\r\n{body}").into_bytes())
}

/// Of what a request names: without a query, and without the host.
fn path(target: &str) -> &str {
    let target = target.split('?').next().unwrap_or(target);
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

/// Somebody who is connected.
struct Peer {
    stream: TcpStream,
    due: Instant,
    request: Vec<u8>,
    /// What is left to say, once it has asked.
    answer: Option<Vec<u8>>,
}

impl Peer {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let due = Instant::now() + PATIENCE;
        Ok(Self { stream, due, request: Vec::new(), answer: None })
    }

    /// What it is waited for.
    fn wants(&self) -> PollFlags {
        if self.answer.is_some() { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Hears it and answers, as far as that goes at once. Whether there is more.
    fn go_on(&mut self, content_type: &str, page: impl Fn() -> String) -> bool {
        let went = if let Some(left) = &mut self.answer {
            self.stream.write(left).map(|written| {
                left.drain(..written);
                !left.is_empty() && written > 0
            })
        } else {
            let mut some = [0; 1 << 10];
            self.stream.read(&mut some).map(|read| {
                self.request.extend_from_slice(&some[..read]);
                self.answer = answer(&self.request, content_type, page);
                read > 0
            })
        };
        went.unwrap_or_else(|error| {
            matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        })
    }
}

/// Answers until the process ends: nothing is to be ended in order.
pub(super) fn serve(
    listener: &TcpListener,
    content_type: &'static str,
    page: impl Fn() -> String,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut peers: Vec<Peer> = Vec::new();
    loop {
        let mut waited_for = vec![PollFd::new(listener, PollFlags::IN)];
        waited_for.extend(peers.iter().map(|peer| PollFd::new(&peer.stream, peer.wants())));
        let next_due = peers.iter().map(|peer| peer.due).min();
        let left = next_due.map(|due| due.saturating_duration_since(Instant::now()));
        match poll(&mut waited_for, left.and_then(|left| Timespec::try_from(left).ok()).as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<_> = waited_for.iter().map(|one| !one.revents().is_empty()).collect();
        let now = Instant::now();
        let mut ready_peers = ready[1..].iter();
        peers.retain_mut(|peer| {
            let ready = ready_peers.next().copied().unwrap_or(false);
            peer.due > now && (!ready || peer.go_on(content_type, &page))
        });
        if ready[0] {
            match listener.accept() {
                Ok((stream, _)) => {
                    if peers.len() == MOST_PEERS {
                        // They came one after the other.
                        peers.remove(0);
                    }
                    // A connection that is gone already is its own affair.
                    peers.extend(Peer::new(stream));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // No descriptors are left, say: a scraper comes again.
                Err(error) => {
                    tracing::warn!(%error, "metrics are not served for a moment");
                    std::thread::sleep(PATIENCE);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::thread;

    use super::*;

    fn served() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || serve(&listener, "text/plain", || "a page".to_owned()));
        address
    }

    /// What it answers to this, until it closes the connection.
    fn ask(address: SocketAddr, pieces: &[&[u8]]) -> String {
        let mut peer = TcpStream::connect(address).expect("a connection");
        for piece in pieces {
            // It may have heard enough.
            let _ = peer.write_all(piece);
        }
        let mut answer = Vec::new();
        let _ = peer.read_to_end(&mut answer);
        String::from_utf8(answer).expect("text")
    }

    #[test]
    fn there_is_one_page() {
        let address = served();
        let answer = ask(address, &[b"GET /metrics HTTP/1.1\r\nHo", b"st: here\r\n\r\n"]);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\na page"));
        assert!(answer.contains("Content-Length: 6\r\n"));
        let status = |request: &[u8]| ask(address, &[request]).get(9..12).map(str::to_owned);
        let status = |request: &[u8]| status(request).expect("an answer");
        assert_eq!(status(b"GET /metrics?name=x HTTP/1.0\r\n\r\n"), "200");
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(status(b"GET http://here:1/metrics HTTP/1.1\r\n\r\n"), "200");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405");
        let head = ask(address, &[b"HEAD /metrics HTTP/1.1\r\n\r\n"]);
        assert!(head.contains("Content-Length: 6\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        assert_eq!(status(b"\0\xff\n"), "400");
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert_eq!(status(many.as_bytes()), "431");
    }

    /// Nobody waits for them.
    #[test]
    fn who_says_nothing_or_too_much_keeps_nobody() {
        let address = served();
        let began = Instant::now();
        let silent: Vec<_> = (0..2 * MOST_PEERS)
            .map(|_| TcpStream::connect(address).expect("a connection"))
            .collect();
        let long = vec![b'a'; 1 << 20];
        let told = ask(address, &[b"GET /", &long]);
        // A connection that is closed with something unread may take the answer along.
        assert!(told.is_empty() || told.contains("431"), "{told}");
        assert!(ask(address, &[b"GET /metrics HTTP/1.1\r\n\r\n"]).ends_with("a page"));
        // One after the other they would take a second each.
        let patience = PATIENCE * u32::try_from(MOST_PEERS).expect("few") / 2;
        assert!(began.elapsed() < patience, "{:?}", began.elapsed());
        for mut peer in silent {
            peer.set_read_timeout(Some(20 * PATIENCE)).expect("a limit");
            assert!(matches!(peer.read(&mut [0]), Ok(0) | Err(_)), "it is given up");
        }
    }
}
