//! The verbs this transport needs, as values that clean up after themselves.
//!
//! Queue pairs and completion queues are the basic ones: the extended ones of rxe's user library
//! before rdma-core 64 get inline data and scatter lists wrong.
#![expect(unsafe_code, reason = "libibverbs is a C library")]

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use rdma_sys as sys;

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
    pub(crate) max_message_bytes: u64,
    pub(crate) max_queue_depth: u32,
    pub(crate) max_completions: u32,
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
        // SAFETY: rdma_cm never closes a context.
        let device = unsafe { self.0.as_ref() }.device;
        // SAFETY: the device of an open context is there.
        let transport = unsafe { (*device).transport_type };
        transport != sys::ibv_transport_type::IBV_TRANSPORT_IWARP
    }

    pub(crate) fn limits(self, port: u8) -> io::Result<Limits> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut device: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, the attributes are a place to write to.
        check(unsafe { sys::ibv_query_device(self.0.as_ptr(), &raw mut device) })?;
        // SAFETY: plain numbers, for which zero is a value.
        let mut attr: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: as for the device.
        check(unsafe { sys::ibv_query_port(self.0.as_ptr(), port, &raw mut attr) })?;
        Ok(Limits {
            max_mr_bytes: device.max_mr_size,
            max_message_bytes: u64::from(attr.max_msg_sz),
            max_queue_depth: u32::try_from(device.max_qp_wr).unwrap_or(0),
            max_completions: u32::try_from(device.max_cqe).unwrap_or(0),
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
}

// SAFETY: as for `Context`.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Context`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(crate) fn new(context: Context) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let pd = some(unsafe { sys::ibv_alloc_pd(context.0.as_ptr()) })?;
        Ok(Arc::new(Self { pd, context }))
    }

    pub(crate) fn context(&self) -> Context {
        self.context
    }
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

/// A completion queue with its channel, for one queue pair.
pub(crate) struct CompletionQueue {
    cq: NonNull<sys::ibv_cq>,
    channel: NonNull<sys::ibv_comp_channel>,
    _pd: Arc<ProtectionDomain>,
}

// SAFETY: as for `Context`.
unsafe impl Send for CompletionQueue {}

/// What became of a work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completion {
    /// The number it was given.
    pub(crate) work: u64,
    pub(crate) status: u32,
    /// Bytes received; 0 for what was sent.
    pub(crate) len_bytes: u32,
    /// Received together with writes, without bytes of its own.
    pub(crate) with_immediate: bool,
}

impl Completion {
    pub(crate) fn is_error(&self) -> bool {
        self.status != sys::ibv_wc_status::IBV_WC_SUCCESS
    }

    /// Nobody acknowledged it, however often it was sent.
    pub(crate) fn is_unanswered(&self) -> bool {
        self.status == sys::ibv_wc_status::IBV_WC_RETRY_EXC_ERR
            || self.status == sys::ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR
    }

    pub(crate) fn reason(&self) -> String {
        // SAFETY: any number has a text.
        let text = unsafe { sys::ibv_wc_status_str(self.status) };
        if text.is_null() {
            return format!("status {}", self.status);
        }
        // SAFETY: a constant string that ends with 0.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// Completions taken at once.
const AT_ONCE: usize = 32;

impl CompletionQueue {
    pub(crate) fn new(pd: &Arc<ProtectionDomain>, depth: u32) -> io::Result<Self> {
        let context = pd.context.0.as_ptr();
        // SAFETY: the context is open.
        let channel = some(unsafe { sys::ibv_create_comp_channel(context) })?;
        let depth = i32::try_from(depth).unwrap_or(i32::MAX);
        // SAFETY: context and channel are there; a queue needs no cookie.
        let cq =
            unsafe { sys::ibv_create_cq(context, depth, ptr::null_mut(), channel.as_ptr(), 0) };
        let Ok(cq) = some(cq) else {
            let error = io::Error::last_os_error();
            // SAFETY: created above, and used by nobody.
            unsafe { sys::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self { cq, channel, _pd: Arc::clone(pd) };
        rustix::io::ioctl_fionbio(queue.fd(), true)?;
        Ok(queue)
    }

    /// Readable when completions came after [`Self::ask_for_event`].
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is there as long as `self`.
        let fd: RawFd = unsafe { self.channel.as_ref() }.fd;
        // SAFETY: open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Takes completions that are there.
    pub(crate) fn poll(&self, into: &mut Vec<Completion>) -> io::Result<()> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut found: [sys::ibv_wc; AT_ONCE] = unsafe { std::mem::zeroed() };
        let most = i32::try_from(AT_ONCE).unwrap_or(0);
        // SAFETY: the queue is there, and there is room for as many as asked for.
        let count = unsafe { sys::ibv_poll_cq(self.cq.as_ptr(), most, found.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        into.extend(found[..count].iter().map(|wc| Completion {
            work: wc.wr_id,
            status: wc.status,
            len_bytes: wc.byte_len,
            with_immediate: wc.status == sys::ibv_wc_status::IBV_WC_SUCCESS
                && wc.opcode == sys::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM,
        }));
        Ok(())
    }

    /// Has the next completion make [`Self::fd`] readable. One that came before does not: poll
    /// once more.
    pub(crate) fn ask_for_event(&self) -> io::Result<()> {
        // SAFETY: the queue is there.
        check(unsafe { sys::ibv_req_notify_cq(self.cq.as_ptr(), 0) })
    }

    /// Takes an event off, if there is one.
    pub(crate) fn take_event(&self) {
        let mut cq = ptr::null_mut();
        let mut cookie = ptr::null_mut();
        // SAFETY: the channel is there and does not block; both are places to write to.
        let code =
            unsafe { sys::ibv_get_cq_event(self.channel.as_ptr(), &raw mut cq, &raw mut cookie) };
        if code == 0 {
            // SAFETY: the event was this queue's, the only one of its channel.
            unsafe { sys::ibv_ack_cq_events(self.cq.as_ptr(), 1) };
        }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CompletionQueue")
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: its queue pair is gone, and all its events are acknowledged.
        let code = unsafe { sys::ibv_destroy_cq(self.cq.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to free a completion queue: {error}");
        }
        // SAFETY: its only queue is gone.
        unsafe { sys::ibv_destroy_comp_channel(self.channel.as_ptr()) };
    }
}

/// Bytes on this side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) len_bytes: u32,
    pub(crate) key: u32,
}

/// What a work request does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    /// Sends the bytes as a message.
    Send,
    /// Writes them to the other side's memory.
    Write { address: u64, key: u32 },
    /// Writes nothing, and is received as a message without bytes.
    WriteWithImmediate { immediate: u32 },
}

/// A work request for the send queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Given back by its completion.
    pub(crate) work: u64,
    pub(crate) verb: Verb,
    /// `None` for no bytes.
    pub(crate) span: Option<Span>,
    /// Whether there is a completion if all goes well.
    pub(crate) signalled: bool,
}

/// A reliable connected queue pair, with one completion queue for both its directions.
pub(crate) struct QueuePair {
    qp: NonNull<sys::ibv_qp>,
    /// After the queue pair: freed later.
    pub(crate) completions: CompletionQueue,
    _pd: Arc<ProtectionDomain>,
}

// SAFETY: as for `Context`.
unsafe impl Send for QueuePair {}

impl QueuePair {
    pub(crate) fn new(
        pd: &Arc<ProtectionDomain>,
        send_depth: u32,
        receive_depth: u32,
    ) -> io::Result<Self> {
        let completions = CompletionQueue::new(pd, send_depth + receive_depth)?;
        let cap = sys::ibv_qp_cap {
            max_send_wr: send_depth,
            max_recv_wr: receive_depth,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let mut init = sys::ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: completions.cq.as_ptr(),
            recv_cq: completions.cq.as_ptr(),
            srq: ptr::null_mut(),
            cap,
            qp_type: sys::ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue are there; the attributes are complete.
        let qp = some(unsafe { sys::ibv_create_qp(pd.pd.as_ptr(), &raw mut init) })?;
        Ok(Self { qp, completions, _pd: Arc::clone(pd) })
    }

    /// Its number, for the other side.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: it is there as long as `self`.
        unsafe { self.qp.as_ref() }.qp_num
    }

    /// Changes its state or settings.
    pub(crate) fn modify(&self, attr: &mut sys::ibv_qp_attr, mask: i32) -> io::Result<()> {
        // SAFETY: the queue pair is there; the attributes are only read.
        check(unsafe { sys::ibv_modify_qp(self.qp.as_ptr(), attr, mask) })
    }

    /// Posts requests with one ring of the doorbell, in order.
    ///
    /// The caller has made sure that there is room, and keeps the memory of all spans registered
    /// until they are complete or the queue pair is gone.
    pub(crate) fn post(&self, requests: &[Request]) -> io::Result<()> {
        let mut spans: Vec<sys::ibv_sge> = requests
            .iter()
            .map(|request| {
                let span = request.span.unwrap_or(Span { address: 0, len_bytes: 0, key: 0 });
                sys::ibv_sge { addr: span.address, length: span.len_bytes, lkey: span.key }
            })
            .collect();
        let mut chain: Vec<sys::ibv_send_wr> = requests
            .iter()
            .zip(&mut spans)
            .map(|(request, span)| work_request(request, span))
            .collect();
        for index in (1..chain.len()).rev() {
            let next = &raw mut chain[index];
            chain[index - 1].next = next;
        }
        let Some(first) = chain.first_mut() else { return Ok(()) };
        let mut bad = ptr::null_mut();
        // SAFETY: the chain and its scatter lists live until the call returns, which is all that
        // is asked for; what they point to is the caller's to keep.
        check(unsafe { sys::ibv_post_send(self.qp.as_ptr(), first, &raw mut bad) })
    }

    /// Posts room for one message.
    pub(crate) fn post_receive(&self, work: u64, span: Span) -> io::Result<()> {
        let mut list = sys::ibv_sge { addr: span.address, length: span.len_bytes, lkey: span.key };
        let mut request = sys::ibv_recv_wr {
            wr_id: work,
            next: ptr::null_mut(),
            sg_list: &raw mut list,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: as for `post`.
        check(unsafe { sys::ibv_post_recv(self.qp.as_ptr(), &raw mut request, &raw mut bad) })
    }
}

fn work_request(request: &Request, span: &mut sys::ibv_sge) -> sys::ibv_send_wr {
    use sys::ibv_wr_opcode as opcode;
    // SAFETY: numbers, pointers that may be null, and unions of those.
    let mut wr: sys::ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = request.work;
    wr.sg_list = &raw mut *span;
    wr.num_sge = i32::from(request.span.is_some());
    wr.send_flags = if request.signalled { sys::ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
    wr.opcode = match request.verb {
        Verb::Send => opcode::IBV_WR_SEND,
        Verb::Write { address, key } => {
            wr.wr.rdma = sys::rdma_t { remote_addr: address, rkey: key };
            opcode::IBV_WR_RDMA_WRITE
        }
        Verb::WriteWithImmediate { immediate } => {
            wr.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
            opcode::IBV_WR_RDMA_WRITE_WITH_IMM
        }
    };
    wr
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QueuePair({})", self.number())
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and freed once. From here on the NIC touches no memory for it.
        let code = unsafe { sys::ibv_destroy_qp(self.qp.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to free a queue pair: {error}");
        }
    }
}

/// A device opened once more, to be told when its port or all of it fails.
pub(crate) struct Watch(NonNull<sys::ibv_context>);

// SAFETY: as for `Context`.
unsafe impl Send for Watch {}
// SAFETY: as for `Context`.
unsafe impl Sync for Watch {}

impl Watch {
    pub(crate) fn new(context: Context) -> io::Result<Self> {
        // SAFETY: rdma_cm never closes a context, nor its device.
        let device = unsafe { context.0.as_ref() }.device;
        // SAFETY: the device of an open context is there.
        let watch = Self(some(unsafe { sys::ibv_open_device(device) })?);
        rustix::io::ioctl_fionbio(watch.fd(), true)?;
        Ok(watch)
    }

    /// Readable when there is something to know.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as `self`.
        let fd: RawFd = unsafe { self.0.as_ref() }.async_fd;
        // SAFETY: open as long as the context.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// What happened to the device, if that ends a link.
    pub(crate) fn take(&self) -> Option<String> {
        use sys::ibv_event_type as event;
        // SAFETY: a union of pointers and numbers, and a number.
        let mut found: sys::ibv_async_event = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open and its events do not block; the event is a place to write to.
        let code = unsafe { sys::ibv_get_async_event(self.0.as_ptr(), &raw mut found) };
        if code != 0 {
            return None;
        }
        let fatal =
            [event::IBV_EVENT_PORT_ERR, event::IBV_EVENT_DEVICE_FATAL].contains(&found.event_type);
        // SAFETY: any kind has a text.
        let text = unsafe { sys::ibv_event_type_str(found.event_type) };
        // SAFETY: from `ibv_get_async_event`, and acknowledged once.
        unsafe { sys::ibv_ack_async_event(&raw mut found) };
        if !fatal || text.is_null() {
            return None;
        }
        // SAFETY: a constant string that ends with 0.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: opened by `new`; nothing was made of it.
        let code = unsafe { sys::ibv_close_device(self.0.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to close a device: {error}");
        }
    }
}
