//! Both ends of TLS, and what comes before it is done: a peer that has no key says anything. It gets no link and costs
//! little.
#![no_main]

#[path = "../../../device-state/fuzz/src/allocator.rs"]
mod allocator;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use allocator::bounded;
use libfuzzer_sys::fuzz_target;
use pageferry_tcp::testing::shared_key;
use pageferry_tcp::{GivenSockets, KernelTls};
use pageferry_tcp_fuzz::peer::link;

const MOST_BYTES: usize = 2 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let is_source = first % 2 == 0;
    let (mut peer, control, data) = link();
    bounded(MOST_BYTES + 64 * bytes.len(), || {
        thread::scope(|scope| {
            let side = scope.spawn(move || {
                let options = shared_key(KernelTls::Off);
                let sockets = GivenSockets::new(control, data, options).expect("sockets");
                let failed = |result: Result<(), _>| assert!(result.is_err(), "it has no key");
                if is_source {
                    failed(sockets.source().map(drop));
                } else {
                    failed(sockets.destination().map(drop));
                }
            });
            // In pieces, whose ends fall anywhere.
            for piece in bytes.chunks(1 + usize::from(*first) * 4) {
                if peer.control.write_all(piece).is_err() {
                    break;
                }
            }
            let _ = peer.control.shutdown(Shutdown::Write);
            let _ = peer.control.read_to_end(&mut Vec::new());
            drop(peer);
            side.join().expect("no panic");
        });
    });
});
