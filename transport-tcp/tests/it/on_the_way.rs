//! Somebody between the two sides, who reads and changes what passes where there is TLS.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use pageferry::testing::greeting;
use pageferry::transport::{Link, Received, TransportError};
use pageferry_tcp::testing::shared_key;
use pageferry_tcp::{KernelTls, TcpAcceptor, connect};

use crate::support::memory::{assert_same, fill, guest_memory};
use crate::support::{PATIENCE, Pair, Random, data, of_anyone};

/// What becomes of bytes that go one way.
type Passage = Box<dyn FnMut(&[u8]) -> Vec<u8> + Send>;

fn as_they_are() -> Passage {
    Box::new(<[u8]>::to_vec)
}

/// Passes connections on, each by what `passages` gives for its number: from the source, and from the destination.
fn between(
    to: SocketAddr,
    mut passages: impl FnMut(usize) -> [Passage; 2] + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (number, from) in listener.incoming().flatten().enumerate() {
            let there = TcpStream::connect(to).unwrap();
            let [onward, back] = passages(number);
            let ends = [from.try_clone().unwrap(), there.try_clone().unwrap()];
            let [heard_from, said_to] = ends;
            thread::spawn(move || pass(&from, &said_to, onward));
            thread::spawn(move || pass(&there, &heard_from, back));
        }
    });
    address
}

/// Until the end.
fn pass(mut from: &TcpStream, mut to: &TcpStream, mut passage: Passage) {
    let mut bytes = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if to.write_all(&passage(&bytes[..count])).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Keeps all that the source says.
fn listening_in(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&seen);
    let address = between(to, move |_| {
        let kept = Arc::clone(&kept);
        let onward = move |bytes: &[u8]| {
            kept.lock().unwrap().extend_from_slice(bytes);
            bytes.to_vec()
        };
        [Box::new(onward), as_they_are()]
    });
    (address, seen)
}

fn assert_unseen(seen: &Mutex<Vec<u8>>, secrets: &[&[u8]]) {
    let seen = seen.lock().unwrap();
    for secret in secrets {
        let shows = seen.windows(secret.len()).any(|window| window == *secret);
        assert!(!shows, "{}", String::from_utf8_lossy(secret));
    }
}

#[test]
fn who_is_on_the_way_reads_nothing() {
    let options = shared_key(KernelTls::Auto);
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", options.clone()).unwrap();
    let (address, seen) = listening_in(acceptor.local_addr());
    let mut source = connect(address, options).unwrap();
    let mut control = source.control().unwrap();
    control.sender.send(&greeting(b"a description of a machine".to_vec()), PATIENCE).unwrap();
    let link = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(link.link_id(), source.link_id());
    assert_unseen(&seen, &[b"a description of a machine", b"PFTCPREQ", &source.link_id().0]);
}

/// Pages that are known, by whomever they are encrypted.
#[test]
fn who_is_on_the_way_reads_no_page() {
    for kernel in [KernelTls::Off, KernelTls::Auto] {
        let options = shared_key(kernel);
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", of_anyone(&options)).unwrap();
        let (address, seen) = listening_in(acceptor.local_addr());
        let source = connect(address, options).unwrap();
        let destination = acceptor.accept(Some(PATIENCE)).unwrap();
        let mut pair = Pair { source, destination };
        let (here, there) = (guest_memory(&[64]), guest_memory(&[64]));
        let text = b"what a guest has".repeat(256);
        for page in 0..64 {
            here.copy_in(data(0, page, 1).range, &text).unwrap();
        }
        let mut ends = pair.open(&here, &there, 1);
        ends.senders[0].send(&[data(0, 0, 64)]).unwrap();
        ends.senders[0].finish().unwrap();
        assert!(matches!(ends.receivers[0].receive().unwrap(), Received::Batch(_)));
        assert_same(&here, &there);
        assert!(seen.lock().unwrap().len() > 64 * 4096, "the pages went another way");
        assert_unseen(&seen, &[b"what a guest has"]);
    }
}

/// A frame that was changed on the way ends the link, and both sides know why.
#[test]
fn who_is_on_the_way_changes_nothing() {
    let options = shared_key(KernelTls::Auto);
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", options.clone()).unwrap();
    let address = between(acceptor.local_addr(), |_| {
        // Far behind the handshake.
        let (at, mut passed) = (100_000, 0);
        let onward = move |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            if (passed..passed + bytes.len()).contains(&at) {
                bytes[at - passed] ^= 1;
            }
            passed += bytes.len();
            bytes
        };
        [Box::new(onward), as_they_are()]
    });
    let mut source = connect(address, options).unwrap();
    let mut control = source.control().unwrap();
    control.sender.send(&greeting(Vec::new()), PATIENCE).unwrap();
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    let mut there = link.control().unwrap();
    there.receiver.receive(Some(PATIENCE)).unwrap();
    control.sender.send(&vec![7; 200_000], PATIENCE).unwrap();
    for (receiver, told) in
        [(&mut there.receiver, "changed on the way"), (&mut control.receiver, "other side says")]
    {
        let error = receiver.receive(Some(PATIENCE)).unwrap_err();
        let TransportError::Lost { cause, .. } = &error else { panic!("not lost: {error:?}") };
        assert!(cause.to_string().contains(told), "{cause}");
    }
}

/// A record of a data channel that was changed, in its header or behind it, ends the channel, by whomever it is
/// decrypted: as one that is lost, and not as a fault of this machine's.
#[test]
fn a_record_of_pages_that_is_changed_on_the_way_ends_its_channel() {
    // Type, version, length by a lot, length by a little, and what is in it.
    for at in [0, 1, 3, 4, 5, 100] {
        for kernel in [KernelTls::Off, KernelTls::Auto] {
            let options = shared_key(kernel);
            let acceptor = TcpAcceptor::bind("127.0.0.1:0", of_anyone(&options)).unwrap();
            let source = connect(changing(acceptor.local_addr(), at), options).unwrap();
            let destination = acceptor.accept(Some(PATIENCE)).unwrap();
            let mut pair = Pair { source, destination };
            let (here, there) = (guest_memory(&[64]), guest_memory(&[64]));
            fill(&here, &mut Random::new(1));
            let mut ends = pair.open(&here, &there, 1);
            ends.senders[0].send(&[data(0, 0, 64)]).unwrap();
            // The receiver looks for what follows; this fails where that has ended the channel already.
            let _ = ends.senders[0].finish();
            let by_kernel = kernel == KernelTls::Auto && !pair.source.encrypts_in_process();
            match ends.receivers[0].receive() {
                Err(TransportError::Lost { .. }) => {}
                // To the kernel the type of a record is what is inside it (RFC 8446, section 5.2), and nothing else.
                Ok(Received::Batch(_)) if at == 0 && by_kernel => assert_same(&here, &there),
                other => panic!("{at}, {kernel:?}: {other:?}"),
            }
        }
    }
}

/// Flips a bit of a byte of the first large record of the second connection.
fn changing(to: SocketAddr, at: usize) -> SocketAddr {
    const HEADER: usize = 5;
    between(to, move |number| {
        let (mut held, mut flipped) = (Vec::new(), number == 0);
        let onward = move |bytes: &[u8]| {
            held.extend_from_slice(bytes);
            let mut whole = Vec::new();
            while let Some(&[_, _, _, high, low]) = held.first_chunk::<HEADER>() {
                let end = HEADER + usize::from(u16::from_be_bytes([high, low]));
                if held.len() < end {
                    break;
                }
                if !flipped && end > 8 << 10 {
                    held[at] ^= 0x40;
                    flipped = true;
                }
                whole.extend(held.drain(..end));
            }
            whole
        };
        [Box::new(onward), as_they_are()]
    })
}

/// Bytes behind the destination's answer, so that the session holds some when a data channel is to leave it: nobody goes
/// on, least of all in plain text.
#[test]
fn what_comes_before_it_is_due_ends_a_channel() {
    if let Some(why) = pageferry_tcp::kernel_tls_unavailable() {
        eprintln!("what_comes_before_it_is_due_ends_a_channel skipped, because {why}");
        return;
    }
    let long = [&[23, 3, 3, 0x40, 0][..], &[7; 6000]].concat();
    for junk in [&[23, 3, 3][..], &[23, 3, 3, 0x40, 0, 7], &long] {
        let options = shared_key(KernelTls::Auto);
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", of_anyone(&options)).unwrap();
        let mut source = connect(inserting(acceptor.local_addr(), junk), options).unwrap();
        source.register(&guest_memory(&[1])).unwrap();
        let error = source.open_sockets(1).expect_err("no socket");
        let TransportError::Lost { cause, .. } = &error else { panic!("not lost: {error:?}") };
        assert!(cause.to_string().contains("before it was due"), "{cause}");
    }
}

/// Puts bytes behind what the destination answers on the second connection: what it says after the source has said
/// something for the second time, the rest of its handshake with its preamble.
fn inserting(to: SocketAddr, junk: &[u8]) -> SocketAddr {
    let junk = junk.to_vec();
    between(to, move |number| {
        let said = Arc::new(AtomicUsize::new(0));
        let (counted, junk) = (Arc::clone(&said), junk.clone());
        let onward = move |bytes: &[u8]| {
            counted.fetch_add(1, Ordering::SeqCst);
            bytes.to_vec()
        };
        let back = move |bytes: &[u8]| {
            let is_answer = number > 0 && said.load(Ordering::SeqCst) > 1;
            if is_answer { [bytes, &junk].concat() } else { bytes.to_vec() }
        };
        [Box::new(onward), Box::new(back)]
    })
}
