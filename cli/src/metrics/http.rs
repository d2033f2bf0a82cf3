//! A page that a scraper fetches. One peer at a time, which has a second for its request and the answer: whoever says
//! nothing costs that, and a few KiB.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// For all that one peer wants.
const PATIENCE: Duration = Duration::from_secs(1);

/// Longest request.
const REQUEST_BYTES: usize = 8 << 10;
/// Most header lines of one.
const HEADERS: usize = 64;

/// An answer but for its end.
struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

/// What a peer is told.
fn answer(request: &[u8], page: impl FnOnce() -> Answer) -> Option<Answer> {
    let complaint = |status, body: &str| Answer {
        status,
        content_type: "text/plain; charset=utf-8",
        body: format!("{body}\n"),
    };
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    Some(match parsed.parse(request) {
        Ok(httparse::Status::Partial) if request.len() < REQUEST_BYTES => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            complaint("431 Request Header Fields Too Large", "a request is at most 8 KiB")
        }
        Err(_) => complaint("400 Bad Request", "this is no HTTP request"),
        Ok(httparse::Status::Complete(_)) => {
            let path = parsed.path.map(|path| path.split('?').next().unwrap_or(path));
            match (parsed.method, path) {
                (Some("GET"), Some("/metrics")) => page(),
                (Some("GET"), _) => complaint("404 Not Found", "metrics are at /metrics"),
                _ => complaint("405 Method Not Allowed", "only GET"),
            }
        }
    })
}

/// Answers until the process ends: nothing is to be ended in order.
pub(super) fn serve(listener: &TcpListener, content_type: &'static str, page: impl Fn() -> String) {
    loop {
        match listener.accept() {
            Ok((peer, _)) => {
                let page = || Answer { status: "200 OK", content_type, body: page() };
                // Its own affair.
                let _ = converse(peer, page);
            }
            // No descriptors are left, say: a scraper comes again.
            Err(error) => {
                tracing::warn!(%error, "metrics are not served for a moment");
                std::thread::sleep(PATIENCE);
            }
        }
    }
}

fn converse(mut peer: TcpStream, page: impl Fn() -> Answer) -> io::Result<()> {
    let due = Instant::now() + PATIENCE;
    let left = || {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut) } else { Ok(Some(left)) }
    };
    let mut request = Vec::new();
    let answer = loop {
        if let Some(answer) = answer(&request, &page) {
            break answer;
        }
        let mut some = [0; 1 << 10];
        peer.set_read_timeout(left()?)?;
        let read = peer.read(&mut some)?;
        if read == 0 {
            return Ok(());
        }
        request.extend_from_slice(&some[..read]);
    };
    let Answer { status, content_type, body } = answer;
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    let mut text = text.as_bytes();
    while !text.is_empty() {
        peer.set_write_timeout(left()?)?;
        let written = peer.write(text)?;
        text = &text[written..];
    }
    Ok(())
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
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405");
        assert_eq!(status(b"\0\xff\n"), "400");
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert_eq!(status(many.as_bytes()), "431");
    }

    /// As long as a limit allows, and the next one has its turn.
    #[test]
    fn who_says_nothing_or_too_much_keeps_nobody() {
        let address = served();
        let silent = TcpStream::connect(address).expect("a connection");
        let long = vec![b'a'; 1 << 20];
        let told = ask(address, &[b"GET /", &long]);
        // A connection that is closed with something unread may take the answer along.
        assert!(told.is_empty() || told.contains("431"), "{told}");
        assert!(ask(address, &[b"GET /metrics HTTP/1.1\r\n\r\n"]).ends_with("a page"));
        drop(silent);
    }
}
