//! What every dirty source here refuses from its caller.

use pageferry::dirty::{DirtyBitmap, DirtyError, WORD_PAGES};
use pageferry::memory::Layout;
use thiserror::Error;

/// A dirty source was called in a way that its contract does not allow.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MisuseError {
    /// `start` while tracking.
    #[error("tracking was already started")]
    AlreadyStarted,
    /// Anything but `start` or `put_back` while not tracking.
    #[error("tracking was not started")]
    NotStarted,
    /// The bitmap was made for another memory map.
    #[error("the bitmap was made for another memory map")]
    OtherLayout,
    /// The words are not inside a region of the memory map.
    #[error("{words} words at page {first_page} of region {region} are not words of a region")]
    OutOfRange {
        /// Index of the region.
        region: u16,
        /// Page of the first word's first bit.
        first_page: u64,
        /// Number of words.
        words: usize,
    },
}

/// Wraps the cause of a failure for the engine.
pub(crate) fn dirty_error(
    source_name: &'static str,
    operation: &'static str,
    cause: impl std::error::Error + Send + Sync + 'static,
) -> DirtyError {
    DirtyError { source_name, operation, cause: Box::new(cause) }
}

/// Refuses a bitmap that was made for another memory map; its methods would panic later.
pub(crate) fn check_bitmap(layout: &Layout, bitmap: &DirtyBitmap) -> Result<(), MisuseError> {
    let regions = layout.regions();
    let same = bitmap.regions() == regions.len()
        && (0..).zip(regions).all(|(index, region)| bitmap.region_pages(index) == region.pages());
    if same { Ok(()) } else { Err(MisuseError::OtherLayout) }
}

/// Refuses words that are not inside a region.
pub(crate) fn check_words(
    layout: &Layout,
    region: u16,
    first_page: u64,
    words: &[u64],
) -> Result<(), MisuseError> {
    let end = first_page.checked_add(words.len() as u64 * WORD_PAGES);
    let fits = |pages: u64| end.is_some_and(|end| end <= pages.next_multiple_of(WORD_PAGES));
    let described = layout.regions().get(usize::from(region));
    if first_page.is_multiple_of(WORD_PAGES) && described.is_some_and(|r| fits(r.pages())) {
        Ok(())
    } else {
        Err(MisuseError::OutOfRange { region, first_page, words: words.len() })
    }
}
