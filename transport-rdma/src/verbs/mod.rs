//! The verbs this transport needs, as values that clean up after themselves.
//!
//! Queue pairs and completion queues are the basic ones: the extended ones of rxe's user library
//! before rdma-core 64 get inline data and scatter lists wrong.
#![expect(unsafe_code, reason = "libibverbs is a C library")]

mod memory_region;
mod queues;
mod watch;

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rdma_sys as sys;

pub(crate) use memory_region::{Access, MemoryRegion};
pub(crate) use queues::{Chain, Completion, QueuePair, Request, Span, Verb};
pub(crate) use watch::Watch;

/// The library that is missing, if one is. The bindings load them when the program starts.
pub(crate) fn missing_library() -> Option<&'static str> {
    [(c"libibverbs.so.1", "libibverbs.so.1"), (c"librdmacm.so.1", "librdmacm.so.1")]
        .into_iter()
        // SAFETY: both may be loaded at any time, and stay.
        .find(|(name, _)| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) }.is_null())
        .map(|(_, name)| name)
}

/// What a device and its port can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_mr_bytes: u64,
    pub(crate) max_mr_count: u64,
    pub(crate) max_message_bytes: u64,
    pub(crate) max_queue_depth: u32,
    pub(crate) max_completions: u32,
    /// Reads under way at once on a queue pair, each way.
    pub(crate) max_reads: u8,
    /// Of the port that was asked about, as the wire has it.
    pub(crate) active_mtu_bytes: u32,
}

/// Names of the devices there are.
pub(crate) fn device_names() -> io::Result<Vec<String>> {
    let mut count = 0;
    // SAFETY: the count is a place to write to. The list is freed below.
    let list = unsafe { sys::ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the list has `count` entries, and nobody else has it.
    let devices = unsafe { std::slice::from_raw_parts(list, usize::try_from(count).unwrap_or(0)) };
    let names = devices.iter().map(|device| device_name(*device)).collect();
    // SAFETY: the list is from `ibv_get_device_list`, and nothing of it is used from here on.
    unsafe { sys::ibv_free_device_list(list) };
    Ok(names)
}

fn device_name(device: *mut sys::ibv_device) -> String {
    // SAFETY: a device of a list, or of a context, that is still there.
    let name = unsafe { sys::ibv_get_device_name(device) };
    if name.is_null() {
        return String::from("?");
    }
    // SAFETY: a name is a string that ends with 0 and lives as long as the device.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// A device as rdma_cm opened it. rdma_cm keeps it open until the process ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Context(NonNull<sys::ibv_context>);

// SAFETY: libibverbs may be called from any thread ("Thread safety" in its manual pages).
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(crate) fn new(context: *mut sys::ibv_context) -> Option<Self> {
        NonNull::new(context).map(Self)
    }

    pub(crate) fn name(self) -> String {
        // SAFETY: rdma_cm never closes a context.
        let device = unsafe { self.0.as_ref() }.device;
        device_name(device)
    }

    /// iWARP has none.
    pub(crate) fn has_write_with_immediate(self) -> bool {
        !self.is_iwarp()
    }

    pub(crate) fn is_iwarp(self) -> bool {
        // SAFETY: rdma_cm never closes a context.
        let device = unsafe { self.0.as_ref() }.device;
        // SAFETY: the device of an open context is there.
        let transport = unsafe { (*device).transport_type };
        transport == sys::ibv_transport_type::IBV_TRANSPORT_IWARP
    }

    fn port(self, port: u8) -> io::Result<sys::ibv_port_attr> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut attr: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, the attributes are a place to write to.
        check(unsafe { sys::ibv_query_port(self.0.as_ptr(), port, &raw mut attr) })?;
        Ok(attr)
    }

    /// The address that a GID of a port stands for; `None` for one that is none, as on InfiniBand.
    pub(crate) fn gid_address(self, port: u8, index: u8) -> io::Result<Option<IpAddr>> {
        // SAFETY: bytes, for which zero is a value.
        let mut gid: sys::ibv_gid = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, the GID is a place to write to.
        check(unsafe { sys::ibv_query_gid(self.0.as_ptr(), port, index.into(), &raw mut gid) })?;
        if self.port(port)?.link_layer != sys::IBV_LINK_LAYER_ETHERNET {
            return Ok(None);
        }
        // SAFETY: it was written, or is zero.
        let ip = Ipv6Addr::from(unsafe { gid.raw });
        if ip.is_unspecified() {
            let what = format!("port {port} of {} has no GID with index {index}", self.name());
            return Err(io::Error::new(io::ErrorKind::NotFound, what));
        }
        Ok(Some(IpAddr::V6(ip).to_canonical()))
    }

    /// Whether a port works.
    pub(crate) fn is_up(self, port: u8) -> bool {
        self.port(port).is_ok_and(|attr| attr.state == sys::ibv_port_state::IBV_PORT_ACTIVE)
    }

    pub(crate) fn limits(self, port: u8) -> io::Result<Limits> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut device: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, the attributes are a place to write to.
        check(unsafe { sys::ibv_query_device(self.0.as_ptr(), &raw mut device) })?;
        let attr = self.port(port)?;
        Ok(Limits {
            max_mr_bytes: device.max_mr_size,
            max_mr_count: u64::try_from(device.max_mr).unwrap_or(0),
            max_message_bytes: u64::from(attr.max_msg_sz),
            max_queue_depth: u32::try_from(device.max_qp_wr).unwrap_or(0),
            max_completions: u32::try_from(device.max_cqe).unwrap_or(0),
            max_reads: u8::try_from(device.max_qp_rd_atom.min(device.max_qp_init_rd_atom))
                .unwrap_or(u8::MAX),
            active_mtu_bytes: 128 << attr.active_mtu,
        })
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({})", self.name())
    }
}

/// A return code that is an errno, or -1 with errno set.
pub(crate) fn check(code: libc::c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno.abs())),
    }
}

fn some<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// What a link's memory and queues belong to.
pub(crate) struct ProtectionDomain {
    pd: NonNull<sys::ibv_pd>,
    context: Context,
    /// Completion queues made so far.
    queues: AtomicU32,
}

// SAFETY: as for `Context`.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Context`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(crate) fn new(context: Context) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let pd = some(unsafe { sys::ibv_alloc_pd(context.0.as_ptr()) })?;
        Ok(Arc::new(Self { pd, context, queues: AtomicU32::new(0) }))
    }

    pub(crate) fn context(&self) -> Context {
        self.context
    }

    /// The interrupt vector of the next completion queue: each its own, as far as the device has them,
    /// so that no CPU hears of all.
    fn next_vector(&self) -> i32 {
        // SAFETY: rdma_cm never closes a context.
        let vectors = unsafe { self.context.0.as_ref() }.num_comp_vectors;
        vector_of(self.queues.fetch_add(1, Ordering::Relaxed), vectors)
    }
}

/// In turn; a device that names none has one.
fn vector_of(queue: u32, vectors: i32) -> i32 {
    let vectors = u32::try_from(vectors).unwrap_or(0).max(1);
    i32::try_from(queue % vectors).unwrap_or(0)
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProtectionDomain({:?})", self.context)
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: all that belongs to it holds the `Arc`, and so is gone.
        let code = unsafe { sys::ibv_dealloc_pd(self.pd.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to free a protection domain: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::vector_of;

    #[test]
    fn queues_take_vectors_in_turn() {
        let vectors = |count| (0..6).map(|queue| vector_of(queue, count)).collect::<Vec<_>>();
        assert_eq!(vectors(4), [0, 1, 2, 3, 0, 1]);
        assert_eq!(vectors(1), [0; 6]);
        assert_eq!((vectors(0), vectors(-1)), (vec![0; 6], vec![0; 6]));
    }
}
