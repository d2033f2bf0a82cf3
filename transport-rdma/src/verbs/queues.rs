//! Queue pairs and completion queues.
#![expect(unsafe_code, reason = "libibverbs is a C library")]

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use pageferry::transport::WorkRequestCounts;
use rdma_sys as sys;

use super::{ProtectionDomain, check, some};

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
        let (cookie, vector) = (ptr::null_mut(), pd.next_vector());
        // SAFETY: context and channel are there; a queue needs no cookie.
        let cq = unsafe { sys::ibv_create_cq(context, depth, cookie, channel.as_ptr(), vector) };
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
    /// Reads from there into them.
    Read { address: u64, key: u32 },
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
    chain: Chain,
    work_requests: WorkRequestCounts,
    _pd: Arc<ProtectionDomain>,
}

/// What the verbs library is given: requests of which each points to the next and to its scatter list.
/// Kept so that it need not be allocated anew; its pointers mean nothing after the next change.
#[derive(Default)]
pub(crate) struct Chain {
    spans: Vec<sys::ibv_sge>,
    links: Vec<sys::ibv_send_wr>,
}

impl Chain {
    /// Makes it of these requests.
    pub(crate) fn load(&mut self, requests: impl IntoIterator<Item = Request>) {
        let Self { spans, links } = self;
        spans.clear();
        links.clear();
        for request in requests {
            let span = request.span.unwrap_or(Span { address: 0, len_bytes: 0, key: 0 });
            spans.push(sys::ibv_sge { addr: span.address, length: span.len_bytes, lkey: span.key });
            links.push(work_request(&request));
        }
        // Neither list moves any more.
        for (link, span) in links.iter_mut().zip(spans) {
            link.sg_list = &raw mut *span;
        }
        for index in (1..links.len()).rev() {
            let next = &raw mut links[index];
            links[index - 1].next = next;
        }
    }

    /// How many requests there are, and how many of them are signalled.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let signalled = |link: &&sys::ibv_send_wr| link.send_flags != 0;
        (self.links.len() as u64, self.links.iter().filter(signalled).count() as u64)
    }
}

// SAFETY: as for `Context`; the chain's pointers are only followed inside `post`.
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
        Ok(Self {
            qp,
            completions,
            chain: Chain::default(),
            work_requests: WorkRequestCounts::default(),
            _pd: Arc::clone(pd),
        })
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
    pub(crate) fn post(&mut self, requests: impl IntoIterator<Item = Request>) -> io::Result<()> {
        self.chain.load(requests);
        let Some(first) = self.chain.links.first_mut() else { return Ok(()) };
        let mut bad = ptr::null_mut();
        // SAFETY: the chain and its scatter lists live until the call returns, which is all that
        // is asked for; what they point to is the caller's to keep.
        check(unsafe { sys::ibv_post_send(self.qp.as_ptr(), first, &raw mut bad) })?;
        let (posted, signalled) = self.chain.counts();
        self.work_requests.add(&WorkRequestCounts { posted, signalled, doorbells: 1, polls: 0 });
        Ok(())
    }

    /// What was posted so far.
    pub(crate) fn work_requests(&self) -> WorkRequestCounts {
        self.work_requests
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

/// A request without its scatter list.
fn work_request(request: &Request) -> sys::ibv_send_wr {
    use sys::ibv_wr_opcode as opcode;
    // SAFETY: numbers, pointers that may be null, and unions of those.
    let mut wr: sys::ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = request.work;
    wr.num_sge = i32::from(request.span.is_some());
    wr.send_flags = if request.signalled { sys::ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
    wr.opcode = match request.verb {
        Verb::Send => opcode::IBV_WR_SEND,
        Verb::Write { address, key } => {
            wr.wr.rdma = sys::rdma_t { remote_addr: address, rkey: key };
            opcode::IBV_WR_RDMA_WRITE
        }
        Verb::Read { address, key } => {
            wr.wr.rdma = sys::rdma_t { remote_addr: address, rkey: key };
            opcode::IBV_WR_RDMA_READ
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
