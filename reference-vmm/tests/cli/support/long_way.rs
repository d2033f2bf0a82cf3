//! A link over which everything takes its time.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::peer::listen;

/// The way to an address, as long as the test: so much each way.
pub(crate) fn long_way(to: &str, by: Duration) -> String {
    let (listener, address) = listen();
    let to = to.to_owned();
    thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let Ok(far) = TcpStream::connect(&to) else { continue };
            let clone = |stream: &TcpStream| stream.try_clone().expect("clone");
            delay(clone(&near), clone(&far), by);
            delay(far, near, by);
        }
    });
    address
}

/// Forwards what comes, so much later.
fn delay(from: TcpStream, to: TcpStream, by: Duration) {
    let (later, due) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut to = to;
        for (at, bytes) in due {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let (mut from, mut piece) = (from, vec![0; 256 << 10]);
        while let Ok(length @ 1..) = from.read(&mut piece) {
            if later.send((Instant::now() + by, piece[..length].to_vec())).is_err() {
                break;
            }
        }
    });
}
