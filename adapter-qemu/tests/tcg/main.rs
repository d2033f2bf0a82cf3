//! Linux guests of an unmodified QEMU, which check their own memory, moved while they write it.

mod guest;
mod library;
mod programs;
