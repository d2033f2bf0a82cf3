//! Which pages another process has touched.

use pageferry::dirty::{DirtyBitmap, runs};
use pageferry::memory::{GuestMemory, PageRange};

use super::entries::{Entries, PRESENT_OR_SWAPPED};
use super::error::ForeignError;
use super::process::ForeignProcess;
use crate::pagemap::present;

impl ForeignProcess {
    /// Pages of guest memory that are in the process's page tables: all that it has written since it mapped them, those
    /// that it has read, and some beside them. In order, none twice.
    ///
    /// It takes what reading /proc/PID/pagemap takes: the same user, or CAP_SYS_PTRACE. Before Linux 6.7 eight bytes are
    /// read for each page of guest memory; since then it costs by the pages found.
    pub fn touched(&self, memory: &GuestMemory) -> Result<Vec<PageRange>, ForeignError> {
        let (mapped, pagemap) = (self.mapped(memory)?, self.pagemap()?);
        let mut found = DirtyBitmap::new(memory.layout());
        let read = match present(&pagemap, &mapped, &mut found) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                let mut entries = Entries::of(pagemap);
                mapped
                    .iter()
                    .try_for_each(|part| entries.with(PRESENT_OR_SWAPPED, part, &mut found))
            }
            scanned => scanned,
        };
        read.map_err(|cause| self.not_permitted_or(cause, "read the page map"))?;
        self.check_alive()?;
        let mut ranges = Vec::new();
        for region in 0..u16::try_from(found.regions()).unwrap_or(u16::MAX) {
            for run in runs(found.region_words(region)) {
                ranges.extend(PageRange::of_run(region, run));
            }
        }
        Ok(ranges)
    }
}
