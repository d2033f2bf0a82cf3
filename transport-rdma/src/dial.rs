//! Makes connections: asks for them, and accepts them.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::{MigrationId, Registration, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::addresses::advise;
use crate::after;
use crate::cm::{Event, Id, PathSettings, READS_AT_ONCE, RemoteAccess};
use crate::connection::Connection;
use crate::memory::Registered;
use crate::options::{RdmaOptions, RegistrationMode};
use crate::pipe::{ACKS, Inlet, Outlet, RECEIVES};
use crate::preamble::{
    PREAMBLE_BYTES, Preamble, Purpose, agree_on_mtu, decode_acceptance, encode_acceptance,
};
use crate::state::{ChannelState, LinkState};
use crate::verbs::{Access, Context, Limits, ProtectionDomain, QueuePair, device_names};

/// Somebody who wants to connect, and is not answered yet. Dropped, it is refused.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: Id,
    pub(crate) preamble: Preamble,
}

/// What every connection of one end of a link is made with.
#[derive(Debug)]
pub(crate) struct Workshop {
    pub(crate) options: RdmaOptions,
    pub(crate) state: Arc<LinkState>,
    pub(crate) pd: Arc<ProtectionDomain>,
    pub(crate) limits: Limits,
    /// The largest path MTU here, as verbs encode it.
    pub(crate) mtu: u32,
    pub(crate) peer: SocketAddr,
}

/// The device of this name must be there, if one is asked for.
pub(crate) fn check_device(options: &RdmaOptions, address: &str) -> Result<(), TransportError> {
    let failed = |cause| TransportError::Connect { address: address.to_owned(), cause };
    let names = device_names().map_err(failed)?;
    let missing = match &options.device {
        _ if names.is_empty() => String::from("this host has no RDMA device"),
        Some(wanted) if !names.contains(wanted) => {
            format!("there is no RDMA device {wanted}; there are: {}", names.join(", "))
        }
        _ => return Ok(()),
    };
    Err(failed(io::Error::new(io::ErrorKind::NotFound, missing)))
}

/// Waits for the next event of an id.
fn event(
    id: &Id,
    state: &LinkState,
    deadline: Instant,
    operation: &'static str,
) -> Result<Event, TransportError> {
    let failed = |cause| TransportError::Io { operation, cause };
    loop {
        state.check()?;
        if let Some(event) = id.take_event().map_err(failed)? {
            return Ok(event);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        let mut fds = [
            PollFd::from_borrowed_fd(id.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(state.bell(), PollFlags::IN),
        ];
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// The device and port must be those asked for. Returns what they can do, and the largest path MTU.
fn check_port(options: &RdmaOptions, context: Context, port: u8) -> io::Result<(Limits, u32)> {
    let wrong = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if let Some(wanted) = &options.device
        && *wanted != context.name()
    {
        return wrong(format!(
            "the address belongs to the RDMA device {}, not {wanted}",
            context.name()
        ));
    }
    if let Some(wanted) = options.port
        && wanted != port
    {
        return wrong(format!("the address belongs to port {port}, not {wanted}"));
    }
    let limits = context.limits(port)?;
    let most = limits.active_mtu_bytes.max(256).ilog2() - 7;
    if let Some(wanted) = options.mtu
        && wanted.encoded() > most
    {
        tracing::warn!(
            "a path MTU of {} was asked for, and the port of {} has {}; a larger MTU of its network \
             interface gives it more",
            wanted.bytes(),
            context.name(),
            limits.active_mtu_bytes
        );
    }
    Ok((limits, options.mtu.map_or(most, |wanted| wanted.encoded().min(most))))
}

/// The search for the way to an address, from the address of the GID that is asked for.
#[derive(Debug)]
pub(crate) struct Search {
    pub(crate) id: Id,
    address: SocketAddr,
    from: Option<SocketAddr>,
    /// Whether the device is known, and the route looked for.
    has_device: bool,
}

/// How far a search is.
#[derive(Debug)]
pub(crate) enum Found {
    NotYet(Search),
    Way(Id),
}

impl Search {
    pub(crate) fn begin(
        address: SocketAddr,
        options: &RdmaOptions,
    ) -> Result<Self, TransportError> {
        Self::begin_from(None, address, options)
    }

    fn begin_from(
        from: Option<SocketAddr>,
        address: SocketAddr,
        options: &RdmaOptions,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Connect { address: address.to_string(), cause };
        let id = Id::new().map_err(failed)?;
        if let Some(class) = options.traffic_class {
            id.set_traffic_class(class).map_err(failed)?;
        }
        let search = Self { id, address, from, has_device: false };
        search
            .id
            .resolve_address(from, address, options.connect_timeout)
            .map_err(|cause| search.no_way(cause))?;
        Ok(search)
    }

    /// Takes in what happened to its id.
    pub(crate) fn go_on(
        mut self,
        event: Event,
        options: &RdmaOptions,
    ) -> Result<Found, TransportError> {
        match event {
            Event::AddressResolved if !self.has_device => {
                // Loopback addresses come that far, without a device.
                let asked = self.id.resolve_route(options.connect_timeout);
                asked.map_err(|cause| self.no_way(cause))?;
                self.has_device = true;
                Ok(Found::NotYet(self))
            }
            Event::RouteResolved if self.has_device => match self.other_from(options)? {
                None => Ok(Found::Way(self.id)),
                from => Self::begin_from(from, self.address, options).map(Found::NotYet),
            },
            Event::Failed { what, cause } => {
                let explain = |cause: io::Error| {
                    self.failed(io::Error::new(cause.kind(), format!("{what}: {cause}")))
                };
                Err(explain(if self.has_device { cause } else { self.explained(cause) }))
            }
            other => Err(self.failed(io::Error::other(format!("unexpected {other:?}")))),
        }
    }

    /// The address of the GID that is asked for, where the way found is from another one.
    fn other_from(&self, options: &RdmaOptions) -> Result<Option<SocketAddr>, TransportError> {
        let Some(index) = options.gid_index.filter(|_| self.from.is_none()) else {
            return Ok(None);
        };
        let context =
            self.id.context().ok_or_else(|| self.failed(io::ErrorKind::NotFound.into()))?;
        let wanted =
            context.gid_address(self.id.port(), index).map_err(|cause| self.failed(cause))?;
        let here = self.id.local().map(|local| local.ip());
        Ok(wanted.filter(|wanted| here != Some(*wanted)).map(|wanted| match wanted {
            IpAddr::V6(ip) => {
                // A link-local one is of the same interface as the destination's.
                let scope = if let SocketAddr::V6(to) = self.address { to.scope_id() } else { 0 };
                SocketAddrV6::new(ip, 0, 0, scope).into()
            }
            IpAddr::V4(_) => SocketAddr::new(wanted, 0),
        }))
    }

    fn failed(&self, cause: io::Error) -> TransportError {
        TransportError::Connect { address: self.address.to_string(), cause }
    }

    fn no_way(&self, cause: io::Error) -> TransportError {
        self.failed(self.explained(cause))
    }

    fn explained(&self, cause: io::Error) -> io::Error {
        match self.from {
            Some(from) => {
                io::Error::new(cause.kind(), format!("from {}, the GID's: {cause}", from.ip()))
            }
            None => advise(cause),
        }
    }
}

/// Finds the way to an address.
pub(crate) fn resolve(
    address: SocketAddr,
    options: &RdmaOptions,
    state: &LinkState,
) -> Result<Id, TransportError> {
    let deadline = after(options.connect_timeout);
    let mut search = Search::begin(address, options)?;
    loop {
        let event = event(&search.id, state, deadline, "find the way to the destination")?;
        match search.go_on(event, options)? {
            Found::NotYet(next) => search = next,
            Found::Way(id) => return Ok(id),
        }
    }
}

/// The first control connection of a link.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) workshop: Workshop,
    pub(crate) migration: MigrationId,
    pub(crate) outlet: Outlet,
}

impl Workshop {
    /// For the device of an id.
    pub(crate) fn at(
        id: &Id,
        peer: SocketAddr,
        options: RdmaOptions,
        state: Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let context = id.context().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let (limits, mtu) = check_port(&options, context, id.port()).map_err(failed)?;
        let pd = ProtectionDomain::new(context).map_err(failed)?;
        Ok(Self { options, state, pd, limits, mtu, peer })
    }

    /// From here on the link notices what happens to the device.
    pub(crate) fn watch(&self, id: &Id) -> Result<(), TransportError> {
        let (context, patience) = (self.pd.context(), self.options.patience());
        self.state.watch(context, id.port(), patience).map_err(self.failed())
    }

    /// What a connection of this purpose says.
    pub(crate) fn preamble(
        &self,
        purpose: Purpose,
        migration: MigrationId,
    ) -> [u8; PREAMBLE_BYTES] {
        let mtu = u8::try_from(self.mtu).unwrap_or(0);
        Preamble { purpose, migration, mtu }.encode()
    }

    /// Requests that a send queue holds.
    fn send_depth(&self) -> u32 {
        let most =
            self.limits.max_queue_depth.min(self.limits.max_completions.saturating_sub(ACKS));
        self.options.send_queue_depth.min(most).max(4)
    }

    pub(crate) fn path(&self, remote_access: RemoteAccess, mtu: u32) -> PathSettings {
        PathSettings {
            mtu,
            ack_timeout: self.options.ack_timeout_exponent(),
            retries: self.options.retries.min(7),
            reads: self.limits.max_reads.min(READS_AT_ONCE),
            remote_access,
        }
    }

    fn failed(&self) -> impl Fn(io::Error) -> TransportError {
        let address = self.peer.to_string();
        move |cause| TransportError::Connect { address: address.clone(), cause }
    }

    /// A connection that is not connected, over a queue pair ready for receives.
    pub(crate) fn prepare(
        &self,
        id: Id,
        depths: (u32, u32),
        path: PathSettings,
    ) -> Result<Connection, TransportError> {
        let failed = self.failed();
        let qp = QueuePair::new(&self.pd, depths.0, depths.1).map_err(&failed)?;
        id.prepare(&qp, path).map_err(&failed)?;
        let state = ChannelState::new(&self.state).map_err(&failed)?;
        Ok(Connection::new(qp, id, state))
    }

    fn outlet(&self, id: Id, path: PathSettings) -> Result<Outlet, TransportError> {
        let depth = self.send_depth();
        let connection = self.prepare(id, (depth, ACKS), path)?;
        let immediate = self.pd.context().has_write_with_immediate();
        Outlet::new(connection, &self.pd, depth, self.options.signal_every, immediate)
    }

    fn inlet(&self, id: Id, path: PathSettings) -> Result<Inlet, TransportError> {
        Inlet::new(self.prepare(id, (ACKS, RECEIVES), path)?, &self.pd)
    }

    /// At the source: asks for a connection that says so, into which the source puts messages.
    pub(crate) fn ask_for_outlet(
        &self,
        id: Id,
        say: &[u8],
        remote_access: RemoteAccess,
    ) -> Result<Outlet, TransportError> {
        let path = self.path(remote_access, self.mtu);
        let outlet = self.outlet(id, path)?;
        self.ask(&outlet.connection, say, path)?;
        Ok(outlet)
    }

    /// At the source: a connection that says so, into which the source puts messages.
    pub(crate) fn dial_outlet(
        &self,
        say: &[u8],
        remote_access: RemoteAccess,
    ) -> Result<Outlet, TransportError> {
        let mut outlet = self.ask_for_outlet(self.way()?, say, remote_access)?;
        self.await_answer(&mut outlet.connection, remote_access)?;
        Ok(outlet)
    }

    /// At the source: a connection that says so, into which the destination puts messages.
    pub(crate) fn dial_inlet(&self, say: &[u8]) -> Result<Inlet, TransportError> {
        let path = self.path(RemoteAccess::Nothing, self.mtu);
        let mut inlet = self.inlet(self.way()?, path)?;
        self.ask(&inlet.connection, say, path)?;
        self.await_answer(&mut inlet.connection, RemoteAccess::Nothing)?;
        Ok(inlet)
    }

    pub(crate) fn way(&self) -> Result<Id, TransportError> {
        resolve(self.peer, &self.options, &self.state)
    }

    pub(crate) fn ask(
        &self,
        connection: &Connection,
        say: &[u8],
        path: PathSettings,
    ) -> Result<(), TransportError> {
        connection.id.connect(&connection.qp, path, say).map_err(self.failed())
    }

    pub(crate) fn await_answer(
        &self,
        connection: &mut Connection,
        remote_access: RemoteAccess,
    ) -> Result<(), TransportError> {
        let deadline = after(self.options.connect_timeout);
        let answer = event(&connection.id, &self.state, deadline, "connect")?;
        self.take_answer(connection, remote_access, answer)
    }

    /// Takes in what came of asking for a connection; connected after it.
    pub(crate) fn take_answer(
        &self,
        connection: &mut Connection,
        remote_access: RemoteAccess,
        answer: Event,
    ) -> Result<(), TransportError> {
        let failed = self.failed();
        let path = self.path(remote_access, self.mtu);
        let (id, qp) = (&connection.id, &connection.qp);
        match answer {
            Event::Accepted { said } => {
                let mtu = decode_acceptance(&said, path.mtu)
                    .ok_or(TransportError::Violation("an acceptance that makes no sense"))?;
                self.check_gid(id).map_err(&failed)?;
                id.establish(qp, PathSettings { mtu, ..path }).map_err(&failed)?;
                connection.mtu = mtu;
                Ok(())
            }
            Event::Rejected { said } => {
                let said = String::from_utf8_lossy(&said);
                let said = said.trim_end_matches('\0');
                if said.is_empty() {
                    return Err(failed(io::ErrorKind::ConnectionRefused.into()));
                }
                let address = self.peer.to_string();
                Err(TransportError::Refused { address, reason: said.to_owned() })
            }
            Event::Failed { what, cause } => {
                Err(failed(io::Error::new(cause.kind(), format!("{what}: {cause}"))))
            }
            other => Err(failed(io::Error::other(format!("unexpected {other:?}")))),
        }
    }

    /// The connection manager must have chosen the GID that is asked for: both sides' queue pairs go by
    /// what it has told them of each other.
    fn check_gid(&self, id: &Id) -> io::Result<()> {
        let Some(wanted) = self.options.gid_index else { return Ok(()) };
        let index = id.way()?.gid_index;
        if index == wanted {
            return Ok(());
        }
        let address = id.local().map_or_else(|| "the address".to_owned(), |it| it.ip().to_string());
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{address} has the GID with index {index}, not {wanted}"),
        ))
    }

    /// At the destination: accepts a connection into which the source puts messages. The source is
    /// there once the connection is established.
    pub(crate) fn begin_inlet(
        &self,
        request: Request,
        remote_access: RemoteAccess,
    ) -> Result<Inlet, TransportError> {
        let path = self.path(remote_access, self.agree(&request)?);
        let mut inlet = self.inlet(request.id, path)?;
        self.accept(&mut inlet.connection, path)?;
        Ok(inlet)
    }

    /// At the destination: as [`Self::begin_inlet`], a connection into which the destination puts
    /// messages.
    pub(crate) fn begin_outlet(&self, request: Request) -> Result<Outlet, TransportError> {
        let path = self.path(RemoteAccess::Nothing, self.agree(&request)?);
        let mut outlet = self.outlet(request.id, path)?;
        self.accept(&mut outlet.connection, path)?;
        Ok(outlet)
    }

    /// At the destination: accepts a connection, and waits until the source is there.
    pub(crate) fn accept_inlet(
        &self,
        request: Request,
        remote_access: RemoteAccess,
    ) -> Result<Inlet, TransportError> {
        let inlet = self.begin_inlet(request, remote_access)?;
        self.await_source(&inlet.connection)?;
        Ok(inlet)
    }

    /// As [`Self::accept_inlet`], for an outlet.
    pub(crate) fn accept_outlet(&self, request: Request) -> Result<Outlet, TransportError> {
        let outlet = self.begin_outlet(request)?;
        self.await_source(&outlet.connection)?;
        Ok(outlet)
    }

    /// The path MTU of a request; the other side is told why where there is none.
    fn agree(&self, request: &Request) -> Result<u32, TransportError> {
        let agreed = self.check_gid(&request.id).and_then(|()| {
            let way = request.id.way()?;
            let agreed = agree_on_mtu(request.preamble.mtu, self.mtu, way.mtu);
            agreed.ok_or_else(|| io::Error::other("a path MTU that there is not was asked for"))
        });
        agreed.map_err(|cause| {
            request.id.reject(cause.to_string().as_bytes());
            self.failed()(cause)
        })
    }

    fn accept(
        &self,
        connection: &mut Connection,
        path: PathSettings,
    ) -> Result<(), TransportError> {
        let (id, qp) = (&connection.id, &connection.qp);
        id.accept(qp, path, &encode_acceptance(path.mtu)).map_err(self.failed())?;
        connection.mtu = path.mtu;
        Ok(())
    }

    fn await_source(&self, connection: &Connection) -> Result<(), TransportError> {
        let deadline = after(self.options.connect_timeout);
        match event(&connection.id, &self.state, deadline, "accept a connection")? {
            Event::Established => Ok(()),
            other => Err(self.failed()(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                format!("the source went away while it connected: {other:?}"),
            ))),
        }
    }

    /// Guest memory, to be registered as the options say: all of it now, or none yet.
    pub(crate) fn register(
        &self,
        memory: &Arc<GuestMemory>,
        access: Access,
    ) -> Result<(Arc<Registered>, Registration), TransportError> {
        self.state.check()?;
        let chunk_bytes = self.chunk_bytes(memory.layout().len_bytes());
        let registered = Registered::new(&self.pd, memory, chunk_bytes, access);
        let cost = match self.options.registration {
            RegistrationMode::AtStart => registered.all_now()?,
            RegistrationMode::Ahead => Registration::default(),
        };
        Ok((Arc::new(registered), cost))
    }

    /// Most bytes of one memory region.
    fn chunk_bytes(&self, memory_bytes: u64) -> u64 {
        const UNIT_BYTES: u64 = 1 << 20;
        // At most half of what the device has: others use it too.
        let fewest = memory_bytes / (self.limits.max_mr_count / 2).max(1);
        let wanted = self.options.chunk_bytes.max(fewest).next_multiple_of(UNIT_BYTES);
        (wanted.min(self.limits.max_mr_bytes) & !(UNIT_BYTES - 1)).max(UNIT_BYTES)
    }

    /// Most bytes of one write.
    pub(crate) fn slice_bytes(&self) -> u64 {
        u64::from(self.options.slice_bytes).min(self.limits.max_message_bytes).max(4096) & !4095
    }
}

/// How long ends of pipes have to be heard of before a connection is closed.
pub(crate) const LINGER: Duration = Duration::from_secs(2);
