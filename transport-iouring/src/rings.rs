//! What a host asks first: whether there is io_uring, and how it will be used.

use std::io;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{Registration, TransportError};

use crate::features::{Features, Unavailable};
use crate::options::IoUringOptions;
use crate::probe::probe;
use crate::ring::Ring;
use crate::setup::RingSetup;
use crate::table::Table;

/// io_uring as this process may use it.
///
/// ```
/// use pageferry::transport::Link;
/// use pageferry_iouring::{IoUringOptions, Rings};
/// use pageferry_tcp::{TcpOptions, connect};
///
/// # fn migrate_to(address: &str) -> Result<Box<dyn Link>, pageferry::transport::TransportError> {
/// // io_uring where there is one, and else the same sockets without it.
/// let link = connect(address, TcpOptions::default())?;
/// Ok(match Rings::new(IoUringOptions::default()) {
///     Ok(rings) => Box::new(rings.source_link(link)),
///     Err(_unavailable) => Box::new(link),
/// })
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Rings {
    options: IoUringOptions,
    features: Features,
}

impl Rings {
    /// Asks the kernel. Leaves nothing behind.
    pub fn new(options: IoUringOptions) -> Result<Self, Unavailable> {
        let features = probe()?.without(options.without).consistent();
        tracing::debug!(?features, "io_uring");
        let rings = Self { options, features };
        // One as it will be used: it is larger than those that the features were asked of.
        let ring = rings.setup().build();
        ring.map_err(Unavailable::of_setup)?;
        Ok(rings)
    }

    /// What of the kernel's io_uring is used.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The settings given.
    pub fn options(&self) -> &IoUringOptions {
        &self.options
    }

    /// Registers guest memory, or goes on without if that is allowed.
    pub(crate) fn register(
        &self,
        memory: &Arc<GuestMemory>,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<(Option<Arc<Table>>, Registration), TransportError> {
        match Table::register(memory, &self.setup(), check) {
            Ok((table, cost)) => Ok((Some(table), cost)),
            Err(error @ TransportError::Register { .. }) if !self.options.require_registration => {
                let error = pageferry::Chain::of(&error);
                tracing::warn!("guest memory is not registered, and goes on so: {error}");
                Ok((None, Registration::default()))
            }
            Err(error) => Err(error),
        }
    }

    /// A ring for each channel of a link; `None` if there is no room for them, or they are of no use, and it may
    /// go on without.
    pub(crate) fn for_channels(
        &self,
        channels: u16,
        table: Option<&Arc<Table>>,
        encrypts_in_process: bool,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<Option<Vec<Ring>>, TransportError> {
        let rings =
            || (0..channels).map(|_| Ring::new(self.setup(), table.cloned(), &check)).collect();
        let rings: Result<Vec<_>, _> = if encrypts_in_process {
            let why = "TLS is in this process, and not in the kernel (modprobe tls): nothing is left to a ring";
            let cause = io::Error::new(io::ErrorKind::Unsupported, why);
            Err(TransportError::Io { operation: "use io_uring", cause })
        } else {
            rings()
        };
        match rings {
            Ok(rings) => Ok(Some(rings)),
            Err(error @ (TransportError::Io { .. } | TransportError::Register { .. }))
                if !self.options.require_rings =>
            {
                let error = pageferry::Chain::of(&error);
                tracing::warn!("io_uring is not used for {channels} channels: {error}");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn setup(&self) -> RingSetup {
        RingSetup { features: self.features, sq_poll: self.options.sq_poll }
    }
}
