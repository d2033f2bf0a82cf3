//! Peers that are no `pageferry-vmm`: they speak the wire format byte by byte.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use pageferry::memory::{Layout, RegionLayout};
use pageferry::protocol::{Hello, Message};
use pageferry::transport::MigrationId;
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Kind, PREAMBLE_BYTES, Preamble, Status};
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};
use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};

use super::PATIENCE;

/// A connection to a listening `pageferry-vmm`.
pub(crate) fn dial(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    stream
}

const ID: MigrationId = MigrationId([7; 16]);

/// The preamble of a control connection.
pub(crate) fn control_preamble() -> [u8; PREAMBLE_BYTES] {
    Preamble { id: ID, kind: Kind::Control }.encode()
}

pub(crate) fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut bytes = [0; ANSWER_BYTES];
    stream.read_exact(&mut bytes).expect("read the answer");
    Answer::decode(&bytes).expect("an answer")
}

pub(crate) fn ok_answer() -> [u8; ANSWER_BYTES] {
    Answer { status: Status::Ok, reason: String::new() }.encode()
}

/// Listens as a destination would. With its address.
pub(crate) fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = listener.local_addr().expect("an address").to_string();
    (listener, address)
}

/// The control connection of a source, its preamble read and not answered.
pub(crate) fn take(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = listener.accept().expect("accept");
    stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    let mut bytes = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut bytes).expect("read the preamble");
    let preamble = Preamble::decode(&bytes).expect("a preamble");
    assert_eq!(preamble.kind, Kind::Control);
    stream
}

/// The control connection of a source that is let in, and has said nothing more yet.
pub(crate) fn let_in(address: &str) -> TcpStream {
    let mut stream = dial(address);
    stream.write_all(&control_preamble()).expect("write the preamble");
    let answer = read_answer(&mut stream);
    assert_eq!(answer.status, Status::Ok, "{answer:?}");
    stream
}

/// A guest as the reference VMM would describe it: small, and of threads.
pub(crate) fn small_guest() -> GuestConfig {
    GuestConfig {
        kind: GuestKind::Process,
        regions: Ram::pc_regions(16 << 20),
        backing: Backing::Anonymous,
        vcpus: 1,
        workload: WorkloadConfig {
            kind: WorkloadKind::Idle,
            working_set_bytes: 4 << 20,
            dirty_rate_pages_per_second: None,
            seed: 1,
        },
    }
}

/// The greeting of a source of [`small_guest`] that a destination would take.
pub(crate) fn hello(channels: u16) -> Message {
    hello_of(small_guest(), channels)
}

/// The greeting of a source of any guest.
pub(crate) fn hello_of(config: GuestConfig, channels: u16) -> Message {
    let guest = Guest::create(config).expect("a guest");
    let regions = guest.config().regions.iter().map(|(guest_addr, len_bytes)| RegionLayout {
        guest_addr: *guest_addr,
        len_bytes: *len_bytes,
        backing_page_bytes: 4096,
    });
    let layout = Layout::new(regions.collect()).expect("a layout");
    let description = serde_json::to_vec(guest.config()).expect("a description");
    let mut hello = Hello::new(layout, channels, false, description);
    hello.state_schema = guest.schema().expect("a schema").to_json().into();
    Message::Hello(hello)
}

/// A source that was let in and welcomed: its control connection.
pub(crate) fn welcomed(address: &str, channels: u16) -> TcpStream {
    welcomed_with(address, &hello(channels))
}

/// As [`welcomed`], with a greeting.
pub(crate) fn welcomed_with(address: &str, hello: &Message) -> TcpStream {
    let mut stream = let_in(address);
    send(&mut stream, &hello.encode());
    let answer = receive(&mut stream);
    assert!(matches!(answer, Message::Welcome(_)), "{answer:?}");
    stream
}

/// A message as a control frame.
pub(crate) fn send(stream: &mut TcpStream, frame: &[u8]) {
    let length = u32::try_from(frame.len()).expect("a short frame").to_le_bytes();
    stream.write_all(&[&length[..], frame].concat()).expect("send a frame");
}

/// The next message on a control connection.
pub(crate) fn receive(stream: &mut TcpStream) -> Message {
    let mut length = [0; 4];
    stream.read_exact(&mut length).expect("read a length");
    let mut frame = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut frame).expect("read a frame");
    Message::decode(&frame).expect("a message")
}

/// A port that nobody listens on, and nobody can as long as this lives. With its address.
pub(crate) fn closed_port() -> (OwnedFd, String) {
    let held = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&held, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
    let address = SocketAddr::try_from(getsockname(&held).expect("an address")).expect("an ip");
    (held, address.to_string())
}

/// Pseudo-random numbers that are the same in every run (splitmix64).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_le_bytes()).flatten().take(length).collect()
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
