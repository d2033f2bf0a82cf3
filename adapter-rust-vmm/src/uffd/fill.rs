//! Pages that are given to ranges where they are missing. None of these calls changes a page that is there
//! ([`Errno::EXIST`]), and each lets go on who waits for what it gives.

use std::ops::Range;
use std::os::fd::OwnedFd;

use linux_raw_sys::general::{
    uffdio_continue, uffdio_copy, uffdio_move, uffdio_range, uffdio_zeropage,
};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, Opcode, Setter, Updater, ioctl, opcode};

use super::to_kernel;

// Read, as for UFFDIO_UNREGISTER.
const UFFDIO_WAKE: Opcode = opcode::read::<uffdio_range>(0xaa, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<uffdio_copy>(0xaa, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<uffdio_zeropage>(0xaa, 0x04);
const UFFDIO_MOVE: Opcode = opcode::read_write::<uffdio_move>(0xaa, 0x05);
const UFFDIO_CONTINUE: Opcode = opcode::read_write::<uffdio_continue>(0xaa, 0x07);

/// Maps pages that the range's file has. Bytes that were done, fewer than asked for if something stopped it in the
/// middle; [`Errno::FAULT`] where the file has none.
pub(crate) fn map(uffd: &OwnedFd, range: &Range<u64>) -> Result<u64, Errno> {
    let mut call = uffdio_continue { range: to_kernel(range), mode: 0, mapped: 0 };
    // SAFETY: the opcode reads and writes a uffdio_continue.
    let result = run(uffd, unsafe { Updater::<UFFDIO_CONTINUE, _>::new(&mut call) });
    done(result, call.mapped, range)
}

/// Moves pages from `from` on. As [`map`]; [`Errno::NOENT`] where there is no page at `from`, [`Errno::BUSY`] where it
/// cannot be taken away.
///
/// # Safety
///
/// From `from` on there is memory that is only landed in: its pages read as zero afterwards.
pub(crate) unsafe fn take(uffd: &OwnedFd, range: &Range<u64>, from: u64) -> Result<u64, Errno> {
    let len = range.end - range.start;
    let mut call = uffdio_move { dst: range.start, src: from, len, mode: 0, move_: 0 };
    // SAFETY: the opcode reads and writes a uffdio_move.
    let result = run(uffd, unsafe { Updater::<UFFDIO_MOVE, _>::new(&mut call) });
    done(result, call.move_, range)
}

/// Copies from `from` on. As [`map`].
pub(crate) fn copy(uffd: &OwnedFd, range: &Range<u64>, from: u64) -> Result<u64, Errno> {
    let len = range.end - range.start;
    let mut call = uffdio_copy { dst: range.start, src: from, len, mode: 0, copy: 0 };
    // SAFETY: the opcode reads and writes a uffdio_copy.
    let result = run(uffd, unsafe { Updater::<UFFDIO_COPY, _>::new(&mut call) });
    done(result, call.copy, range)
}

/// Gives zero pages. As [`map`].
pub(crate) fn zero(uffd: &OwnedFd, range: &Range<u64>) -> Result<u64, Errno> {
    let mut call = uffdio_zeropage { range: to_kernel(range), mode: 0, zeropage: 0 };
    // SAFETY: the opcode reads and writes a uffdio_zeropage.
    let result = run(uffd, unsafe { Updater::<UFFDIO_ZEROPAGE, _>::new(&mut call) });
    done(result, call.zeropage, range)
}

/// Lets go on who waits in a range that has its pages.
pub(crate) fn wake(uffd: &OwnedFd, range: &Range<u64>) -> Result<(), Errno> {
    // SAFETY: the opcode reads a uffdio_range.
    run(uffd, unsafe { Setter::<UFFDIO_WAKE, _>::new(to_kernel(range)) })
}

fn run(uffd: &OwnedFd, call: impl Ioctl<Output = ()>) -> Result<(), Errno> {
    // SAFETY: a page is given only where there is none, so that no byte changes that anybody has read. What `take`
    // takes away, its caller has promised, is nobody else's.
    unsafe { ioctl(uffd, call) }
}

/// What a call has done, by its answer and the bytes that it says.
fn done(result: Result<(), Errno>, bytes: i64, range: &Range<u64>) -> Result<u64, Errno> {
    match result {
        Ok(()) => Ok(range.end - range.start),
        // In part, or not at all since a mapping of the process changed meanwhile or a page was busy.
        Err(Errno::AGAIN) => Ok(u64::try_from(bytes).unwrap_or(0)),
        Err(error) => Err(error),
    }
}
