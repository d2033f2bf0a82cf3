//! The guest's memory layout, shared by the guest code, the process guest and the oracles.
//!
//! ```text
//! 0x00_1000  code
//! 0x00_2000  GDT
//! 0x00_3000  parameter block, boot message
//! 0x00_4000  one page (slot) per virtual CPU
//! 0x08_0000  IDT
//! 0x08_1000  what is done on an exception
//! 0x10_0000  page tables
//! 0x20_0000  working set, one contiguous slice per virtual CPU
//! ```
//!
//! Addresses here are *linear*: offsets into RAM with the hole below 4 GiB taken out. The guest's
//! page tables map them so, hence below the hole linear, virtual and physical addresses agree and
//! a working set across the hole is still contiguous.

/// Pages the workloads write, and oracles count.
pub const PAGE_BYTES: u64 = 4096;
/// A page's contents.
pub(crate) type Page = [u8; 4096];
const _: () = assert!(size_of::<Page>() as u64 == PAGE_BYTES);
/// Guest code.
pub(crate) const CODE: u64 = 0x1000;
/// Room for it.
pub(crate) const CODE_MAX_BYTES: u64 = 0x1000;
/// Global descriptor table.
pub(crate) const GDT: u64 = 0x2000;
/// Parameter block: what was booted, for the oracle to compare with what it expects.
pub(crate) const PARAMETERS: u64 = 0x3000;
/// The time stamp counter as any virtual CPU read it last (u64), behind the parameters.
pub(crate) const CLOCK: u64 = PARAMETERS + 0x400;
/// The same at the first beat (u64).
pub(crate) const CLOCK_BEGAN: u64 = PARAMETERS + 0x408;
/// Zero-terminated line the guest prints at boot.
pub(crate) const BANNER: u64 = 0x3800;
/// Room for it with its terminator.
pub(crate) const BANNER_MAX_BYTES: u64 = 0x800;
const SLOTS: u64 = 0x4000;
const SLOT_BYTES: u64 = PAGE_BYTES;
/// Interrupt descriptor table: a page.
pub(crate) const IDT: u64 = 0x8_0000;
/// What the guest does on an exception.
pub(crate) const EXCEPTION_CODE: u64 = 0x8_1000;
/// Room for it.
pub(crate) const EXCEPTION_CODE_MAX_BYTES: u64 = 0x2000;
/// Page tables.
pub(crate) const PAGE_TABLES: u64 = 0x10_0000;
/// Where the working set starts.
pub const WORKING_SET: u64 = 0x20_0000;
/// Size of the guest's page table mappings, and so the granularity of its regions.
pub(crate) const MAPPING_BYTES: u64 = 2 << 20;

/// Most virtual CPUs: their slots lie below the page tables.
pub const MAX_VCPUS: u8 = 64;
/// Most memory: one page directory per GiB, after PML4 and PDPT, below the working set.
pub const MAX_MEMORY_BYTES: u64 = (((WORKING_SET - PAGE_TABLES) / PAGE_BYTES) - 2) << 30;

const _: () = assert!(SLOTS + MAX_VCPUS as u64 * SLOT_BYTES <= IDT);
const _: () = assert!(EXCEPTION_CODE + EXCEPTION_CODE_MAX_BYTES <= PAGE_TABLES);

/// Offsets in a virtual CPU's slot.
pub(crate) mod slot {
    /// Pages written (u64).
    pub(crate) const WRITES: u64 = 0;
    /// Beats, counted in a register and stored (u64).
    pub(crate) const BEATS_REGISTER: u64 = 8;
    /// Beats, counted in memory (u64), one ahead while a beat is being stored.
    pub(crate) const BEATS_MEMORY: u64 = 16;
    /// A register that must never change (u64).
    pub(crate) const CANARY: u64 = 24;
    /// How often the time stamp counter was less than any virtual CPU had read it before (u64).
    pub(crate) const CLOCK_WENT_BACK: u64 = 32;
    /// XMM0 to XMM15.
    pub(crate) const XMM: u64 = 256;
    /// Its task state, which says where the stack for exceptions ends: with the slot.
    pub(crate) const TASK_STATE: u64 = 0xc00;
}

/// Where in its slot a virtual CPU of the `fpu` workload stores its registers, and offsets there.
pub(crate) mod checkpoint {
    /// It stores to each in turn.
    pub(crate) const BASES: [u64; 2] = [0x400, 0x800];
    /// What turns the address of one into that of the other.
    pub(crate) const TOGGLE: u64 = BASES[0] ^ BASES[1];
    /// Steps done (u64), stored before the registers.
    pub(crate) const STEPS: u64 = 0;
    /// The same, stored after them.
    pub(crate) const STEPS_AGAIN: u64 = 8;
    /// YMM0 to YMM15, then ST0 to ST7 as doubles.
    pub(crate) const REGISTERS: u64 = 64;
}

/// Where a page has its counter; a workload writes nothing else of a page.
pub(crate) const PAGE_COUNTER: u64 = 0;
/// Where a page carries its identity, so that one that landed in another's place is noticed.
pub(crate) const PAGE_TAG: u64 = PAGE_BYTES - 8;

/// Why a guest can't be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No virtual CPU, or too many.
    #[error("failed to lay out the guest: {vcpus} virtual CPUs, it may have 1 to {MAX_VCPUS}")]
    Vcpus {
        /// Asked for.
        vcpus: u8,
    },
    /// The regions are not what the guest's page tables can map.
    #[error(
        "failed to lay out the guest: memory must start at 0 and its regions must start, and all \
         but the last end, at multiples of 2 MiB; region at {guest_address:#x} of {len_bytes} \
         bytes does not"
    )]
    Region {
        /// Guest physical address of the region.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// More memory than the page tables below the working set can map.
    #[error(
        "failed to lay out the guest: {memory_bytes} bytes of memory, it may have \
         {MAX_MEMORY_BYTES}"
    )]
    TooMuchMemory {
        /// Asked for.
        memory_bytes: u64,
    },
    /// Less memory than code, page tables and working set need.
    #[error(
        "failed to lay out the guest: a working set of {working_set_bytes} bytes needs \
         {needed_bytes} bytes of memory, the guest has {memory_bytes}"
    )]
    WorkingSetDoesNotFit {
        /// Asked for.
        working_set_bytes: u64,
        /// Memory it would take.
        needed_bytes: u64,
        /// Memory there is.
        memory_bytes: u64,
    },
    /// A virtual CPU would have no page.
    #[error(
        "failed to lay out the guest: a working set of {working_set_bytes} bytes has less than \
         one page for each of {vcpus} virtual CPUs"
    )]
    WorkingSetTooSmall {
        /// Asked for.
        working_set_bytes: u64,
        /// Asked for.
        vcpus: u8,
    },
}

/// A region of RAM in linear order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) linear: u64,
    pub(crate) guest_address: u64,
    pub(crate) len_bytes: u64,
}

/// A virtual CPU's part of the working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) linear: u64,
    pub(crate) pages: u64,
    /// Number of its first page within the working set.
    pub(crate) first_page: u64,
}

/// The layout of one guest.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    spans: Vec<Span>,
    vcpus: u8,
    working_set_pages: u64,
}

impl Layout {
    /// Checks that code, tables and working set fit the regions.
    pub(crate) fn new(
        regions: &[(u64, u64)],
        vcpus: u8,
        working_set_bytes: u64,
    ) -> Result<Self, LayoutError> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(LayoutError::Vcpus { vcpus });
        }
        let mut spans = Vec::with_capacity(regions.len());
        let mut linear = 0u64;
        for (index, &(guest_address, len_bytes)) in regions.iter().enumerate() {
            let is_first = index == 0;
            let is_last = index + 1 == regions.len();
            let starts_well =
                guest_address.is_multiple_of(MAPPING_BYTES) && (guest_address == 0 || !is_first);
            let ends_well = is_last || len_bytes.is_multiple_of(MAPPING_BYTES);
            if !starts_well || !ends_well {
                return Err(LayoutError::Region { guest_address, len_bytes });
            }
            spans.push(Span { linear, guest_address, len_bytes });
            linear = linear.saturating_add(len_bytes);
        }
        let memory_bytes = linear;
        if memory_bytes > MAX_MEMORY_BYTES {
            return Err(LayoutError::TooMuchMemory { memory_bytes });
        }
        let needed_bytes = WORKING_SET.saturating_add(working_set_bytes);
        if needed_bytes > memory_bytes {
            return Err(LayoutError::WorkingSetDoesNotFit {
                working_set_bytes,
                needed_bytes,
                memory_bytes,
            });
        }
        let working_set_pages = working_set_bytes / PAGE_BYTES;
        if working_set_pages < u64::from(vcpus) {
            return Err(LayoutError::WorkingSetTooSmall { working_set_bytes, vcpus });
        }
        Ok(Self { spans, vcpus, working_set_pages })
    }

    pub(crate) fn spans(&self) -> &[Span] {
        &self.spans
    }

    pub(crate) fn vcpus(&self) -> u8 {
        self.vcpus
    }

    pub(crate) fn working_set_pages(&self) -> u64 {
        self.working_set_pages
    }

    /// The part of the working set that belongs to a virtual CPU.
    pub(crate) fn slice(&self, vcpu: u8) -> Slice {
        let vcpus = u64::from(self.vcpus);
        // At most MAX_MEMORY_BYTES / PAGE_BYTES times MAX_VCPUS: no overflow.
        let first_page = u64::from(vcpu) * self.working_set_pages / vcpus;
        let end_page = (u64::from(vcpu) + 1) * self.working_set_pages / vcpus;
        let linear = WORKING_SET + first_page * PAGE_BYTES;
        Slice { linear, pages: end_page - first_page, first_page }
    }

    /// Linear address of a virtual CPU's slot.
    pub(crate) fn slot(vcpu: u8) -> u64 {
        SLOTS + u64::from(vcpu) * SLOT_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn slices_cover_the_working_set_without_overlap() {
        for (vcpus, pages) in [(1, 1), (3, 7), (64, 64), (7, 1000)] {
            let layout = Layout::new(&[(0, 64 * MIB)], vcpus, pages * PAGE_BYTES).unwrap();
            let mut next = WORKING_SET;
            for vcpu in 0..vcpus {
                let slice = layout.slice(vcpu);
                assert_eq!(slice.linear, next);
                assert!(slice.pages > 0);
                next += slice.pages * PAGE_BYTES;
            }
            assert_eq!(next, WORKING_SET + pages * PAGE_BYTES);
        }
    }

    #[test]
    fn what_does_not_fit_is_a_typed_error() {
        let layout = |regions: &[(u64, u64)], vcpus, working_set| {
            Layout::new(regions, vcpus, working_set).unwrap_err()
        };
        assert_eq!(layout(&[(0, 8 * MIB)], 0, MIB), LayoutError::Vcpus { vcpus: 0 });
        assert!(matches!(layout(&[(0, 8 * MIB)], 65, MIB), LayoutError::Vcpus { .. }));
        assert_eq!(
            layout(&[(0, 8 * MIB)], 1, 7 * MIB),
            LayoutError::WorkingSetDoesNotFit {
                working_set_bytes: 7 * MIB,
                needed_bytes: 9 * MIB,
                memory_bytes: 8 * MIB
            }
        );
        assert!(matches!(layout(&[], 1, MIB), LayoutError::WorkingSetDoesNotFit { .. }));
        assert!(matches!(
            layout(&[(0, MIB)], 1, u64::MAX),
            LayoutError::WorkingSetDoesNotFit { .. }
        ));
        assert!(matches!(layout(&[(0, 8 * MIB)], 2, 4096), LayoutError::WorkingSetTooSmall { .. }));
        assert!(matches!(layout(&[(MIB, 8 * MIB)], 1, MIB), LayoutError::Region { .. }));
        assert!(matches!(
            layout(&[(0, 3 * MIB), (8 * MIB, MIB)], 1, MIB),
            LayoutError::Region { .. }
        ));
        assert!(matches!(layout(&[(0, 1 << 50)], 1, MIB), LayoutError::TooMuchMemory { .. }));
    }
}
