//! The other end of a link, by hand: sockets, and what is said on them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pageferry::memory::PageRange;
use pageferry::protocol::{FailureReason, Message, PageSample, Prepare, Prepared};
use pageferry::transport::stream::{self, FRAME_HEADER_BYTES, FrameHeader};
use pageferry::transport::{LinkId, Run, RunKind};
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Kind, PREAMBLE_BYTES, Preamble, Status};

use crate::input::Input;

/// Data channels of a link.
pub const CHANNELS: u16 = 2;
/// How long an answer is waited for that may not come.
const PATIENCE: Duration = Duration::from_millis(3);

/// Its sockets: control, and the data channels.
pub struct Peer {
    pub control: UnixStream,
    pub data: Vec<UnixStream>,
    id: LinkId,
}

/// Both ends of a link: the other one's sockets, and this one's descriptors.
pub fn link() -> (Peer, OwnedFd, Vec<OwnedFd>) {
    let pair = || {
        let (here, there) = UnixStream::pair().expect("two sockets");
        for end in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            end(&there, Some(PATIENCE)).expect("a time limit");
        }
        (OwnedFd::from(here), there)
    };
    let (control, their_control) = pair();
    let (data, their_data) = (0..CHANNELS).map(|_| pair()).unzip();
    let peer = Peer { control: their_control, data: their_data, id: LinkId([7; 16]) };
    (peer, control, data)
}

impl Peer {
    /// Whether that could be said: who has ended hears no more.
    pub fn say(&mut self, frame: &[u8]) -> bool {
        let frame = [&FrameHeader::of(frame).encode()[..], frame].concat();
        self.control.write_all(&frame).is_ok()
    }

    /// The next message, if one comes.
    pub fn hear(&mut self) -> Option<Message> {
        let mut header = [0; FRAME_HEADER_BYTES];
        self.control.read_exact(&mut header).ok()?;
        // It may be what comes before the first frame, of a connection that was not answered.
        let header = FrameHeader::decode(&header).ok()?;
        let mut frame = vec![0; header.frame_bytes().ok()?];
        self.control.read_exact(&mut frame).ok()?;
        header.check(&frame).expect("what the engine sends is right");
        Some(Message::decode(&frame).expect("what the engine says is a message"))
    }

    /// Says nothing more, on any connection.
    pub fn fall_silent(&self) {
        for socket in self.data.iter().chain([&self.control]) {
            // It may be gone.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    /// As a source: says what the connections are for.
    pub fn open(&mut self, kind: Kind) -> bool {
        let preamble = Preamble { id: self.id, kind }.encode();
        let socket = match kind {
            Kind::Control => &mut self.control,
            Kind::Data { channel } | Kind::Lane { lane: channel } => {
                &mut self.data[usize::from(channel)]
            }
        };
        let mut answer = [0; ANSWER_BYTES];
        socket.write_all(&preamble).is_ok()
            && socket.read_exact(&mut answer).is_ok()
            && Answer::decode(&answer).is_ok_and(|answer| answer.status == Status::Ok)
    }

    /// As a destination: answers what a connection is for.
    pub fn answer(&mut self, channel: Option<u16>) -> bool {
        let socket = match channel {
            None => &mut self.control,
            Some(channel) => &mut self.data[usize::from(channel)],
        };
        let mut preamble = [0; PREAMBLE_BYTES];
        let answer = Answer { status: Status::Ok, reason: String::new() }.encode();
        socket.read_exact(&mut preamble).is_ok() && socket.write_all(&answer).is_ok()
    }

    /// A batch as the input wants it, that may or may not be allowed.
    pub fn send_batch(&mut self, input: &mut Input<'_>, tickets: &mut [u64]) -> bool {
        let channel = usize::from(input.byte()) % self.data.len();
        let runs: Vec<_> = (0..1 + input.byte() % 8)
            .map(|_| Run {
                range: PageRange {
                    region: u16::from(input.byte() == 0xff),
                    first_page: u64::from(input.byte() % 80),
                    pages: u32::from(input.byte() % 16),
                },
                kind: if input.byte() % 2 == 0 { RunKind::Data } else { RunKind::Zero },
            })
            .collect();
        tickets[channel] += u64::from(input.byte() != 0xff);
        let mut bytes = Vec::new();
        stream::encode_batch(tickets[channel], &runs, input.byte() % 2 == 0, &mut bytes);
        if input.byte() == 0xff {
            input.mutate(&mut bytes);
        }
        for run in runs.iter().filter(|run| run.kind == RunKind::Data) {
            let length = usize::try_from(run.payload_bytes()).expect("a few pages");
            bytes.resize(bytes.len() + length, 0xaa);
        }
        self.data[channel].write_all(&bytes).is_ok()
    }
}

/// A message that either side could say, at the right time or at another.
pub fn some_message(input: &mut Input<'_>) -> Message {
    let (kind, number) = (input.byte(), u32::from(input.byte() % 4));
    let channel = u16::from(input.byte() % 4);
    let ranges = |input: &mut Input<'_>| -> Vec<PageRange> {
        (0..input.byte() % 4)
            .map(|_| PageRange {
                region: 0,
                first_page: u64::from(input.byte()),
                pages: u32::from(input.byte()),
            })
            .collect()
    };
    let digest = pageferry::digest::Digest([input.byte(); 16]);
    match kind % 23 {
        0 => Message::Registered,
        1 => Message::Ready,
        2 => Message::Round { round: number, dirty_pages: u64::from(input.byte()) },
        3 => Message::CloseChannel { channel },
        4 => Message::ChannelClosed { channel },
        5 => Message::Switchover { attempt: number },
        6 => Message::StateChunk(input.bytes(8).to_vec()),
        7 => Message::Ping { number },
        8 => Message::Pong { number },
        9 => Message::Verify { attempt: number },
        10 => Message::Verified { attempt: number, digest },
        11 => Message::Compared { attempt: number, digest },
        12 => Message::Prepare(Prepare {
            attempt: number,
            state_bytes: u64::from(input.byte()),
            paused: input.byte() % 2 == 0,
            sums: vec![u64::from(input.byte()); usize::from(input.byte() % 4)],
            samples: vec![
                PageSample { region: 0, page: u64::from(input.byte()), sum: 1 };
                usize::from(input.byte() % 4)
            ],
        }),
        13 => Message::Prepared(Prepared {
            attempt: number,
            load_ns: 1,
            written: ranges(input),
            damaged: ranges(input),
        }),
        14 => Message::CalledOff { attempt: number },
        15 => Message::Releasing,
        16 => Message::Commit,
        17 => Message::Resumed { resume_ns: 1 },
        18 => Message::GaveBack { text: "no".to_owned() },
        19 => Message::Heard,
        20 => Message::DataRanges(ranges(input)),
        21 => Message::Agreed { greeting: digest },
        _ => Message::Failed { reason: FailureReason::Host, text: "so".to_owned() },
    }
}
