//! Peers that are no `pageferry-vmm`: they speak the wire format byte by byte.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::memory::{Layout, RegionLayout};
use pageferry::protocol::{Hello, Message, MigrationKey};
use pageferry::transport::LinkId;
use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader};
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

const ID_BYTE: u8 = 7;
const ID: LinkId = LinkId([ID_BYTE; 16]);

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

/// An address that does not answer, for as long as what comes with it lives: the queue of its
/// listener has room for one, and is full.
pub(crate) fn silent() -> (String, (TcpListener, TcpStream)) {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
    rustix::net::listen(&socket, 0).expect("listen");
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().expect("an address").to_string();
    let fills = dial(&address);
    (address, (listener, fills))
}

/// Whether somebody is connecting to an address and has no answer yet.
pub(crate) fn is_being_dialled(address: &str) -> bool {
    const SYN_SENT: &str = "02";
    let SocketAddr::V4(address) = address.parse().expect("an address") else { panic!("IPv4") };
    // As a number in the machine's order, and a port.
    let remote = u32::from_ne_bytes(address.ip().octets());
    let remote = format!("{remote:08X}:{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").expect("connections");
    table.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(2) == Some(&&*remote) && fields.get(3) == Some(&SYN_SENT)
    })
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
    guest_of(16 << 20)
}

/// The same with more memory.
pub(crate) fn guest_of(memory_bytes: u64) -> GuestConfig {
    GuestConfig {
        kind: GuestKind::Process,
        regions: Ram::pc_regions(memory_bytes),
        backing: Backing::Anonymous,
        vcpus: 1,
        cpu: None,
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
    Message::Hello(hello_of(small_guest(), channels))
}

/// The greeting of a source of any guest.
pub(crate) fn hello_of(config: GuestConfig, channels: u16) -> Hello {
    let guest = Guest::create(config).expect("a guest");
    let regions = guest.config().regions.iter().map(|(guest_addr, len_bytes)| RegionLayout {
        guest_addr: *guest_addr,
        len_bytes: *len_bytes,
        backing_page_bytes: 4096,
    });
    let layout = Layout::new(regions.collect()).expect("a layout");
    let description = serde_json::to_vec(guest.config()).expect("a description");
    let mut hello =
        Hello::new(MigrationKey::random().unwrap(), layout, channels, false, description);
    hello.state_schema = guest.schema().expect("a schema").to_json().into();
    hello
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

/// A source whose data channels are open, and that has sent no page yet.
pub(crate) struct Opened {
    pub(crate) control: TcpStream,
    pub(crate) data: Vec<TcpStream>,
}

/// Comes that far, unless it is turned away, or the destination is gone.
pub(crate) fn try_open(address: &str, hello: &Hello) -> io::Result<Opened> {
    /// Several at once are different migrations.
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let id = LinkId((u128::from(ID_BYTE) << 120 | u128::from(number)).to_be_bytes());
    let connect = |kind| {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&Preamble { id, kind }.encode())?;
        let mut answer = [0; ANSWER_BYTES];
        stream.read_exact(&mut answer)?;
        match Answer::decode(&answer).map_err(io::Error::other)? {
            Answer { status: Status::Ok, .. } => Ok(stream),
            refused => Err(io::Error::other(format!("{refused:?}"))),
        }
    };
    let mut control = connect(Kind::Control)?;
    control.write_all(&frame(&Message::Hello(hello.clone())))?;
    let welcome = match try_receive(&mut control)? {
        Message::Welcome(welcome) => welcome,
        other => return Err(io::Error::other(format!("{other:?}"))),
    };
    for message in [welcome.agreed(hello), Message::Registered] {
        control.write_all(&frame(&message))?;
    }
    assert_eq!(try_receive(&mut control)?, Message::Registered);
    let data = (0..hello.channels).map(|channel| connect(Kind::Data { channel }));
    let data = data.collect::<io::Result<_>>()?;
    assert_eq!(try_receive(&mut control)?, Message::Ready);
    Ok(Opened { control, data })
}

/// A message as a control frame.
pub(crate) fn frame(message: &Message) -> Vec<u8> {
    framed(&message.encode())
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&FrameHeader::of(frame).encode()[..], frame].concat()
}

/// The length of the control frame that bytes begin with, if all of it is there.
pub(crate) fn whole_frame(bytes: &[u8]) -> Option<usize> {
    let header = FrameHeader::decode(bytes.first_chunk()?).expect("a header");
    Some(FRAME_HEADER_BYTES + header.length as usize).filter(|whole| *whole <= bytes.len())
}

/// Sends a control frame.
pub(crate) fn send(stream: &mut TcpStream, frame: &[u8]) {
    stream.write_all(&framed(frame)).expect("send a frame");
}

/// The next message on a control connection.
pub(crate) fn receive(stream: &mut TcpStream) -> Message {
    try_receive(stream).expect("a message")
}

pub(crate) fn try_receive(stream: &mut TcpStream) -> io::Result<Message> {
    let mut header = [0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let header = FrameHeader::decode(&header).map_err(io::Error::other)?;
    let mut frame = vec![0; header.length as usize];
    stream.read_exact(&mut frame)?;
    header.check(&frame).map_err(io::Error::other)?;
    Message::decode(&frame).map_err(io::Error::other)
}

/// What who was let in hears when it is turned away.
pub(crate) fn read_refusal(stream: &mut TcpStream) -> String {
    stream.read_exact(&mut [0; FRAME_HEADER_BYTES]).expect("a frame of no bytes");
    read_answer(stream).reason
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

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
