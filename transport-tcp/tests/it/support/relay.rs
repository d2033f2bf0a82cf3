//! A relay that forwards every byte in random small pieces, so that reads and writes are short.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use super::Random;

/// Relays all connections to `to` in pieces of 1 to `most_bytes` bytes. Lives as long as the
/// process.
pub(crate) fn start(to: SocketAddr, most_bytes: usize, mut random: Random) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let far = TcpStream::connect(to).unwrap();
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let random = Random::new(random.next_u64());
                thread::spawn(move || forward(from, to, most_bytes, random));
            }
        }
    });
    address
}

/// Relays all connections to `to`, but of the one with this index only what comes back: what goes
/// there is held up, as by a filter that drops its packets.
pub(crate) fn holding(to: SocketAddr, held: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for index in 0.. {
            let Ok((near, _)) = listener.accept() else { break };
            let far = TcpStream::connect(to).unwrap();
            let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            thread::spawn(move || forward(back_from, back_to, 4096, Random::new(1)));
            if index == held {
                // Open for as long as the process lives.
                std::mem::forget(near);
            } else {
                thread::spawn(move || forward(near, far, 4096, Random::new(2)));
            }
        }
    });
    address
}

fn forward(mut from: TcpStream, mut to: TcpStream, most_bytes: usize, mut random: Random) {
    to.set_nodelay(true).unwrap();
    let mut piece = vec![0; most_bytes];
    loop {
        let length = 1 + usize::try_from(random.below(most_bytes as u64)).unwrap();
        let Ok(length @ 1..) = from.read(&mut piece[..length]) else {
            let _ = to.shutdown(Shutdown::Write);
            return;
        };
        if to.write_all(&piece[..length]).is_err() {
            let _ = from.shutdown(Shutdown::Read);
            return;
        }
    }
}
