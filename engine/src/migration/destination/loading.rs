//! Loading device state, and what that writes to guest memory.

use std::time::{Duration, Instant};

use crate::control::protocol::{MAX_DATA_RANGES, Prepared};
use crate::error::Error;
use crate::host::Guarded;
use crate::machine::{Machine, MachineOperation};
use crate::pages::dirty::{DirtyBitmap, runs};
use crate::pages::memory::{Layout, PageRange};

/// Ranges after which the rest of a region is one: far from the most that a message may have.
const MOST_RANGES: usize = MAX_DATA_RANGES / 4;

/// Loads what has arrived.
pub(super) fn load<M: Machine>(
    machine: &mut Guarded<M>,
    attempt: u32,
    state: &[u8],
    layout: &Layout,
) -> Result<Prepared, Error> {
    let began = Instant::now();
    machine.load(state)?;
    let load_ns = nanoseconds(began.elapsed());
    let written = in_order(&machine.written_by_load()?, layout)?;
    Ok(Prepared { attempt, load_ns, written, damaged: Vec::new() })
}

/// The same pages as the protocol has them, and more of them where there would be too many ranges.
fn in_order(ranges: &[PageRange], layout: &Layout) -> Result<Vec<PageRange>, Error> {
    if ranges.is_empty() {
        return Ok(Vec::new());
    }
    let mut pages = DirtyBitmap::new(layout);
    for range in ranges {
        let region = layout.regions().get(usize::from(range.region));
        let end = range.first_page.checked_add(u64::from(range.pages));
        let inside = end.filter(|end| region.is_some_and(|region| *end <= region.pages()));
        let Some(end) = inside else {
            let cause =
                format!("it says that it wrote {range:?}, which is outside of guest memory");
            return Err(Error::Machine { operation: MachineOperation::Load, cause: cause.into() });
        };
        (range.first_page..end).for_each(|page| pages.set(range.region, page));
    }
    let mut ordered = Vec::new();
    for (region, layout) in (0..).zip(layout.regions()) {
        let mut next = 0;
        for run in runs(pages.region_words(region)) {
            let end = if ordered.len() < MOST_RANGES { run.end } else { layout.pages() };
            ordered.extend(PageRange::of_run(region, run.start.max(next)..end));
            next = end;
        }
    }
    Ok(ordered)
}

pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pages::memory::{PAGE_BYTES, RegionLayout};

    fn layout(pages: &[u64]) -> Layout {
        let region = |(index, pages): (u64, &u64)| RegionLayout {
            guest_addr: index << 40,
            len_bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
        };
        Layout::new((0..).zip(pages).map(region).collect()).unwrap()
    }

    fn range(region: u16, first_page: u64, pages: u32) -> PageRange {
        PageRange { region, first_page, pages }
    }

    #[test]
    fn what_was_written_is_told_once_and_in_order() {
        let told = in_order(
            &[range(1, 7, 1), range(0, 60, 10), range(0, 3, 2), range(0, 64, 7), range(0, 9, 0)],
            &layout(&[100, 8]),
        );
        assert_eq!(told.unwrap(), [range(0, 3, 2), range(0, 60, 11), range(1, 7, 1)]);
        assert_eq!(in_order(&[], &layout(&[100])).unwrap(), []);
    }

    #[test]
    fn what_is_outside_of_guest_memory_is_refused() {
        for outside in [range(1, 0, 1), range(0, 100, 1), range(0, 99, 2), range(0, u64::MAX, 2)] {
            let refused = in_order(&[outside], &layout(&[100])).unwrap_err();
            assert!(refused.to_string().contains("load device state"), "{refused}");
        }
    }

    #[test]
    fn many_ranges_are_few_in_a_message() {
        let every_second: Vec<_> = (0..50_000).map(|page| range(0, page * 2, 1)).collect();
        let told = in_order(&every_second, &layout(&[100_001, 64])).unwrap();
        assert!(told.len() <= MAX_DATA_RANGES, "{}", told.len());
        let last = told.last().unwrap();
        assert_eq!(last.first_page + u64::from(last.pages), 100_001);
        let covered = |page| {
            told.iter().any(|range| {
                (range.first_page..range.first_page + u64::from(range.pages)).contains(&page)
            })
        };
        assert!(every_second.iter().all(|range| covered(range.first_page)));
    }
}
