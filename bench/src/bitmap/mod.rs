//! `bitmap`: what the engine does with dirty bitmaps, against reading them.

mod args;
mod measure;
mod pattern;
mod report;

use std::num::NonZero;
use std::thread;

use indicatif::HumanBytes;
use pageferry::dirty::DirtyBitmap;
use pageferry::memory::{Layout, PAGE_BYTES, RegionLayout};

pub(crate) use args::{BitmapArgs, EXAMPLES, METHOD};
use measure::Sampler;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_report::facts::available_bytes;
use pattern::Pattern;
use report::{Report, Row};

/// Bitmaps of a guest that exist at once: a tracker's, the engine's, and a ledger's two.
const BITMAPS: u64 = 4;

/// Measures, and prints the result.
pub(crate) fn run(args: &BitmapArgs) -> Result<Outcome, Failure> {
    check_room(&args.guest)?;
    let threads = if args.threads.is_empty() { doublings() } else { args.threads.clone() };
    let sampler = Sampler { samples: args.samples };
    let mut rows = Vec::new();
    for &guest_bytes in &args.guest {
        say!("a guest of {}", HumanBytes(guest_bytes));
        let layout = Layout::new(vec![RegionLayout {
            guest_addr: 0,
            len_bytes: guest_bytes,
            backing_page_bytes: PAGE_BYTES,
        }])?;
        let mut tracked = DirtyBitmap::new(&layout);
        let mut harvested = DirtyBitmap::all(&layout);
        for &dirty_share in &args.dirty {
            for &pattern in Pattern::of_share(dirty_share) {
                pattern.mark(&mut tracked, dirty_share);
                let dirty_pages = tracked.count();
                // The same for any number of threads: one does it.
                let harvest_ns = sampler.harvest(&mut harvested, &tracked);
                let count_ns = sampler.count(&tracked);
                let read_by_one_ns = sampler.read(&tracked, 1)?;
                for &threads in &threads {
                    rows.push(Row {
                        guest_bytes,
                        bitmap_bytes: guest_bytes / PAGE_BYTES / 8,
                        dirty_share,
                        pattern,
                        dirty_pages,
                        threads,
                        read_ns: sampler.read(&tracked, threads)?,
                        scan_ns: sampler.scan(&layout, &tracked, threads)?,
                        read_by_one_ns,
                        harvest_ns,
                        count_ns,
                    });
                }
            }
        }
    }
    Report::new(args.samples, rows).print(args.json)?;
    Ok(Outcome::Completed)
}

fn check_room(guests: &[u64]) -> Result<(), Failure> {
    let largest_bytes = guests.iter().max().map_or(0, |guest| guest / PAGE_BYTES / 8);
    let needed_bytes = largest_bytes * BITMAPS;
    match available_bytes() {
        Some(available_bytes) if available_bytes < needed_bytes => Err(format!(
            "failed to find room for {BITMAPS} bitmaps: they need {needed_bytes} bytes and \
             {available_bytes} are available; give a smaller --guest"
        )
        .into()),
        _ => Ok(()),
    }
}

/// 1, 2, 4 … up to the number of CPUs.
fn doublings() -> Vec<u16> {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let most = u16::try_from(cpus).unwrap_or(u16::MAX).min(pageferry::MAX_CHANNELS);
    std::iter::successors(Some(1_u16), |threads| threads.checked_mul(2))
        .take_while(|threads| *threads <= most)
        .collect()
}
