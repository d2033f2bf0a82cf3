//! A destination, by real sockets, and a source that does whatever the input says: honest steps, messages at the wrong
//! time, changed ones, pages, bytes of no meaning, ends. The migration ends, in bounded memory, its machine comes back,
//! and a guest runs only if there was a commit.
#![no_main]

#[path = "../../../device-state/fuzz/src/allocator.rs"]
mod allocator;

use std::net::Shutdown;
use std::thread;

use allocator::bounded;
use libfuzzer_sys::fuzz_target;
use pageferry::protocol::{Hello, Message, MigrationKey, Prepare, Welcome};
use pageferry::testing::TestMemory;
use pageferry::transport::{OneLink, stream};
use pageferry::{Destination, GuestAtDestination};
use pageferry_tcp::preamble::Kind;
use pageferry_tcp::{GivenSockets, TcpOptions};
use pageferry_tcp_fuzz::guest::{Guest, PAGES, STATE};
use pageferry_tcp_fuzz::input::Input;
use pageferry_tcp_fuzz::peer::{CHANNELS, Peer, link, some_message};

/// What a destination may take, whatever a source does: a greeting, frames that wait, and what its threads need.
const MOST_BYTES: usize = 24 << 20;

fuzz_target!(|bytes: &[u8]| {
    let (peer, control, data) = link();
    let committed = bounded(MOST_BYTES + 64 * bytes.len(), || {
        thread::scope(|scope| {
            let destination = scope.spawn(move || serve(control, data));
            let committed = play(peer, Input::new(bytes));
            (destination.join().expect("no panic"), committed)
        })
    });
    let (end, committed) = committed;
    match end {
        Some(End::Runs) => assert!(committed, "nobody has committed"),
        Some(End::Not(guest)) => assert!(
            committed || guest != GuestAtDestination::Unresumed,
            "{guest:?}, and nobody has committed"
        ),
        None => {}
    }
});

enum End {
    Runs,
    Not(GuestAtDestination),
}

/// What becomes of it; `None` if no guest was offered.
fn serve(control: std::os::fd::OwnedFd, data: Vec<std::os::fd::OwnedFd>) -> Option<End> {
    let sockets = GivenSockets::new(control, data, TcpOptions::default()).expect("sockets");
    let link = sockets.destination().ok()?;
    let offer = Destination::new().negotiate(OneLink::destination(Box::new(link))).ok()?;
    let memory = TestMemory::new(&[PAGES]);
    Some(match offer.receive(Guest::default(), memory.memory()) {
        Ok(arrived) => {
            assert!(arrived.machine.runs || arrived.paused);
            End::Runs
        }
        Err(failure) => {
            assert!(!failure.machine.runs, "{:?}", failure.error);
            End::Not(failure.guest)
        }
    })
}

/// Does what the input says, and is gone. Whether it has committed.
fn play(mut peer: Peer, mut input: Input<'_>) -> bool {
    let memory = TestMemory::new(&[PAGES]);
    let layout = memory.memory().layout().clone();
    let hello = Hello::new(MigrationKey::of_a_test(), layout, CHANNELS, false, Vec::new());
    let (mut honest, mut welcome) = (0, None);
    let (mut tickets, mut committed) = ([0; CHANNELS as usize], false);
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let said = match input.byte() % 16 {
            // Most inputs should come far.
            0..=6 => {
                honest += 1;
                step(&mut peer, honest, &hello, &mut welcome, &mut committed)
            }
            7 | 8 => {
                let message = some_message(&mut input);
                committed |= message == Message::Commit;
                peer.say(&message.encode())
            }
            9 => {
                let mut frame = Message::Hello(hello.clone()).encode();
                input.mutate(&mut frame);
                peer.say(&frame)
            }
            10 => {
                let frame = input.bytes(64);
                committed |= Message::decode(frame) == Ok(Message::Commit);
                frame.is_empty() || peer.say(frame)
            }
            11 => std::io::Write::write_all(&mut peer.control, input.bytes(32)).is_ok(),
            12 | 13 => peer.send_batch(&mut input, &mut tickets),
            14 => {
                let (channel, mut record) =
                    (usize::from(input.byte()) % peer.data.len(), Vec::new());
                match input.byte() % 3 {
                    0 => stream::encode_end(&mut record),
                    1 => stream::encode_ack_request(&mut record),
                    _ => record.extend_from_slice(input.bytes(200)),
                }
                std::io::Write::write_all(&mut peer.data[channel], &record).is_ok()
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
    committed
}

/// What an honest source says next, having heard what it waits for.
fn step(
    peer: &mut Peer,
    number: u32,
    hello: &Hello,
    welcome: &mut Option<Welcome>,
    committed: &mut bool,
) -> bool {
    let (attempt, state_bytes) = (1, STATE.len() as u64);
    let message = match number {
        1 => return peer.open(Kind::Control),
        2 => Message::Hello(hello.clone()),
        3 => {
            let Some(Message::Welcome(heard)) = peer.hear() else { return false };
            welcome.insert(heard).agreed(hello)
        }
        4 => Message::Registered,
        5 => return peer.hear().is_some(),
        6..=7 => return peer.open(Kind::Data { channel: if number == 6 { 0 } else { 1 } }),
        8 => return peer.hear().is_some(),
        9 => Message::Round { round: 1, dirty_pages: PAGES },
        10 => Message::Switchover { attempt },
        11 => Message::StateChunk(STATE.to_vec()),
        12 => Message::Prepare(Prepare {
            attempt,
            state_bytes,
            paused: false,
            sums: Vec::new(),
            samples: Vec::new(),
        }),
        13 => return peer.hear().is_some(),
        14 => Message::Commit,
        15 => return peer.hear().is_some(),
        16 => Message::Heard,
        _ => return true,
    };
    *committed |= message == Message::Commit;
    peer.say(&message.encode())
}
