//! Registered memory.
#![expect(unsafe_code, reason = "libibverbs is a C library")]

use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use rdma_sys as sys;

use super::{ProtectionDomain, check, some};

/// Who keeps registered bytes mapped.
enum Keeper {
    #[expect(dead_code, reason = "held, not read")]
    Guest(Arc<GuestMemory>),
    #[expect(dead_code, reason = "held, and used by its address")]
    Own(memmap2::MmapMut),
}

/// Registered memory. Its keys die with it.
pub(crate) struct MemoryRegion {
    mr: NonNull<sys::ibv_mr>,
    address: u64,
    len_bytes: u64,
    _pd: Arc<ProtectionDomain>,
    /// After the registration: dropped, and so unmapped, later.
    keeper: Keeper,
}

// SAFETY: as for `Context`; the bytes are only touched through `MemoryRegion::bytes` of whoever
// owns them, or not at all.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

/// Who may do what with registered memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// This side's NIC reads it.
    Local,
    /// So does the other side, over queue pairs that let it.
    RemoteRead,
    /// This side's NIC also writes to it: receives.
    LocalWrite,
    /// The other side writes to it.
    RemoteWrite,
}

impl Access {
    fn flags(self) -> u32 {
        use sys::ibv_access_flags as flags;
        match self {
            Self::Local => 0,
            Self::RemoteRead => flags::IBV_ACCESS_REMOTE_READ.0,
            Self::LocalWrite => flags::IBV_ACCESS_LOCAL_WRITE.0,
            Self::RemoteWrite => flags::IBV_ACCESS_LOCAL_WRITE.0 | flags::IBV_ACCESS_REMOTE_WRITE.0,
        }
    }
}

impl MemoryRegion {
    /// Registers bytes of guest memory.
    pub(crate) fn of_guest(
        pd: &Arc<ProtectionDomain>,
        memory: &Arc<GuestMemory>,
        address: u64,
        len_bytes: u64,
        access: Access,
    ) -> io::Result<Self> {
        let mr = register(pd, address, len_bytes, access)?;
        let keeper = Keeper::Guest(Arc::clone(memory));
        Ok(Self { mr, address, len_bytes, _pd: Arc::clone(pd), keeper })
    }

    /// Allocates and registers bytes of this side's own.
    pub(crate) fn own(
        pd: &Arc<ProtectionDomain>,
        len_bytes: usize,
        access: Access,
    ) -> io::Result<Self> {
        let mut map = memmap2::MmapMut::map_anon(len_bytes)?;
        let address = map.as_mut_ptr().expose_provenance() as u64;
        let len_bytes = len_bytes as u64;
        let mr = register(pd, address, len_bytes, access)?;
        Ok(Self { mr, address, len_bytes, _pd: Arc::clone(pd), keeper: Keeper::Own(map) })
    }

    /// Where it begins; the same on the wire.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn local_key(&self) -> u32 {
        // SAFETY: it lives as long as `self`.
        unsafe { self.mr.as_ref() }.lkey
    }

    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: it lives as long as `self`.
        unsafe { self.mr.as_ref() }.rkey
    }

    /// Writes to this side's own memory.
    ///
    /// # Panics
    ///
    /// If the bytes do not fit in, or this is guest memory.
    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end as u64 <= self.len_bytes), "fits");
        assert!(matches!(self.keeper, Keeper::Own(_)), "our own memory");
        let to = ptr::with_exposed_provenance_mut::<u8>(usize_of(self.address) + offset);
        // SAFETY: the mapping is our own and as long, and what the caller knows to be on its way
        // to the NIC it does not write to; the NIC would only read it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Reads this side's own memory, after the NIC said that it wrote to it.
    ///
    /// # Panics
    ///
    /// If that many bytes are not there, or this is guest memory.
    pub(crate) fn take(&self, offset: usize, len_bytes: usize) -> Vec<u8> {
        let end = offset.checked_add(len_bytes);
        assert!(end.is_some_and(|end| end as u64 <= self.len_bytes), "lies within");
        assert!(matches!(self.keeper, Keeper::Own(_)), "our own memory");
        let mut bytes = vec![0; len_bytes];
        let from = ptr::with_exposed_provenance::<u8>(usize_of(self.address) + offset);
        // SAFETY: the mapping is our own and as long. The NIC writes to a receive buffer only while
        // it is posted, and it was taken off before this is called.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len_bytes) };
        bytes
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryRegion({:#x}, {})", self.address, self.len_bytes)
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: registered by `register`, and freed once. The bytes are still mapped.
        let code = unsafe { sys::ibv_dereg_mr(self.mr.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to free a memory region: {error}");
        }
    }
}

fn usize_of(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}

fn register(
    pd: &ProtectionDomain,
    address: u64,
    len_bytes: u64,
    access: Access,
) -> io::Result<NonNull<sys::ibv_mr>> {
    let address = ptr::with_exposed_provenance_mut(usize_of(address));
    let access = i32::try_from(access.flags()).unwrap_or(0);
    // SAFETY: the kernel checks the address, and pins what it finds there. What the NIC does with
    // it later is up to work requests, and those name spans of guest memory or of our own mapping.
    some(unsafe { sys::ibv_reg_mr(pd.pd.as_ptr(), address, usize_of(len_bytes), access) })
}
