//! Linux guests of an unmodified QEMU, which check their own memory, moved while they write it.

mod commands;
mod killed;
mod library;
mod preloaded;
mod programs;
mod slowed;
