//! Connections by rdma_cm: from addresses to connected queue pairs.
//!
//! Queue pairs are taken through their states by hand, since rdma_cm sets neither the time after
//! which a receiver without room is asked again (`min_rnr_timer` stays 0, which is 655 ms) nor the
//! path MTU.
#![expect(unsafe_code, reason = "librdmacm is a C library")]

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::time::Duration;

use pageferry::transport::addresses::canonical;
use rdma_sys as sys;
use socket2::SockAddr;

use crate::verbs::{Context, QueuePair, check};

/// Most bytes that a request to connect can say (what the CM's message leaves of 92 bytes).
pub(crate) const MAX_REQUEST_BYTES: usize = 56;

/// Most bytes of a refusal.
pub(crate) const MAX_REFUSAL_BYTES: usize = 148;

/// Reads under way at once on a queue pair, each way, where the devices can.
pub(crate) const READS_AT_ONCE: u8 = 16;

/// After how long a receiver that had no room is asked again: 12 stands for 640 µs
/// (InfiniBand specification, table "Encoding for RNR NAK Timer Field").
const RECEIVER_NOT_READY_TIMER: u8 = 12;

/// For ever: receives are posted ahead, so it is a matter of microseconds.
const RECEIVER_NOT_READY_RETRIES: u8 = 7;

/// `RDMA_OPTION_ID` and its options (`rdma_cma.h`).
const OPTION_LEVEL_ID: i32 = 0;
const OPTION_TYPE_OF_SERVICE: i32 = 0;

/// A port's address as the connection manager has it.
pub(crate) type Gid = [u8; 16];

/// How a queue pair is to be connected.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PathSettings {
    /// As verbs encode it: 1 for 256 bytes to 5 for 4096. The same on both sides.
    pub(crate) mtu: u32,
    /// As the wire encodes it: 4.096 µs × 2ⁿ.
    pub(crate) ack_timeout: u8,
    pub(crate) retries: u8,
    /// Reads under way at once, each way.
    pub(crate) reads: u8,
    /// What the other side may do with memory that was registered for it.
    pub(crate) remote_access: RemoteAccess,
}

/// What the connection manager knows of the way to the other side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    /// The largest path MTU, as verbs encode it; 0 where it does not say.
    pub(crate) mtu: u32,
    /// Which of the port's GIDs this side has on it.
    pub(crate) gid_index: u8,
}

/// What a queue pair lets the other side do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RemoteAccess {
    Nothing,
    Write,
    Read,
}

/// Where events of connections come in.
struct Channel(NonNull<sys::rdma_event_channel>);

// SAFETY: librdmacm may be called from any thread.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn new() -> io::Result<Self> {
        // SAFETY: asks for nothing.
        let channel = unsafe { sys::rdma_create_event_channel() };
        let channel = Self(NonNull::new(channel).ok_or_else(io::Error::last_os_error)?);
        rustix::io::ioctl_fionbio(channel.fd(), true)?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is there as long as `self`.
        let fd = unsafe { self.0.as_ref() }.fd;
        // SAFETY: open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: all ids of the channel are gone.
        unsafe { sys::rdma_destroy_event_channel(self.0.as_ptr()) };
    }
}

/// What happened to an id.
#[derive(Debug)]
pub(crate) enum Event {
    AddressResolved,
    RouteResolved,
    /// Somebody wants to connect.
    Requested {
        id: Id,
        said: Vec<u8>,
        /// The number of its queue pair.
        queue_pair: u32,
    },
    /// The other side accepted.
    Accepted {
        said: Vec<u8>,
        /// The number of its queue pair.
        queue_pair: u32,
    },
    Established,
    Rejected {
        said: Vec<u8>,
    },
    /// Nothing answers, or there is no way.
    Failed {
        what: &'static str,
        cause: io::Error,
    },
    Disconnected,
    DeviceRemoved,
    Other,
}

/// One end of a connection, or a listener.
pub(crate) struct Id {
    raw: NonNull<sys::rdma_cm_id>,
    /// Reads at once that the other side serves, as far as is known.
    reads_there: u8,
    /// After the id: freed later.
    channel: Channel,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Id {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Id {}

impl Id {
    pub(crate) fn new() -> io::Result<Self> {
        let channel = Channel::new()?;
        let mut id = ptr::null_mut();
        // SAFETY: the channel is there, the id is a place to write to.
        check(unsafe {
            sys::rdma_create_id(
                channel.0.as_ptr(),
                &raw mut id,
                ptr::null_mut(),
                sys::rdma_port_space::RDMA_PS_TCP,
            )
        })?;
        let id = NonNull::new(id).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { raw: id, reads_there: u8::MAX, channel })
    }

    /// Readable when there are events.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// The device that the address led to, once it is known.
    pub(crate) fn context(&self) -> Option<Context> {
        // SAFETY: it is there as long as `self`.
        Context::new(unsafe { self.raw.as_ref() }.verbs)
    }

    /// The port of it.
    pub(crate) fn port(&self) -> u8 {
        // SAFETY: it is there as long as `self`.
        unsafe { self.raw.as_ref() }.port_num
    }

    /// The other side's address.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        // SAFETY: it is there as long as `self`.
        let addr = &unsafe { self.raw.as_ref() }.route.addr.dst_addr_union;
        // SAFETY: the union is as large as the largest address, and was zero at first.
        unsafe { socket_address(&raw const addr.dst_addr) }.map(canonical)
    }

    /// This side's address.
    pub(crate) fn local(&self) -> Option<SocketAddr> {
        // SAFETY: it is there as long as `self`.
        let addr = &unsafe { self.raw.as_ref() }.route.addr.src_addr_union;
        // SAFETY: as for the peer's.
        unsafe { socket_address(&raw const addr.src_addr) }
    }

    /// Whether it is from an address to itself, and from a port of a device to itself: the address alone is what the
    /// other side says.
    pub(crate) fn is_within_host(&self) -> bool {
        let ip = |address: SocketAddr| canonical(address).ip();
        self.local().is_some_and(|local| self.peer().map(ip) == Some(ip(local)))
            && self.gids_are_the_same()
    }

    fn gids_are_the_same(&self) -> bool {
        let (here, there) = self.gids();
        here == there
    }

    /// The number of a queue pair, as far as both sides are told: not by iWARP's connection manager.
    pub(crate) fn told_of(&self, queue_pair: u32) -> u32 {
        if self.context().is_some_and(Context::is_iwarp) { 0 } else { queue_pair }
    }

    /// Of this side's port and the other's.
    pub(crate) fn gids(&self) -> (Gid, Gid) {
        // SAFETY: it is there as long as `self`.
        let route = &unsafe { self.raw.as_ref() }.route;
        // SAFETY: the union has no other member.
        let ends = unsafe { &route.addr.addr.ibaddr };
        // SAFETY: a GID is 16 bytes, whatever they mean.
        let [here, there] = [&ends.sgid, &ends.dgid].map(|gid| unsafe { gid.raw });
        (here, there)
    }

    pub(crate) fn set_traffic_class(&self, class: u8) -> io::Result<()> {
        let mut class = class;
        // SAFETY: the option is one byte, read by the call.
        check(unsafe {
            sys::rdma_set_option(
                self.raw.as_ptr(),
                OPTION_LEVEL_ID,
                OPTION_TYPE_OF_SERVICE,
                (&raw mut class).cast(),
                size_of::<u8>(),
            )
        })
    }

    /// Takes an address of this side, and with it a device, unless it is the one of all.
    pub(crate) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let address = SockAddr::from(address);
        // SAFETY: an address that is only read.
        check(unsafe { sys::rdma_bind_addr(self.raw.as_ptr(), address.as_ptr().cast_mut().cast()) })
    }

    /// Listens; a port of 0 lets the kernel choose. Returns the port.
    pub(crate) fn listen(&self, address: SocketAddr, backlog: i32) -> io::Result<u16> {
        self.bind(address)?;
        // SAFETY: the id is there.
        check(unsafe { sys::rdma_listen(self.raw.as_ptr(), backlog) })?;
        let port = self.local().map(|address| address.port());
        port.ok_or_else(|| io::Error::other("no port was given"))
    }

    /// Asks which device leads to an address, from this side's address if one is given.
    pub(crate) fn resolve_address(
        &self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        within: Duration,
    ) -> io::Result<()> {
        let (from, to) = (from.map(SockAddr::from), SockAddr::from(to));
        let from = from.as_ref().map_or(ptr::null(), SockAddr::as_ptr);
        // SAFETY: the addresses are only read, during the call.
        check(unsafe {
            sys::rdma_resolve_addr(
                self.raw.as_ptr(),
                from.cast_mut().cast(),
                to.as_ptr().cast_mut().cast(),
                milliseconds(within),
            )
        })
    }

    pub(crate) fn resolve_route(&self, within: Duration) -> io::Result<()> {
        // SAFETY: the id is there.
        check(unsafe { sys::rdma_resolve_route(self.raw.as_ptr(), milliseconds(within)) })
    }

    /// Makes a queue pair ready for receives to be posted.
    pub(crate) fn prepare(&self, qp: &QueuePair, path: PathSettings) -> io::Result<()> {
        use sys::ibv_access_flags as access;
        self.modify(qp, sys::ibv_qp_state::IBV_QPS_INIT, |attr| {
            attr.qp_access_flags = match path.remote_access {
                RemoteAccess::Nothing => 0,
                RemoteAccess::Write => access::IBV_ACCESS_REMOTE_WRITE.0,
                RemoteAccess::Read => access::IBV_ACCESS_REMOTE_READ.0,
            };
        })
    }

    /// Makes it receive and send, once it is known whom it talks to.
    fn start(&self, qp: &QueuePair, path: PathSettings) -> io::Result<()> {
        self.modify(qp, sys::ibv_qp_state::IBV_QPS_RTR, |attr| {
            attr.max_dest_rd_atomic = path.reads;
            attr.min_rnr_timer = RECEIVER_NOT_READY_TIMER;
            attr.path_mtu = path.mtu;
        })?;
        self.modify(qp, sys::ibv_qp_state::IBV_QPS_RTS, |attr| {
            attr.max_rd_atomic = path.reads.min(self.reads_there);
            attr.timeout = path.ack_timeout;
            attr.retry_cnt = path.retries;
            attr.rnr_retry = RECEIVER_NOT_READY_RETRIES;
        })
    }

    fn modify(
        &self,
        qp: &QueuePair,
        state: u32,
        set: impl FnOnce(&mut sys::ibv_qp_attr),
    ) -> io::Result<()> {
        let (mut attr, mask) = self.attributes(state)?;
        set(&mut attr);
        qp.modify(&mut attr, mask)
    }

    /// What the connection manager has a queue pair be in a state, and which of it is to be set.
    fn attributes(&self, state: u32) -> io::Result<(sys::ibv_qp_attr, i32)> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut attr: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        let mut mask = 0;
        attr.qp_state = state;
        // SAFETY: the id is there; both are places to write to.
        check(unsafe { sys::rdma_init_qp_attr(self.raw.as_ptr(), &raw mut attr, &raw mut mask) })?;
        Ok((attr, mask))
    }

    /// The way to the other side, once that has asked or has accepted.
    pub(crate) fn way(&self) -> io::Result<Way> {
        let (attr, _) = self.attributes(sys::ibv_qp_state::IBV_QPS_RTR)?;
        Ok(Way { mtu: attr.path_mtu, gid_index: attr.ah_attr.grh.sgid_index })
    }

    /// Asks the other side to connect, with a few words.
    pub(crate) fn connect(&self, qp: &QueuePair, path: PathSettings, say: &[u8]) -> io::Result<()> {
        let mut param = parameters(qp, path, say)?;
        // SAFETY: the parameters and what they point to are only read, during the call.
        check(unsafe { sys::rdma_connect(self.raw.as_ptr(), &raw mut param) })
    }

    /// Goes on after [`Event::Accepted`].
    pub(crate) fn establish(&self, qp: &QueuePair, path: PathSettings) -> io::Result<()> {
        self.start(qp, path)?;
        // SAFETY: the id is there.
        check(unsafe { sys::rdma_establish(self.raw.as_ptr()) })
    }

    /// Accepts a request, with a few words.
    pub(crate) fn accept(&self, qp: &QueuePair, path: PathSettings, say: &[u8]) -> io::Result<()> {
        self.start(qp, path)?;
        let mut param = parameters(qp, path, say)?;
        // SAFETY: as for `connect`.
        check(unsafe { sys::rdma_accept(self.raw.as_ptr(), &raw mut param) })
    }

    /// Refuses a request, with a few words.
    pub(crate) fn reject(&self, say: &[u8]) {
        let say = &say[..say.len().min(MAX_REFUSAL_BYTES)];
        let len_bytes = u8::try_from(say.len()).unwrap_or(0);
        // SAFETY: the words are only read, during the call. Who wanted to connect may be gone.
        unsafe { sys::rdma_reject(self.raw.as_ptr(), say.as_ptr().cast(), len_bytes) };
    }

    /// Tells the other side that it is over.
    pub(crate) fn disconnect(&self) {
        // SAFETY: the id is there. One that is not connected has nobody to tell.
        unsafe { sys::rdma_disconnect(self.raw.as_ptr()) };
    }

    /// The next event, if there is one.
    pub(crate) fn take_event(&self) -> io::Result<Option<Event>> {
        let mut event = ptr::null_mut();
        // SAFETY: the channel is there and does not block; the event is a place to write to.
        let code = unsafe { sys::rdma_get_cm_event(self.channel.0.as_ptr(), &raw mut event) };
        match check(code) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let seen = Seen::of(event);
        // SAFETY: from `rdma_get_cm_event`; acknowledged once, and not used from here on.
        check(unsafe { sys::rdma_ack_cm_event(event) })?;
        seen.into_event().map(Some)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({:?})", self.peer())
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: all its events were acknowledged; freed once.
        let code = unsafe { sys::rdma_destroy_id(self.raw.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to free a connection: {error}");
        }
    }
}

/// An event, copied before it is acknowledged.
struct Seen {
    kind: u32,
    status: i32,
    id: *mut sys::rdma_cm_id,
    said: Vec<u8>,
    /// Reads at once that a request serves.
    reads: u8,
    /// The number of the other side's queue pair.
    queue_pair: u32,
}

impl Seen {
    fn of(event: *const sys::rdma_cm_event) -> Self {
        // SAFETY: from `rdma_get_cm_event`, and not acknowledged yet.
        let event = unsafe { &*event };
        // SAFETY: all ids are of connections.
        let conn = unsafe { event.param.conn };
        let said = if conn.private_data.is_null() {
            Vec::new()
        } else {
            let len_bytes = usize::from(conn.private_data_len);
            // SAFETY: as long as the event says, and copied at once.
            unsafe { std::slice::from_raw_parts(conn.private_data.cast::<u8>(), len_bytes) }
                .to_vec()
        };
        Self {
            kind: event.event,
            status: event.status,
            id: event.id,
            said,
            reads: conn.initiator_depth,
            queue_pair: conn.qp_num,
        }
    }

    fn into_event(self) -> io::Result<Event> {
        use sys::rdma_cm_event_type as kind;
        // Negative errno, or a reason of the CM's.
        let failed = |what| Event::Failed {
            what,
            cause: match self.status {
                status @ ..=-1 => io::Error::from_raw_os_error(-status),
                status => io::Error::other(format!("status {status}")),
            },
        };
        Ok(match self.kind {
            kind::RDMA_CM_EVENT_ADDR_RESOLVED => Event::AddressResolved,
            kind::RDMA_CM_EVENT_ADDR_ERROR => failed("no RDMA device leads to the address"),
            kind::RDMA_CM_EVENT_ROUTE_RESOLVED => Event::RouteResolved,
            kind::RDMA_CM_EVENT_ROUTE_ERROR => failed("no route"),
            kind::RDMA_CM_EVENT_CONNECT_REQUEST => {
                let id = NonNull::new(self.id).ok_or(io::ErrorKind::InvalidData)?;
                let channel = Channel::new().inspect_err(|_| {
                    // SAFETY: nobody else has it, and its event is acknowledged.
                    unsafe { sys::rdma_destroy_id(id.as_ptr()) };
                })?;
                let id = Id { raw: id, reads_there: self.reads, channel };
                // SAFETY: id and channel are there, and the event is acknowledged.
                check(unsafe { sys::rdma_migrate_id(id.raw.as_ptr(), id.channel.0.as_ptr()) })?;
                Event::Requested { id, said: self.said, queue_pair: self.queue_pair }
            }
            kind::RDMA_CM_EVENT_CONNECT_RESPONSE => {
                Event::Accepted { said: self.said, queue_pair: self.queue_pair }
            }
            kind::RDMA_CM_EVENT_CONNECT_ERROR => failed("failed to connect"),
            kind::RDMA_CM_EVENT_UNREACHABLE => failed("no answer"),
            kind::RDMA_CM_EVENT_REJECTED => Event::Rejected { said: self.said },
            kind::RDMA_CM_EVENT_ESTABLISHED => Event::Established,
            kind::RDMA_CM_EVENT_DISCONNECTED => Event::Disconnected,
            kind::RDMA_CM_EVENT_DEVICE_REMOVAL => Event::DeviceRemoved,
            _ => Event::Other,
        })
    }
}

/// An address of the internet; `None` if it is another one, or none.
///
/// # Safety
///
/// If it is not null, it is as long as its family says.
pub(crate) unsafe fn socket_address(address: *const libc::sockaddr) -> Option<SocketAddr> {
    // SAFETY: null, or at least a family.
    let family = unsafe { address.as_ref() }?.sa_family;
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: the family says so.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddr::from((ip, u16::from_be(v4.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says so.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddr::from((ip, u16::from_be(v6.sin6_port))))
        }
        _ => None,
    }
}

fn milliseconds(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}

fn parameters(qp: &QueuePair, path: PathSettings, say: &[u8]) -> io::Result<sys::rdma_conn_param> {
    Ok(sys::rdma_conn_param {
        private_data: if say.is_empty() { ptr::null() } else { say.as_ptr().cast() },
        private_data_len: u8::try_from(say.len()).map_err(io::Error::other)?,
        responder_resources: path.reads,
        initiator_depth: path.reads,
        flow_control: 1,
        retry_count: path.retries,
        rnr_retry_count: RECEIVER_NOT_READY_RETRIES,
        srq: 0,
        qp_num: qp.number(),
    })
}
