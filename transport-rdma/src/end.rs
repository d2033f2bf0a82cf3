//! What the source's end of a link and the destination's have in common.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    ControlChannel, Interrupt, LinkId, Registration, Stages, TransportError,
};

use crate::dial::Workshop;
use crate::kept::Kept;
use crate::memory::Registered;
use crate::options::{Mtu, RegistrationMode};
use crate::verbs::Access;

#[derive(Debug)]
pub(crate) struct End {
    stages: Stages<Arc<Registered>>,
    pub(crate) migration: LinkId,
    /// Of the control connection, as verbs encode it.
    mtu: u32,
    pub(crate) workshop: Workshop,
    /// Of links before this one, and for those after it.
    kept: Kept,
}

impl End {
    /// Of a link of which there are the control connections.
    pub(crate) fn new(
        migration: LinkId,
        control: ControlChannel,
        mtu: u32,
        workshop: Workshop,
    ) -> Self {
        Self { stages: Stages::new(control), migration, mtu, workshop, kept: Kept::default() }
    }

    /// It is one of several links of a migration.
    pub(crate) fn keep_in(&mut self, kept: &Kept) {
        self.kept = kept.clone();
    }

    pub(crate) fn path_mtu(&self) -> Mtu {
        Mtu::decoded(self.mtu)
    }

    pub(crate) fn peer_addr(&self) -> SocketAddr {
        self.workshop.peer
    }

    fn check(&self) -> Result<(), TransportError> {
        self.workshop.state.check()
    }

    pub(crate) fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.check()?;
        self.stages.control()
    }

    pub(crate) fn register(
        &mut self,
        memory: &Arc<GuestMemory>,
        access: Access,
    ) -> Result<Registration, TransportError> {
        self.check()?;
        let when = self.workshop.options.registration;
        let (registered, cost) =
            register_with(&self.kept, &mut self.workshop, memory, access, when)?;
        self.stages.register(registered);
        Ok(cost)
    }

    /// The same memory on the device of another rail's workshop.
    pub(crate) fn register_beside(
        &self,
        workshop: &mut Workshop,
        memory: &Arc<GuestMemory>,
        access: Access,
        when: RegistrationMode,
    ) -> Result<(Arc<Registered>, Registration), TransportError> {
        self.check()?;
        register_with(&self.kept, workshop, memory, access, when)
    }

    pub(crate) fn registered(&self) -> Result<Arc<Registered>, TransportError> {
        self.check()?;
        self.stages.registered()
    }

    /// Lanes for reads are opened, once, of the memory that is registered.
    pub(crate) fn open_reads(&mut self) -> Result<Arc<Registered>, TransportError> {
        self.check()?;
        self.stages.open_reads()
    }

    /// Opens data channels, once, for the memory that is registered.
    pub(crate) fn open<T>(
        &mut self,
        connect: impl FnOnce(&Self, &Arc<Registered>) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        let registered = self.registered()?;
        self.stages.check_closed()?;
        let channels = connect(self, &registered)?;
        self.stages.open();
        Ok(channels)
    }

    pub(crate) fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.workshop.state) as Arc<dyn Interrupt>
    }
}

/// Guest memory on the device of a workshop, which makes its connections in the domain of that memory from here on.
/// Registered, unless it was before.
fn register_with(
    kept: &Kept,
    workshop: &mut Workshop,
    memory: &Arc<GuestMemory>,
    access: Access,
    when: RegistrationMode,
) -> Result<(Arc<Registered>, Registration), TransportError> {
    let known = kept.find(workshop.pd.context(), memory, access);
    let (registered, cost) = if let Some(registered) = known {
        (registered, Registration::default())
    } else {
        let (registered, cost) = workshop.register(memory, access, when)?;
        kept.keep(&registered);
        (registered, cost)
    };
    workshop.pd = Arc::clone(registered.domain());
    Ok((registered, cost))
}
