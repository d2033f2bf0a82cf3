//! Not a test: what moving a gibibyte over the loopback costs.
//! `cargo test --release -p pageferry-tcp -- --ignored --nocapture measure`

use std::thread;
use std::time::Instant;

use pageferry::memory::PAGE_BYTES;
use pageferry_tcp::TcpOptions;

use crate::support::memory::{fill, guest_memory};
use crate::support::{Ends, Random, data, drain, pair, until_landed};

#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn measure_a_gibibyte_into_warm_memory() {
    const PAGES: u64 = (1 << 30) / PAGE_BYTES;
    const ROUNDS: u64 = 5;
    let mut random = Random::new(1);
    let (from, to) = (guest_memory(&[PAGES]), guest_memory(&[PAGES]));
    fill(&from, &mut random);
    fill(&to, &mut random);
    for (batch_pages, runs) in [(256_u32, 1_u32), (256, 64), (1024, 1)] {
        let mut link = pair(&TcpOptions::default());
        let Ends { mut senders, mut receivers } = link.open(&from, &to, 1);
        let (sender, receiver) = (&mut senders[0], &mut receivers[0]);
        let started = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| drain(&mut **receiver));
            let mut ticket = 0;
            for _ in 0..ROUNDS {
                for first_page in (0..PAGES).step_by(batch_pages as usize) {
                    let pages = batch_pages / runs;
                    let batch: Vec<_> = (0..runs)
                        .map(|run| data(0, first_page + u64::from(run * pages), pages))
                        .collect();
                    ticket = sender.send(&batch).unwrap();
                    sender.watermarks(None).unwrap();
                }
            }
            until_landed(&mut **sender, ticket);
            sender.finish().unwrap();
        });
        let seconds = started.elapsed().as_secs_f64();
        let (here, there) = (sender.counters(), receiver.counters());
        eprintln!(
            "batches of {} KiB in {runs} runs: {:.1} Gb/s, system calls a GiB: {} to send, {} to \
             receive; {} bytes beside the pages",
            batch_pages * 4,
            (ROUNDS << 33) as f64 / seconds / 1e9,
            here.system_calls / ROUNDS,
            there.system_calls / ROUNDS,
            here.wire_bytes - (ROUNDS << 30),
        );
    }
}
