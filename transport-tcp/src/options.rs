//! Settings of the sockets.

use std::io;
use std::time::Duration;

use socket2::{SockAddr, Socket, TcpKeepalive};

/// The send buffer of a connection within one host, unless told otherwise. Such a path holds no
/// bytes itself, and wakes a waiting thread within microseconds; what the kernel's tuning would
/// queue up, tens of MiB, is pushed out of the caches before the receiver reads it. Measured:
/// `docs/performance.md`.
const WITHIN_HOST_SEND_BYTES: usize = 512 << 10;

/// Whether a connection is one from an address to itself, and so never leaves this host's kernel.
pub(crate) fn is_within_host(socket: &Socket) -> io::Result<bool> {
    let ip = |address: SockAddr| address.as_socket().map(|address| address.ip());
    Ok(ip(socket.local_addr()?) == ip(socket.peer_addr()?))
}

/// When a silent connection is probed, and given up.
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
    /// At the destination: how long a fresh connection may take to say what it wants.
    pub preamble_timeout: Duration,
    /// How long sent bytes may stay unacknowledged by the other kernel, or its receive window
    /// shut, until the link counts as lost (`TCP_USER_TIMEOUT`). `None` leaves it to the
    /// kernel's retransmission limits, which take many minutes.
    ///
    /// The second case means that a destination which does not read for this long loses its
    /// link, even if it is alive.
    pub user_timeout: Option<Duration>,
    /// Probes on silent connections; `None` for no probes.
    pub keepalive: Option<Keepalive>,
    /// Send buffer of each connection in bytes, capped by `net.core.wmem_max`. `None` is best
    /// nearly always: the kernel tunes it to the path. A connection from an address to itself gets
    /// 512 KiB then, so that what is under way stays in the processor's caches.
    pub send_buffer_bytes: Option<usize>,
    /// Receive buffer of each connection in bytes, capped by `net.core.rmem_max`. `None` lets
    /// the kernel tune it, which is best nearly always.
    pub receive_buffer_bytes: Option<usize>,
    /// At the source: zero-copy sends on data connections.
    pub zero_copy: ZeroCopy,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            preamble_timeout: Duration::from_secs(5),
            user_timeout: Some(Duration::from_secs(30)),
            keepalive: Some(Keepalive::default()),
            send_buffer_bytes: None,
            receive_buffer_bytes: None,
            zero_copy: ZeroCopy::default(),
        }
    }
}

impl TcpOptions {
    /// Sets buffer sizes. Must happen before `connect` and `listen`: the window scale that a
    /// large buffer needs is negotiated with the first packet.
    pub(crate) fn apply_buffers(&self, socket: &Socket) -> io::Result<()> {
        if let Some(bytes) = self.send_buffer_bytes {
            socket.set_send_buffer_size(bytes)?;
        }
        if let Some(bytes) = self.receive_buffer_bytes {
            socket.set_recv_buffer_size(bytes)?;
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

    /// Sets everything else.
    pub(crate) fn apply(&self, socket: &Socket) -> io::Result<()> {
        // Batches and frames are whole when they are handed over: nothing to wait for.
        socket.set_tcp_nodelay(true)?;
        if let Some(Keepalive { idle, interval, probes }) = self.keepalive {
            let keepalive =
                TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
            socket.set_tcp_keepalive(&keepalive)?;
        }
        if self.user_timeout.is_some() {
            socket.set_tcp_user_timeout(self.user_timeout)?;
        }
        Ok(())
    }
}
