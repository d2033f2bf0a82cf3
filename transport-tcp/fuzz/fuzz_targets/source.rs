//! A source, by real sockets, and a destination that does whatever the input says. The migration ends, in bounded
//! memory, and its machine comes back, with a guest that runs where it is said to; it leaves only by a commit.
#![no_main]

#[path = "../../../device-state/fuzz/src/allocator.rs"]
mod allocator;

use std::net::Shutdown;
use std::thread;

use allocator::bounded;
use libfuzzer_sys::fuzz_target;
use pageferry::dirty::DirtySources;
use pageferry::protocol::{Hello, Message, Prepared, negotiate};
use pageferry::testing::TestMemory;
use pageferry::transport::{OneLink, stream};
use pageferry::{GuestAtSource, Source};
use pageferry_tcp::{GivenSockets, TcpOptions};
use pageferry_tcp_fuzz::guest::{Guest, PAGES};
use pageferry_tcp_fuzz::input::Input;
use pageferry_tcp_fuzz::peer::{CHANNELS, Peer, link, some_message};

/// What a source may take, whatever a destination does.
const MOST_BYTES: usize = 24 << 20;

fuzz_target!(|bytes: &[u8]| {
    let (peer, control, data) = link();
    let (end, heard_commit) = bounded(MOST_BYTES + 64 * bytes.len(), || {
        thread::scope(|scope| {
            let source = scope.spawn(move || leave(control, data));
            let heard_commit = play(peer, Input::new(bytes));
            (source.join().expect("no panic"), heard_commit)
        })
    });
    match end {
        Some((None, runs)) => assert!(heard_commit && !runs, "it never committed"),
        Some((Some(GuestAtSource::Running), runs)) => assert!(runs),
        Some((Some(guest), runs)) => {
            assert!(!runs, "{guest:?}");
        }
        None => {}
    }
});

/// Where the guest is then, nowhere here if it has left, and whether it runs; `None` if there was no link.
fn leave(
    control: std::os::fd::OwnedFd,
    data: Vec<std::os::fd::OwnedFd>,
) -> Option<(Option<GuestAtSource>, bool)> {
    let sockets = GivenSockets::new(control, data, TcpOptions::default()).expect("sockets");
    let link = sockets.source().ok()?;
    let memory = TestMemory::new(&[PAGES]);
    memory.fill(1);
    let source = Source::new().channels(CHANNELS);
    let guest = Guest { runs: true };
    let link = OneLink::source(Box::new(link));
    let result = source.migrate(guest, memory.memory(), DirtySources::new(Vec::new()), link);
    Some(match result {
        Ok(departed) => (None, departed.machine.runs),
        Err(failure) => (Some(failure.guest), failure.machine.runs),
    })
}

/// Does what the input says, and is gone. Whether it has heard the commit.
fn play(mut peer: Peer, mut input: Input<'_>) -> bool {
    let mut heard = Heard::default();
    let mut honest = 0;
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let said = match input.byte() % 16 {
            0..=7 => {
                honest += 1;
                step(&mut peer, honest, &mut heard)
            }
            8 | 9 => {
                let message = some_message(&mut input);
                peer.say(&message.encode())
            }
            10 => {
                let frame = input.bytes(64);
                frame.is_empty() || peer.say(frame)
            }
            11 => std::io::Write::write_all(&mut peer.control, input.bytes(32)).is_ok(),
            12 | 13 => {
                let channel = usize::from(input.byte()) % peer.data.len();
                let ack = stream::encode_ack(u64::from(input.byte()));
                std::io::Write::write_all(&mut peer.data[channel], &ack).is_ok()
            }
            14 => {
                let channel = usize::from(input.byte()) % peer.data.len();
                std::io::Write::write_all(&mut peer.data[channel], input.bytes(32)).is_ok()
            }
            _ => {
                let which = usize::from(input.byte()) % (peer.data.len() + 1);
                let socket = peer.data.get(which).unwrap_or(&peer.control);
                socket.shutdown(Shutdown::Write).is_ok()
            }
        };
        if !said {
            break;
        }
    }
    // It may be on its way.
    peer.fall_silent();
    while let Some(message) = peer.hear() {
        heard.commit |= message == Message::Commit;
    }
    heard.commit
}

#[derive(Default)]
struct Heard {
    hello: Option<Hello>,
    commit: bool,
}

/// What an honest destination says next, having heard what it waits for.
fn step(peer: &mut Peer, number: u32, heard: &mut Heard) -> bool {
    match number {
        1 => return peer.answer(None),
        2 => {
            let Some(Message::Hello(hello)) = peer.hear() else { return false };
            let Ok((_, welcome)) = negotiate(&hello, CHANNELS, false, false) else { return false };
            heard.hello = Some(hello);
            return peer.say(&Message::Welcome(welcome).encode());
        }
        3 => return peer.say(&Message::Registered.encode()),
        4 | 5 => return peer.answer(Some(if number == 4 { 0 } else { 1 })),
        6 => return peer.say(&Message::Ready.encode()),
        _ => {}
    }
    // It answers what it is asked, and takes in what comes.
    let Some(message) = peer.hear() else { return false };
    heard.commit |= message == Message::Commit;
    let answer = match message {
        Message::Ping { number } => Message::Pong { number },
        Message::Prepare(prepare) => Message::Prepared(Prepared {
            attempt: prepare.attempt,
            load_ns: 1,
            written: Vec::new(),
            damaged: Vec::new(),
        }),
        Message::Commit => Message::Resumed { resume_ns: 1 },
        Message::CloseChannel { channel } => Message::ChannelClosed { channel },
        _ => {
            // Pages land by themselves.
            for channel in &mut peer.data {
                let _ = std::io::Write::write_all(channel, &stream::encode_ack(1));
            }
            return true;
        }
    };
    peer.say(&answer.encode())
}
