//! Peers that lie or die.

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use pageferry::memory::{GuestMemory, PageRange};
use pageferry::transport::stream::{self, LEAD_BYTES, StreamError};
use pageferry::transport::{
    DestinationLink, Link, PageReceiver, Received, Run, SourceLink, TransportError,
};
use pageferry_tcp::preamble::Kind;
use pageferry_tcp::{TcpDestinationLink, TcpOptions, TcpSourceLink, connect};
use std::sync::Arc;

use crate::support::memory::{assert_untouched, bytes_of, guest_memory};
use crate::support::{PATIENCE, acceptor, data, raw, until_landed, zero};

struct Receiving {
    memory: Arc<GuestMemory>,
    /// The data connection's other end.
    stream: TcpStream,
    receiver: Box<dyn PageReceiver>,
    _control: TcpStream,
    _link: TcpDestinationLink,
}

/// A region of more pages than a batch may have as zero.
const LARGE_PAGES: u32 = (1 << 14) + 1;

/// A receiver whose other side is a plain socket.
fn receiving() -> Receiving {
    let acceptor = acceptor(&TcpOptions::default());
    let control = raw::dial(acceptor.local_addr(), Kind::Control);
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    let memory = guest_memory(&[8, 8, LARGE_PAGES.into()]);
    link.register(&memory).unwrap();
    let stream = raw::dial(acceptor.local_addr(), Kind::Data { channel: 0 });
    let receiver = link.open_receivers(1, PATIENCE).unwrap().remove(0);
    Receiving { memory, stream, receiver, _control: control, _link: link }
}

fn head(ticket: u64, runs: &[Run]) -> Vec<u8> {
    let mut head = Vec::new();
    stream::encode_batch(ticket, runs, false, &mut head);
    head
}

#[test]
fn a_bad_batch_is_malformed_and_touches_no_memory() {
    type Check = fn(&StreamError) -> bool;
    let good = data(0, 0, 1);
    let mut other = head(1, &[good]);
    other[..4].copy_from_slice(b"????");
    stream::seal(&mut other);
    let cases: [(Vec<u8>, Check); 9] = [
        (head(1, &[good, data(0, 8, 1)]), |e| matches!(e, StreamError::OutOfRange(_))),
        (head(1, &[good, data(1, 7, 2)]), |e| matches!(e, StreamError::OutOfRange(_))),
        (head(1, &[good, zero(9, 0, 1)]), |e| matches!(e, StreamError::OutOfRange(_))),
        (head(1, &[zero(0, 0, 0)]), |e| matches!(e, StreamError::OutOfRange(_))),
        (head(1, &[good, good]), |e| matches!(e, StreamError::Twice(_))),
        // 32 GiB to write, for a table of 8 KiB.
        (head(1, &[zero(2, 0, LARGE_PAGES); 512]), |e| matches!(e, StreamError::ZeroPages(_))),
        (head(1, &[zero(2, 0, LARGE_PAGES)]), |e| matches!(e, StreamError::ZeroPages(_))),
        (head(2, &[good]), |e| matches!(e, StreamError::Sequence { .. })),
        (other, |e| matches!(e, StreamError::BadMagic(_))),
    ];
    for (mut bytes, expected) in cases {
        let mut r = receiving();
        bytes.resize(bytes.len() + 3 * 4096, 0xaa);
        r.stream.write_all(&bytes).unwrap();
        for _ in 0..2 {
            let error = r.receiver.receive().unwrap_err();
            let TransportError::Malformed(cause) = &error else { panic!("{error}") };
            assert!(expected(cause), "{error}");
        }
        assert_untouched(&r.memory);
    }
}

/// Whichever bit of it, of the header or of the table: that each is seen is a test of the codec's own.
#[test]
fn a_head_that_is_changed_on_the_way_ends_its_channel_and_touches_no_memory() {
    let whole = head(1, &[data(0, 0, 2), zero(1, 6, 2)]);
    for bit in (0..whole.len() * 8).step_by(11) {
        let mut r = receiving();
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        changed.resize(changed.len() + 3 * 4096, 0xaa);
        r.stream.write_all(&changed).unwrap();
        let error = r.receiver.receive().unwrap_err();
        assert!(matches!(error, TransportError::Lost { .. }), "bit {bit}: {error:?}");
        assert_untouched(&r.memory);
    }
}

#[test]
fn an_acknowledgement_that_is_changed_on_the_way_is_not_believed() {
    let whole = stream::encode_ack(1);
    for bit in 0..whole.len() * 8 {
        let (mut source, listener, _control) = sending();
        let (mut sender, mut stream) = with_data_connection(&mut source, &listener);
        sender.send(&[zero(0, 0, 1)]).unwrap();
        let mut changed = whole;
        changed[bit / 8] ^= 1 << (bit % 8);
        stream.write_all(&changed).unwrap();
        let error = sender.watermarks(Some(PATIENCE)).unwrap_err();
        assert!(matches!(error, TransportError::Lost { .. }), "bit {bit}: {error:?}");
    }
}

#[test]
fn a_source_that_dies_anywhere_is_lost() {
    let mut batch = head(1, &[data(0, 0, 2), data(1, 6, 2)]);
    batch.resize(batch.len() + 4 * 4096, 0xaa);
    for sent in [0, 1, 23, 24, 39, 40, 55, 56, 57, 151, 152, 153, 5000, batch.len() - 1] {
        let mut r = receiving();
        r.stream.write_all(&batch[..sent]).unwrap();
        drop(r.stream);
        for _ in 0..2 {
            let error = r.receiver.receive().unwrap_err();
            assert!(matches!(error, TransportError::Lost { .. }), "{sent} bytes: {error}");
        }
    }
    // After a whole batch that batch counts.
    let mut r = receiving();
    r.stream.write_all(&batch).unwrap();
    drop(r.stream);
    assert!(matches!(r.receiver.receive().unwrap(), Received::Batch(_)));
    let range = PageRange { region: 1, first_page: 6, pages: 2 };
    assert!(bytes_of(&r.memory, range).iter().all(|&byte| byte == 0xaa));
    assert!(matches!(r.receiver.receive(), Err(TransportError::Lost { .. })));
}

/// A source link whose destination is a plain socket: control, then one data connection.
fn sending() -> (TcpSourceLink, TcpListener, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let source = scope.spawn(move || connect(address, TcpOptions::default()).unwrap());
        let (control, preamble) = raw::welcome(&listener);
        assert_eq!(preamble.kind, Kind::Control);
        let mut source = source.join().unwrap();
        assert_eq!(source.link_id(), preamble.id);
        source.register(&guest_memory(&[1024])).unwrap();
        (source, listener, control)
    })
}

fn with_data_connection(
    source: &mut TcpSourceLink,
    listener: &TcpListener,
) -> (Box<dyn pageferry::transport::PageSender>, TcpStream) {
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| source.open_senders(1).unwrap().remove(0));
        let (stream, preamble) = raw::welcome(listener);
        assert_eq!(preamble.kind, Kind::Data { channel: 0 });
        (opening.join().unwrap(), stream)
    })
}

#[test]
fn a_destination_that_dies_is_lost_in_the_middle_of_a_batch() {
    let (mut source, listener, _control) = sending();
    let (mut sender, stream) = with_data_connection(&mut source, &listener);
    let killer = std::thread::spawn(move || {
        // Something of the first batch is there; the rest of it and of many more is not read.
        let mut byte = [0];
        std::io::Read::read_exact(&mut &stream, &mut byte).unwrap();
        drop(stream);
    });
    let error = loop {
        if let Err(error) = sender.send(&[data(0, 0, 1024)]) {
            break error;
        }
    };
    killer.join().unwrap();
    assert!(matches!(error, TransportError::Lost { .. }), "{error}");
    assert!(matches!(sender.send(&[data(0, 0, 1)]), Err(TransportError::Lost { .. })));
    assert!(matches!(sender.finish(), Err(TransportError::Lost { .. })));
}

#[test]
fn acknowledgements_are_checked_and_may_come_in_pieces() {
    let (mut source, listener, _control) = sending();
    let (mut sender, mut stream) = with_data_connection(&mut source, &listener);
    for _ in 0..300 {
        sender.send(&[zero(0, 0, 1)]).unwrap();
    }
    let mut acks = Vec::new();
    for ticket in 1..=200_u64 {
        acks.extend_from_slice(&stream::encode_ack(ticket));
    }
    stream.write_all(&acks[..acks.len() - 3]).unwrap();
    until_landed_at_least(&mut *sender, 199);
    stream.write_all(&acks[acks.len() - 3..]).unwrap();
    until_landed_at_least(&mut *sender, 200);
    stream.write_all(&stream::encode_ack(300)).unwrap();
    until_landed(&mut *sender, 300);

    // Backwards, then what was never sent.
    for (wrong, sent) in [(299_u64, 301), (302, 301)] {
        let (mut source, listener, _control) = sending();
        let (mut sender, mut stream) = with_data_connection(&mut source, &listener);
        for _ in 0..sent {
            sender.send(&[zero(0, 0, 1)]).unwrap();
        }
        stream.write_all(&stream::encode_ack(300)).unwrap();
        until_landed(&mut *sender, 300);
        stream.write_all(&stream::encode_ack(wrong)).unwrap();
        let error = sender.watermarks(Some(PATIENCE)).unwrap_err();
        assert!(
            matches!(error, TransportError::Malformed(StreamError::Ack { got, .. }) if got == wrong),
            "{error}"
        );
        assert!(sender.send(&[zero(0, 0, 1)]).is_err());
    }
}

fn until_landed_at_least(sender: &mut dyn pageferry::transport::PageSender, ticket: u64) {
    while sender.watermarks(Some(PATIENCE)).unwrap().landed < ticket {}
}

#[test]
fn what_landed_before_the_loss_is_told() {
    let (mut source, listener, _control) = sending();
    let (mut sender, mut stream) = with_data_connection(&mut source, &listener);
    sender.send(&[zero(0, 0, 1)]).unwrap();
    sender.send(&[zero(0, 0, 1)]).unwrap();
    // Read what was sent, so that closing the socket ends the stream in order.
    let mut read = [0; 2 * LEAD_BYTES];
    std::io::Read::read_exact(&mut stream, &mut read).unwrap();
    stream.write_all(&stream::encode_ack(1)).unwrap();
    drop(stream);
    assert_eq!(sender.watermarks(Some(PATIENCE)).unwrap().landed, 1);
    let error = sender.watermarks(Some(PATIENCE)).unwrap_err();
    assert!(matches!(error, TransportError::Lost { .. }), "{error}");
}
