//! Destinations that flood the source that connects to them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;

use pageferry::protocol::{Message, negotiate};
use pageferry::transport::stream::encode_ack;
use pageferry_tcp::preamble::PREAMBLE_BYTES;

use super::{assert_gets_in, assert_needs_little, pour};
use crate::support::peer::{frame, listen, ok_answer, receive, send, take};
use crate::support::sides::{destination, source_that_stays};

/// The next connection of a source, its preamble answered.
fn take_next(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = listener.accept().expect("accept");
    stream.read_exact(&mut [0; PREAMBLE_BYTES]).expect("read the preamble");
    stream.write_all(&ok_answer()).expect("answer");
    stream
}

/// What a destination has to say on a data channel is how much has landed, as often as it is asked.
#[test]
fn acknowledgements_at_a_source() {
    // Each transport reads them in a way of its own; the other is io_uring, where there is one.
    for transport in ["--transport=tcp", "--transport=auto"] {
        acknowledgements_over(transport);
    }
}

fn acknowledgements_over(transport: &str) {
    let mut source = source_that_stays(&["--workload=idle", "--channels=1", transport]);
    let idle_bytes = source.peak_memory_bytes();
    let (listener, address) = listen();
    source.say(format!("migrate {address}"));
    let mut control = take_next(&listener);
    let Message::Hello(hello) = receive(&mut control) else { panic!("no greeting") };
    let (_, welcome) = negotiate(&hello, 1, false, false).expect("it fits");
    send(&mut control, &Message::Welcome(welcome).encode());
    assert_eq!(receive(&mut control), welcome.agreed(&hello));
    send(&mut control, &Message::Registered.encode());
    assert_eq!(receive(&mut control), Message::Registered);
    let mut data = take_next(&listener);
    send(&mut control, &Message::Ready.encode());
    let nothing = encode_ack(0).repeat(100_000);
    let sent = pour(&mut data, &nothing, &AtomicBool::new(false));
    eprintln!("{} KiB went out, {transport}", sent >> 10);
    assert_needs_little(&mut source, idle_bytes);
    // Not held up by what is still to be read.
    source.say("cancel");
    let report = source.await_report();
    assert_eq!(report.text("guest_at"), "source");
    let (mut destination, address) = destination(&[]);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

/// A destination that answers the greeting of a source with a flood.
#[test]
fn control_frames_at_a_source() {
    let chunk = Message::StateChunk(vec![7; 256 << 10]);
    let mut source = source_that_stays(&["--workload=idle"]);
    let idle_bytes = source.peak_memory_bytes();
    for flood in [frame(&Message::Pong { number: 1 }).repeat(10_000), frame(&chunk)] {
        let (listener, address) = listen();
        source.say(format!("migrate {address}"));
        let mut stream = take(&listener);
        stream.write_all(&ok_answer()).expect("answer");
        assert!(matches!(receive(&mut stream), Message::Hello(_)));
        pour(&mut stream, &flood, &AtomicBool::new(false));
        assert_needs_little(&mut source, idle_bytes);
        drop(stream);
        let report = source.await_report();
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "source"));
    }
    let (mut destination, address) = destination(&[]);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}
