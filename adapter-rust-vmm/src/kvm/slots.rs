//! KVM's memory slots, laid over the engine's memory map.

use std::ops::Range;

use kvm_bindings::kvm_userspace_memory_region;
use pageferry::memory::{GuestMemory, PAGE_BYTES};
use thiserror::Error;

/// Most pages KVM takes in one slot (KVM_MEM_MAX_NR_PAGES in the kernel's kvm_host.h), so page
/// counts of slots fit the 32 bits that KVM_CLEAR_DIRTY_LOG has for them.
const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// A memory slot as the VMM gave it to KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmSlot {
    /// Number of the slot; the upper 16 bits are the address space (1 is x86's SMM).
    pub slot: u32,
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Where this process has it mapped.
    pub host_addr: u64,
    /// Flags the slot has when nobody migrates (`KVM_MEM_READONLY`, …). A slot that always has
    /// `KVM_MEM_LOG_DIRTY_PAGES` keeps it afterwards.
    pub flags: u32,
}

impl From<kvm_userspace_memory_region> for KvmSlot {
    fn from(region: kvm_userspace_memory_region) -> Self {
        Self {
            slot: region.slot,
            guest_addr: region.guest_phys_addr,
            len_bytes: region.memory_size,
            host_addr: region.userspace_addr,
            flags: region.flags,
        }
    }
}

impl KvmSlot {
    /// A slot for each region of guest memory, numbered from 0 in the memory map's order,
    /// without flags: what most VMMs without memory hotplug have.
    pub fn of_regions(memory: &GuestMemory) -> Vec<Self> {
        let slot = |(slot, region): (u32, &pageferry::memory::RawRegion)| Self {
            slot,
            guest_addr: region.layout.guest_addr,
            len_bytes: region.layout.len_bytes,
            host_addr: region.host_addr.addr() as u64,
            flags: 0,
        };
        (0..).zip(memory.regions()).map(slot).collect()
    }

    fn address_space(&self) -> u32 {
        self.slot >> 16
    }
}

/// Why slots do not fit the memory map.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotError {
    /// No slot at all.
    #[error("no memory slot was given")]
    NoSlot,
    /// Address or length is not made of whole pages, or the length is zero or more than KVM takes.
    #[error(
        "slot {slot:#x} at guest address {guest_addr:#x}, {len_bytes} bytes, is not a sensible run \
         of whole pages"
    )]
    BadSlot {
        /// Number of the slot.
        slot: u32,
        /// Its guest physical address.
        guest_addr: u64,
        /// Its length in bytes.
        len_bytes: u64,
    },
    /// The slot is not inside one region of the memory map.
    #[error(
        "slot {slot:#x} at guest address {guest_addr:#x}, {len_bytes} bytes, is not inside one \
         region of guest memory"
    )]
    OutsideLayout {
        /// Number of the slot.
        slot: u32,
        /// Its guest physical address.
        guest_addr: u64,
        /// Its length in bytes.
        len_bytes: u64,
    },
    /// The slot's host address is not where guest memory has these pages.
    #[error("slot {slot:#x} has host address {host_addr:#x}, but guest memory has {expected:#x}")]
    OtherHostAddress {
        /// Number of the slot.
        slot: u32,
        /// The slot's host address.
        host_addr: u64,
        /// Where guest memory has it.
        expected: u64,
    },
    /// A slot number was given twice.
    #[error("slot {slot:#x} was given twice")]
    Duplicate {
        /// Number of the slot.
        slot: u32,
    },
    /// Two slots of one address space overlap, which KVM does not allow.
    #[error("slots {slot:#x} and {other_slot:#x} overlap")]
    Overlap {
        /// Number of one slot.
        slot: u32,
        /// Number of the other.
        other_slot: u32,
    },
}

/// A slot and where it lies in the engine's memory map.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlacedSlot {
    pub(super) kvm: KvmSlot,
    /// Index of the region that holds it.
    pub(super) region: u16,
    /// Its first page, counted from the region's start.
    pub(super) first_page: u64,
    pub(super) pages: u32,
}

impl PlacedSlot {
    /// The part of a range of region pages that the slot holds.
    pub(super) fn overlap(&self, first_page: u64, end_page: u64) -> Option<Range<u64>> {
        let start = first_page.max(self.first_page);
        let end = end_page.min(self.first_page + u64::from(self.pages));
        (start < end).then_some(start..end)
    }
}

/// The slots by region.
#[derive(Debug)]
pub(super) struct PlacedSlots {
    /// Sorted by region.
    slots: Vec<PlacedSlot>,
    /// For each region, its slots.
    by_region: Vec<Range<usize>>,
}

impl PlacedSlots {
    pub(super) fn new(memory: &GuestMemory, slots: &[KvmSlot]) -> Result<Self, SlotError> {
        if slots.is_empty() {
            return Err(SlotError::NoSlot);
        }
        refuse_overlap(slots)?;
        let mut placed =
            slots.iter().map(|slot| place(memory, *slot)).collect::<Result<Vec<_>, _>>()?;
        placed.sort_by_key(|slot| (slot.region, slot.first_page));
        let region_slots = |region| {
            placed.partition_point(|slot| slot.region < region)
                ..placed.partition_point(|slot| slot.region <= region)
        };
        let by_region = (0..).zip(memory.regions()).map(|(index, _)| region_slots(index)).collect();
        Ok(Self { slots: placed, by_region })
    }

    pub(super) fn all(&self) -> &[PlacedSlot] {
        &self.slots
    }

    pub(super) fn of_region(&self, region: u16) -> &[PlacedSlot] {
        self.by_region.get(usize::from(region)).map_or(&[], |range| &self.slots[range.clone()])
    }
}

fn refuse_overlap(slots: &[KvmSlot]) -> Result<(), SlotError> {
    let mut sorted: Vec<_> = slots.iter().collect();
    sorted.sort_by_key(|slot| slot.slot);
    if let Some((a, _)) = neighbours(&sorted).find(|(a, b)| a.slot == b.slot) {
        return Err(SlotError::Duplicate { slot: a.slot });
    }
    // Slots of different address spaces show the same memory to a CPU in another mode.
    sorted.sort_by_key(|slot| (slot.address_space(), slot.guest_addr));
    let overlap = neighbours(&sorted).find(|(a, b)| {
        a.address_space() == b.address_space() && b.guest_addr - a.guest_addr < a.len_bytes
    });
    match overlap {
        Some((a, b)) => Err(SlotError::Overlap { slot: a.slot, other_slot: b.slot }),
        None => Ok(()),
    }
}

fn neighbours<'s>(slots: &'s [&KvmSlot]) -> impl Iterator<Item = (&'s KvmSlot, &'s KvmSlot)> {
    slots.iter().zip(slots.iter().skip(1)).map(|(a, b)| (*a, *b))
}

fn place(memory: &GuestMemory, kvm: KvmSlot) -> Result<PlacedSlot, SlotError> {
    let KvmSlot { slot, guest_addr, len_bytes, host_addr, .. } = kvm;
    let pages = len_bytes / PAGE_BYTES;
    let whole_pages = guest_addr.is_multiple_of(PAGE_BYTES) && len_bytes.is_multiple_of(PAGE_BYTES);
    let pages = u32::try_from(pages).ok().filter(|_| whole_pages && pages <= MAX_SLOT_PAGES);
    let Some(pages) = pages.filter(|pages| *pages > 0) else {
        return Err(SlotError::BadSlot { slot, guest_addr, len_bytes });
    };
    let holder = (0..).zip(memory.regions()).find_map(|(index, region)| {
        let offset = guest_addr.checked_sub(region.layout.guest_addr)?;
        let fits = offset.checked_add(len_bytes)? <= region.layout.len_bytes;
        fits.then(|| (index, offset, region.host_addr.addr() as u64 + offset))
    });
    let Some((region, offset, expected)) = holder else {
        return Err(SlotError::OutsideLayout { slot, guest_addr, len_bytes });
    };
    if host_addr != expected {
        return Err(SlotError::OtherHostAddress { slot, host_addr, expected });
    }
    Ok(PlacedSlot { kvm, region, first_page: offset / PAGE_BYTES, pages })
}
