//! Settings of the sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pageferry::transport::Admission;
use pageferry::transport::ways::Way;
use pageferry_identity::Security;
use socket2::{Domain, SockAddr, Socket, TcpKeepalive};

/// The send buffer of a connection within one host, unless told otherwise. Such a path holds no
/// bytes itself, and wakes a waiting thread within microseconds; what the kernel's tuning would
/// queue up, tens of MiB, is pushed out of the caches before the receiver reads it. Measured:
/// `docs/performance.md`.
const WITHIN_HOST_SEND_BYTES: usize = 512 << 10;

/// The smallest buffer that makes sense for a connection on any path: as much as its longest segment.
/// Where a send buffer holds no more than one segment, each has to be acknowledged before the next one
/// goes out, and the other side puts that off in the hope of a second one, by 40 ms and more. Loopback
/// has the longest segments, 64 KiB.
pub const LEAST_BUFFER_BYTES: usize = 64 << 10;

/// The largest buffer the kernel can be asked for. It takes an `int`, and gives less.
const MOST_BUFFER_BYTES: usize = i32::MAX as usize;
/// What the kernel can count in probes, and in seconds of silence between them.
const MOST_PROBES: u32 = 127;
const MOST_PROBE_TIME: Duration = Duration::from_secs(32_767);
/// Code points have six bits.
const MOST_DSCP: u8 = 63;
/// The longest user timeout: 24 days.
const MOST_USER_TIMEOUT: Duration = Duration::from_millis(i32::MAX as u64);

/// Whether a connection is one from an address to itself, and so never leaves this host's kernel.
pub(crate) fn is_within_host(socket: &Socket) -> io::Result<bool> {
    let ip = |address: SockAddr| address.as_socket().map(|address| address.ip());
    Ok(ip(socket.local_addr()?) == ip(socket.peer_addr()?))
}

/// Whether nobody outside this host is on the way: from an address to itself, over the loopback device, or by a socket
/// that has no IP addresses (unix, vsock), whose other end is the host's own matter.
pub(crate) fn stays_within_host(socket: &Socket) -> io::Result<bool> {
    let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
    let (Some(local), Some(peer)) = (local.as_socket(), peer.as_socket()) else {
        // No IP addresses.
        return Ok(local.as_socket().is_none() && peer.as_socket().is_none());
    };
    let [local, peer] = [local, peer].map(|address| address.ip().to_canonical());
    Ok(local == peer || (local.is_loopback() && peer.is_loopback()))
}

/// When a silent connection is probed, and given up. The kernel counts whole seconds, 1 to 32,767, and
/// up to 127 probes: times are rounded up, and more is as much as there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection counts as lost. The kernel only looks at it when
    /// [`TcpOptions::user_timeout`] is not set.
    pub probes: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { idle: Duration::from_secs(10), interval: Duration::from_secs(5), probes: 4 }
    }
}

/// Whether the kernel is asked not to copy the page bytes it sends (`MSG_ZEROCOPY`).
///
/// It needs a path that can do it: a NIC with scatter-gather and checksum offload. On loopback and
/// on most virtual devices the kernel copies anyway, and says so. Pages are pinned while they are
/// under way, which counts against `RLIMIT_MEMLOCK` of a process without `CAP_IPC_LOCK`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZeroCopy {
    /// As long as it pays: a connection goes back to plain sends when the kernel copies most of
    /// what the first sends hold, or has no room for them. A connection from an address to itself
    /// does without from the start, since the kernel always copies there (`msg_zerocopy.rst`,
    /// "Loopback"), and so does a fixed send buffer of less than 64 KiB. Nothing fails for want of
    /// zero-copy.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, also where the kernel copies: for measuring. Fails where the kernel does not know
    /// it or has no room.
    On,
}

/// Settings of all connections of a link; both sides choose theirs freely.
///
/// ```
/// use std::time::Duration;
/// use pageferry_tcp::TcpOptions;
///
/// let options = TcpOptions { connect_timeout: Duration::from_secs(3), ..TcpOptions::default() };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpOptions {
    /// At the source: how long one address may take to accept a connection and to answer.
    pub connect_timeout: Duration,
    /// At the destination: how long a fresh connection may say nothing more before it is known what it
    /// wants, and, if it is a source, before it has greeted.
    pub preamble_timeout: Duration,
    /// At the destination: what a source must have said to be served.
    pub admission: Admission,
    /// How long sent bytes may stay unacknowledged by the other kernel, or its receive window
    /// shut, until the link counts as lost (`TCP_USER_TIMEOUT`). `None` leaves it to the
    /// kernel's retransmission limits, which take many minutes. The kernel counts whole milliseconds,
    /// up to 24 days: it is rounded up, and more is as much as there is.
    ///
    /// The second case means that a destination which does not read for this long loses its
    /// link, even if it is alive.
    pub user_timeout: Option<Duration>,
    /// Probes on silent connections; `None` for no probes.
    pub keepalive: Option<Keepalive>,
    /// Send buffer of each connection in bytes, capped by `net.core.wmem_max`. `None` is best
    /// nearly always: the kernel tunes it to the path. A connection from an address to itself gets
    /// 512 KiB then, so that what is under way stays in the processor's caches. Less than
    /// [`LEAST_BUFFER_BYTES`] can be slower by a hundred times, which the log warns of.
    pub send_buffer_bytes: Option<usize>,
    /// Receive buffer of each connection in bytes, capped by `net.core.rmem_max`. `None` lets
    /// the kernel tune it, which is best nearly always. Less than [`LEAST_BUFFER_BYTES`] is as above.
    pub receive_buffer_bytes: Option<usize>,
    /// At the source: zero-copy sends on data connections.
    pub zero_copy: ZeroCopy,
    /// At the source: this host's addresses that connections come from, in turn with the destination's addresses: the
    /// control connection from the first by which that is reached. None leaves it to the kernel's routes.
    pub source_addresses: Vec<IpAddr>,
    /// The interface that connections are bound to (`SO_BINDTODEVICE`), by its name.
    pub interface: Option<String>,
    /// Differentiated services code point of all packets that go out, 0 to 63 (RFC 2474).
    pub dscp: Option<u8>,
    /// Congestion control, by the kernel's name of it (`TCP_CONGESTION`); `None` for
    /// `net.ipv4.tcp_congestion_control`.
    pub congestion_control: Option<String>,
    /// How connections are kept from others. Plain text goes no further than this host, unless told otherwise.
    pub security: Security,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            preamble_timeout: Duration::from_secs(5),
            admission: Admission::default(),
            user_timeout: Some(Duration::from_secs(30)),
            keepalive: Some(Keepalive::default()),
            send_buffer_bytes: None,
            receive_buffer_bytes: None,
            zero_copy: ZeroCopy::default(),
            source_addresses: Vec::new(),
            interface: None,
            dscp: None,
            congestion_control: None,
            security: Security::default(),
        }
    }
}

impl TcpOptions {
    /// Sets buffer sizes. Must happen before `connect` and `listen`: the window scale that a
    /// large buffer needs is negotiated with the first packet.
    pub(crate) fn apply_buffers(&self, socket: &Socket) -> io::Result<()> {
        if let Some(bytes) = self.send_buffer_bytes {
            socket.set_send_buffer_size(bytes.min(MOST_BUFFER_BYTES))?;
        }
        if let Some(bytes) = self.receive_buffer_bytes {
            socket.set_recv_buffer_size(bytes.min(MOST_BUFFER_BYTES))?;
        }
        Ok(())
    }

    /// Warns of buffers of a link, set on this socket, that are not what was asked for or make no
    /// sense.
    pub(crate) fn check_buffers(&self, socket: &Socket) -> io::Result<()> {
        for (name, asked, given, limit) in [
            ("send", self.send_buffer_bytes, socket.send_buffer_size()?, "wmem_max"),
            ("receive", self.receive_buffer_bytes, socket.recv_buffer_size()?, "rmem_max"),
        ] {
            let Some(asked) = asked else { continue };
            // The kernel doubles what it is given, for what it keeps beside the bytes.
            let given = given / 2;
            if given < asked {
                tracing::warn!(
                    "a {name} buffer of {given} bytes where {asked} are asked for: the kernel gives no \
                     more than net.core.{limit}"
                );
            }
            if given.min(asked) < LEAST_BUFFER_BYTES {
                tracing::warn!(
                    "a {name} buffer of {} bytes is less than the longest segment: a connection may wait \
                     40 ms for the acknowledgement of each; {LEAST_BUFFER_BYTES} or more make sense",
                    given.min(asked)
                );
            }
        }
        Ok(())
    }

    /// Sets what depends on the path, once there is one.
    pub(crate) fn apply_to_path(&self, socket: &Socket) -> io::Result<()> {
        if self.send_buffer_bytes.is_none() && is_within_host(socket)? {
            socket.set_send_buffer_size(WITHIN_HOST_SEND_BYTES)?;
        }
        Ok(())
    }

    /// Has connections go in and out by one interface. Before `connect` and `listen`.
    pub(crate) fn apply_interface(&self, socket: &Socket) -> io::Result<()> {
        let Some(name) = &self.interface else { return Ok(()) };
        socket
            .bind_device(Some(name.as_bytes()))
            .map_err(|error| io::Error::new(error.kind(), format!("interface {name}: {error}")))
    }

    /// For a way that others can make up for. A network that is gone does not say so.
    pub(crate) fn for_one_of_several(&self) -> Self {
        const PATIENCE: Duration = Duration::from_secs(2);
        Self { connect_timeout: self.connect_timeout.min(PATIENCE), ..self.clone() }
    }

    /// The way to an address, from one address here after the other.
    pub(crate) fn way(&self, to: SocketAddr, turn: usize) -> Way {
        Way::by_turns(to, &self.source_addresses, turn)
    }

    /// Has a connection come from where it is to.
    pub(crate) fn apply_source(&self, socket: &Socket, way: Way) -> io::Result<()> {
        self.apply_interface(socket)?;
        let Some(address) = way.from else { return Ok(()) };
        if address.is_ipv4() != way.to.is_ipv4() {
            let why = format!("{address}, which it is to come from, is an address of another kind");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        socket
            .bind(&SocketAddr::new(address, 0).into())
            .map_err(|error| io::Error::new(error.kind(), format!("from {address}: {error}")))
    }

    /// Sets everything else.
    pub(crate) fn apply(&self, socket: &Socket) -> io::Result<()> {
        // Batches and frames are whole when they are handed over: nothing to wait for.
        socket.set_tcp_nodelay(true)?;
        if let Some(Keepalive { idle, interval, probes }) = self.keepalive {
            let seconds = |time| counted(time, Duration::from_secs(1)).min(MOST_PROBE_TIME);
            let keepalive = TcpKeepalive::new()
                .with_time(seconds(idle))
                .with_interval(seconds(interval))
                .with_retries(probes.clamp(1, MOST_PROBES));
            socket.set_tcp_keepalive(&keepalive)?;
        }
        if let Some(limit) = self.user_timeout {
            let limit = counted(limit, Duration::from_millis(1)).min(MOST_USER_TIMEOUT);
            socket.set_tcp_user_timeout(Some(limit))?;
        }
        if let Some(name) = &self.congestion_control {
            socket.set_tcp_congestion(name.as_bytes()).map_err(|error| {
                let why = format!("congestion control {name}: {error}");
                io::Error::new(error.kind(), why)
            })?;
        }
        self.dscp.map_or(Ok(()), |code_point| mark(socket, code_point))
    }
}

/// Marks the packets of a socket.
fn mark(socket: &Socket, code_point: u8) -> io::Result<()> {
    if code_point > MOST_DSCP {
        let why = format!("{code_point} is no code point, 0 to {MOST_DSCP}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    // Two bits below it are for congestion (RFC 3168).
    let class = u32::from(code_point) << 2;
    match socket.domain()? {
        Domain::IPV6 => socket.set_tclass_v6(class),
        _ => socket.set_tos_v4(class),
    }
}

/// A time as the kernel counts it: so many units that it is not cut short, and one at least, since none
/// means something else.
fn counted(time: Duration, unit: Duration) -> Duration {
    let units = time.as_nanos().div_ceil(unit.as_nanos()).max(1);
    u32::try_from(units).ok().and_then(|units| unit.checked_mul(units)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use socket2::Type;

    use super::*;

    /// Options over their whole range, and what the kernel says that it was told: user timeout,
    /// silence, interval, probes.
    #[test]
    fn the_kernel_takes_every_option_over_its_whole_range() {
        let seconds = Duration::from_secs;
        let cases = [
            (Duration::ZERO, 0, (Duration::from_millis(1), seconds(1), 1)),
            (Duration::from_nanos(1), 1, (Duration::from_millis(1), seconds(1), 1)),
            (Duration::from_millis(1_500), 4, (Duration::from_millis(1_500), seconds(2), 4)),
            (seconds(32_767), 127, (seconds(32_767), seconds(32_767), 127)),
            (seconds(u64::MAX / 2), 128, (MOST_USER_TIMEOUT, MOST_PROBE_TIME, MOST_PROBES)),
            (Duration::MAX, u32::MAX, (MOST_USER_TIMEOUT, MOST_PROBE_TIME, MOST_PROBES)),
        ];
        for (time, probes, (user_timeout, silence, told)) in cases {
            let options = TcpOptions {
                user_timeout: Some(time),
                keepalive: Some(Keepalive { idle: time, interval: time, probes }),
                ..TcpOptions::default()
            };
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            options.apply(&socket).unwrap_or_else(|error| panic!("{time:?}, {probes}: {error}"));
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(user_timeout), "{time:?}");
            assert_eq!(socket.tcp_keepalive_time().unwrap(), silence, "{time:?}");
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), silence, "{time:?}");
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), told, "{probes}");
        }
    }

    /// More is never less: a size that is cut off to an `int` would be.
    #[test]
    fn a_larger_buffer_is_no_smaller_one() {
        let given = |bytes| {
            let (send_buffer_bytes, receive_buffer_bytes) = (Some(bytes), Some(bytes));
            let options =
                TcpOptions { send_buffer_bytes, receive_buffer_bytes, ..TcpOptions::default() };
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            options.apply_buffers(&socket).unwrap();
            (socket.send_buffer_size().unwrap(), socket.recv_buffer_size().unwrap())
        };
        let mut before = (0, 0);
        for shift in (0..usize::BITS).step_by(4) {
            let (send, receive) = given(1 << shift);
            assert!(send >= before.0 && receive >= before.1, "1 << {shift}: {send}, {receive}");
            before = (send, receive);
        }
        assert_eq!(given(usize::MAX), before);
    }
}
