//! What is shared between threads without a lock, by loom's types when loom explores it:
//! `RUSTFLAGS="--cfg loom" cargo test -p pageferry --release --lib explored`, as `ci/test loom` does.
#![cfg_attr(not(loom), expect(unsafe_code, reason = "a boxed slice is taken for one of cells"))]

#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell;
#[cfg(loom)]
pub(crate) use loom::sync::Arc;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::Arc;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, Ordering};

/// The standard library's cell, used the way loom's is.
#[cfg(not(loom))]
#[derive(Debug, Default)]
#[repr(transparent)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    /// Gives a pointer for reading; following it is up to `look`.
    #[inline]
    pub(crate) fn with<R>(&self, look: impl FnOnce(*const T) -> R) -> R {
        look(self.0.get())
    }

    /// Gives a pointer for writing; following it is up to `change`.
    #[inline]
    pub(crate) fn with_mut<R>(&self, change: impl FnOnce(*mut T) -> R) -> R {
        change(self.0.get())
    }
}

/// Takes values for cells, where they are: a bitmap may have gigabytes.
#[cfg(not(loom))]
pub(crate) fn into_cells<T>(values: Box<[T]>) -> Box<[UnsafeCell<T>]> {
    let values = Box::into_raw(values) as *mut [UnsafeCell<T>];
    // SAFETY: just taken out of its box, and a cell is transparent over its value, as is the
    // standard library's.
    unsafe { Box::from_raw(values) }
}

/// The way back.
#[cfg(not(loom))]
pub(crate) fn into_values<T>(cells: Box<[UnsafeCell<T>]>) -> Box<[T]> {
    let cells = Box::into_raw(cells) as *mut [T];
    // SAFETY: as in `into_cells`; the box was ours alone, so nobody holds a pointer into it.
    unsafe { Box::from_raw(cells) }
}

#[cfg(loom)]
pub(crate) fn into_cells<T>(values: Box<[T]>) -> Box<[UnsafeCell<T>]> {
    values.into_iter().map(UnsafeCell::new).collect()
}

#[cfg(loom)]
pub(crate) fn into_values<T>(cells: Box<[UnsafeCell<T>]>) -> Box<[T]> {
    cells.into_iter().map(UnsafeCell::into_inner).collect()
}
