//! What the connections of one end of a link are made with and registered for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::ways::Way;
use pageferry::transport::{LinkId, Registration, TransportError};
use pageferry_identity::Security;

use super::device::check_port;
use crate::cm::{Id, PathSettings, READS_AT_ONCE, RemoteAccess};
use crate::connection::Connection;
use crate::memory::Registered;
use crate::options::{RdmaOptions, RegistrationMode};
use crate::pipe::{ACKS, Inlet, Outlet, RECEIVES};
use crate::preamble::{PREAMBLE_BYTES, Preamble, Purpose};
use crate::proof::{LinkKey, Proof};
use crate::state::{ChannelState, LinkState};
use crate::verbs::{Access, Limits, ProtectionDomain, QueuePair};

/// What every connection of one end of a link is made with.
#[derive(Debug, Clone)]
pub(crate) struct Workshop {
    pub(crate) options: RdmaOptions,
    pub(crate) state: Arc<LinkState>,
    pub(crate) pd: Arc<ProtectionDomain>,
    pub(crate) limits: Limits,
    /// The largest path MTU here, as verbs encode it.
    pub(crate) mtu: u32,
    pub(crate) peer: SocketAddr,
    /// Where connections that are asked for come from, if that is not left to the routes.
    pub(crate) from: Option<IpAddr>,
    /// Nobody is on the way.
    pub(crate) within_host: bool,
    /// Of a link whose two sides have shown who they are.
    pub(crate) key: Option<LinkKey>,
}

impl Workshop {
    /// For the device of an id.
    pub(crate) fn at(
        id: &Id,
        way: Way,
        options: RdmaOptions,
        state: Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let Way { to: peer, from } = way;
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let context = id.context().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let (limits, mtu) = check_port(&options, context, id.port()).map_err(failed)?;
        let pd = ProtectionDomain::new(context).map_err(failed)?;
        let within_host = id.is_within_host();
        Ok(Self { options, state, pd, limits, mtu, peer, from, within_host, key: None })
    }

    /// For the device of an id that leads to the same host another way.
    pub(crate) fn beside(&self, id: &Id, way: Way) -> Result<Self, TransportError> {
        let (options, state) = (self.options.clone(), Arc::clone(&self.state));
        Ok(Self { key: self.key.clone(), ..Self::at(id, way, options, state)? })
    }

    /// From here on the link notices what happens to the device.
    pub(crate) fn watch(&self, id: &Id) -> Result<(), TransportError> {
        let (context, patience) = (self.pd.context(), self.options.patience());
        self.state.watch(context, id.port(), patience).map_err(self.failed())
    }

    /// What a connection of this purpose says, but for a proof.
    pub(crate) fn preamble(&self, purpose: Purpose, migration: LinkId) -> [u8; PREAMBLE_BYTES] {
        let mtu = u8::try_from(self.mtu).unwrap_or(0);
        let sealed = matches!(self.options.security, Security::Tls(_));
        Preamble { purpose, migration, mtu, sealed, proof: Proof::default() }.encode()
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

    pub(super) fn failed(&self) -> impl Fn(io::Error) -> TransportError {
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

    pub(super) fn outlet(&self, id: Id, path: PathSettings) -> Result<Outlet, TransportError> {
        let depth = self.send_depth();
        let connection = self.prepare(id, (depth, ACKS), path)?;
        let immediate = self.pd.context().has_write_with_immediate();
        Outlet::new(connection, &self.pd, depth, self.options.signal_every, immediate)
    }

    pub(super) fn inlet(&self, id: Id, path: PathSettings) -> Result<Inlet, TransportError> {
        Inlet::new(self.prepare(id, (ACKS, RECEIVES), path)?, &self.pd)
    }

    /// The connection manager must have chosen the GID that is asked for: both sides' queue pairs go by
    /// what it has told them of each other.
    pub(super) fn check_gid(&self, id: &Id) -> io::Result<()> {
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

    /// Guest memory, to be registered: all of it now, or none yet.
    pub(crate) fn register(
        &self,
        memory: &Arc<GuestMemory>,
        access: Access,
        when: RegistrationMode,
    ) -> Result<(Arc<Registered>, Registration), TransportError> {
        self.state.check()?;
        let chunk_bytes = self.chunk_bytes(memory.layout().len_bytes());
        let registered = Registered::new(&self.pd, memory, chunk_bytes, access);
        let cost = match when {
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
