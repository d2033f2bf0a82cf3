//! Guest memory by linear address (see [`crate::layout`]).

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{Layout, Page, Span};
use crate::ram::GuestRam;

/// Reads and writes of guest memory by linear address. Words are accessed atomically, so another
/// thread (or a virtual CPU) may write the same ones.
#[derive(Debug, Clone)]
pub(crate) struct LinearMemory {
    ram: GuestRam,
    spans: Vec<Span>,
}

impl LinearMemory {
    pub(crate) fn new(ram: &GuestRam, layout: &Layout) -> Self {
        Self { ram: ram.clone(), spans: layout.spans().to_vec() }
    }

    /// Guest physical address. One past the end of RAM stays out of RAM, so that the access fails.
    pub(crate) fn guest_address(&self, linear: u64) -> GuestAddress {
        let span = self.spans.iter().rev().find(|span| span.linear <= linear);
        GuestAddress(span.map_or(u64::MAX, |span| linear - span.linear + span.guest_address))
    }

    pub(crate) fn load_u8(&self, linear: u64) -> Result<u8, GuestMemoryError> {
        self.ram.memory().load(self.guest_address(linear), Ordering::Relaxed)
    }

    pub(crate) fn store_u8(&self, linear: u64, value: u8) -> Result<(), GuestMemoryError> {
        self.ram.memory().store(value, self.guest_address(linear), Ordering::Relaxed)
    }

    pub(crate) fn load_u64(&self, linear: u64) -> Result<u64, GuestMemoryError> {
        self.ram.memory().load(self.guest_address(linear), Ordering::Relaxed)
    }

    pub(crate) fn store_u64(&self, linear: u64, value: u64) -> Result<(), GuestMemoryError> {
        self.ram.memory().store(value, self.guest_address(linear), Ordering::Relaxed)
    }

    pub(crate) fn add_u64(&self, linear: u64, addend: u64) -> Result<(), GuestMemoryError> {
        self.store_u64(linear, self.load_u64(linear)?.wrapping_add(addend))
    }

    /// Copies a page out.
    pub(crate) fn read_page(&self, linear: u64, page: &mut Page) -> Result<(), GuestMemoryError> {
        self.ram.memory().read_slice(page, self.guest_address(linear))
    }

    /// Copies bytes in. They must not cross the hole; nothing below the working set does.
    pub(crate) fn write(&self, linear: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        self.ram.memory().write_slice(bytes, self.guest_address(linear))
    }
}
