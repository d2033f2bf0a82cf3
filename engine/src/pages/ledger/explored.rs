//! All interleavings of a driver, two senders and a guest, explored by loom: no word is used by
//! two threads at once, and the newest bytes win when a stripe changes hands.

use loom::sync::atomic::AtomicU32;
use loom::sync::mpsc::{Receiver, Sender, channel};
use loom::thread;

use super::*;
use crate::pages::memory::{PAGE_BYTES, RegionLayout};

const STRIPES: usize = 2;

/// A page of each stripe, by version. What is on its way is with its sender.
struct World {
    guest: [AtomicU32; STRIPES],
    dirty_log: [AtomicBool; STRIPES],
    there: [AtomicU32; STRIPES],
}

impl World {
    fn write(&self, page: usize, version: u32) {
        self.guest[page].store(version, Ordering::SeqCst);
        self.dirty_log[page].fetch_or(true, Ordering::SeqCst);
    }

    fn harvest(&self, into: &mut DirtyBitmap) {
        for page in 0..STRIPES {
            if self.dirty_log[page].load(Ordering::SeqCst) {
                into.set(0, page as u64 * 512);
            }
        }
    }

    /// All that is dirty from a stripe on, before any of it is read.
    fn rearm(&self, first_page: usize, share: &Share, words: &mut Vec<u64>) {
        share.look_ahead(u64::MAX, usize::MAX, words);
        for (stripe, words) in words.chunks(STRIPE_WORDS).enumerate() {
            if words.iter().any(|word| *word != 0) {
                self.dirty_log[first_page + stripe].fetch_and(false, Ordering::SeqCst);
            }
        }
    }
}

/// What the driver tells a sender, as [`crate::migration::sender::Command`].
enum Command {
    Round(Share),
    Settle,
    Finish,
}

fn send(world: &World, commands: &Receiver<Command>, done: &Sender<()>) {
    let mut on_its_way = Vec::new();
    let mut words = Vec::new();
    loop {
        match commands.recv().unwrap() {
            Command::Round(mut share) => {
                let mut armed = 0;
                while !share.is_asked_back()
                    && let Some((stripe, bits)) = share.next_dirty()
                {
                    let page = stripe.first_word / STRIPE_WORDS;
                    if page >= armed {
                        world.rearm(page, &share, &mut words);
                        armed = page + words.len() / STRIPE_WORDS;
                    }
                    on_its_way.push((page, world.guest[page].load(Ordering::SeqCst)));
                    share.mark_sent(&bits);
                    share.done();
                }
            }
            Command::Settle => land(world, &mut on_its_way),
            Command::Finish => return land(world, &mut on_its_way),
        }
        done.send(()).unwrap();
    }
}

/// In order, as on any channel.
fn land(world: &World, on_its_way: &mut Vec<(usize, u32)>) {
    for (page, version) in on_its_way.drain(..) {
        world.there[page].store(version, Ordering::SeqCst);
    }
}

/// Whether old bytes won in any interleaving; `settles` is whether the driver keeps to the rule
/// of the fence.
fn old_bytes_win(settles: bool) -> bool {
    let old_won = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = std::sync::Arc::clone(&old_won);
    let mut model = loom::model::Builder::new();
    // Deeper costs hours, and has found nothing.
    model.preemption_bound = Some(2);
    model.check(move || {
        let len_bytes = STRIPES as u64 * 512 * PAGE_BYTES;
        let region = RegionLayout { guest_addr: 0, len_bytes, backing_page_bytes: PAGE_BYTES };
        let layout = Layout::new(vec![region]).unwrap();
        let world = Arc::new(World {
            guest: [AtomicU32::new(1), AtomicU32::new(1)],
            dirty_log: [AtomicBool::new(false), AtomicBool::new(false)],
            there: [AtomicU32::new(0), AtomicU32::new(0)],
        });
        let (done, is_done) = channel();
        let senders: Vec<_> = (0..2)
            .map(|_| {
                let (give, commands) = channel();
                let (world, done) = (Arc::clone(&world), done.clone());
                (give, thread::spawn(move || send(&world, &commands, &done)))
            })
            .collect();
        let round = |ledger: Ledger, weights: &[u32], ask_back: bool, version: u32| {
            let (loan, shares) =
                ledger.lend(&Partition::weighted(&layout, weights, &DirtyBitmap::new(&layout)));
            for ((give, _), share) in senders.iter().zip(shares) {
                give.send(Command::Round(share)).unwrap();
            }
            // The guest writes while the senders read.
            world.write(0, version);
            if ask_back {
                loan.ask_back();
            }
            senders.iter().for_each(|_| is_done.recv().unwrap());
            if ask_back && settles {
                for (give, _) in &senders {
                    give.send(Command::Settle).unwrap();
                }
                senders.iter().for_each(|_| is_done.recv().unwrap());
            }
            let mut ledger = loan.take_back().expect("all shares were dropped");
            world.harvest(&mut ledger.dirty);
            ledger
        };
        // The first epoch is fenced; in the second the stripes have changed hands.
        let ledger = round(Ledger::new(&layout), &[1, 1], true, 2);
        let ledger = round(ledger, &[0, 1], false, 3);
        // The guest is paused; what is dirty is sent, and all lands.
        let (loan, shares) =
            ledger.lend(&Partition::weighted(&layout, &[0, 1], &DirtyBitmap::new(&layout)));
        for ((give, _), share) in senders.iter().zip(shares) {
            give.send(Command::Round(share)).unwrap();
        }
        for (give, _) in &senders {
            give.send(Command::Finish).unwrap();
        }
        for (_, thread) in senders {
            thread.join().unwrap();
        }
        assert!(loan.take_back().unwrap().dirty.is_empty());
        for page in 0..STRIPES {
            let newest = world.guest[page].load(Ordering::SeqCst);
            if world.there[page].load(Ordering::SeqCst) != newest {
                seen.store(true, Ordering::SeqCst);
            }
        }
    });
    old_won.load(Ordering::SeqCst)
}

#[test]
fn the_newest_bytes_win_across_a_fence() {
    assert!(!old_bytes_win(true));
}

/// The exploration sees it when senders do not wait for what they have sent.
#[test]
fn without_the_wait_old_bytes_win() {
    assert!(old_bytes_win(false));
}
