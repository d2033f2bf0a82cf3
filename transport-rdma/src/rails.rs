//! Rails: the ways between two hosts that data channels are dealt out over, each by a device here and one there.
//!
//! A device reaches guest memory by memory regions of its own, so each rail has a table of them. The first rail is that of
//! the control connections, and its memory is registered before the first page, if that was asked for. A destination learns
//! of the others when the source asks for their tables; it registers memory for those while pages flow, in order, and a
//! page that overtakes it waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::ways::Way;
use pageferry::transport::{PageReceiver, PageSender, Registration, TransportError};

use crate::CAPABILITIES;
use crate::announce::{Announcer, Directory};
use crate::cm::{Id, RemoteAccess};
use crate::dial::{Request, Workshop, resolve};
use crate::end::End;
use crate::memory::Registered;
use crate::options::{RdmaOptions, RegistrationMode};
use crate::preamble::Purpose;
use crate::receiver::RdmaPageReceiver;
use crate::sender::RdmaPageSender;
use crate::trust::check_path;
use crate::verbs::Access;

/// How long all ways may be looked for that others can make up for.
const SEARCH: Duration = Duration::from_secs(4);

/// A rail at the source, beside the one of the control connections.
#[derive(Debug)]
pub(crate) struct Beside {
    way: Way,
    workshop: Workshop,
    registered: Arc<Registered>,
}

impl Beside {
    /// Those of these ways that there are, with guest memory registered on the devices that lead there. Nothing is asked of
    /// the destination. What is not there is done without, and so is a device that does not take the memory.
    pub(crate) fn find_all(
        end: &End,
        ways: &[Way],
        memory: &Arc<GuestMemory>,
    ) -> Result<(Vec<Self>, Registration), TransportError> {
        let (mut found, mut cost) = (Vec::new(), Registration::default());
        let until = Instant::now() + SEARCH;
        for way in ways {
            let left = until.saturating_duration_since(Instant::now());
            match Self::find(end, *way, left, memory) {
                Ok((rail, its)) => {
                    cost.add(&its);
                    found.push(rail);
                }
                Err(error) => Self::done_without(end, *way, &error)?,
            }
        }
        Ok((found, cost))
    }

    fn find(
        end: &End,
        way: Way,
        left: Duration,
        memory: &Arc<GuestMemory>,
    ) -> Result<(Self, Registration), TransportError> {
        let first = &end.workshop;
        let options = first.options.for_one_of_several();
        let connect_timeout = options.connect_timeout.min(left);
        let search = RdmaOptions { connect_timeout, ..options.clone() };
        let id = resolve(way, &search, &first.state)?;
        check_path(&options, &id).map_err(|reason| {
            let (address, reason) = (way.to.to_string(), reason.to_owned());
            TransportError::Security { address, reason }
        })?;
        let when = options.registration;
        let mut workshop = Workshop { options, ..first.beside(&id, way)? };
        let (registered, cost) =
            end.register_beside(&mut workshop, memory, Access::RemoteRead, when)?;
        Ok((Self { way, workshop, registered }, cost))
    }

    /// Says that a way is done without, and why; unless it is the link that is over.
    fn done_without(end: &End, way: Way, error: &TransportError) -> Result<(), TransportError> {
        end.workshop.state.check()?;
        let why = pageferry::Chain::of(error).to_string();
        let from = way.from.map(|from| format!(" from {from}")).unwrap_or_default();
        tracing::warn!("the way to {}{from} is done without: {why}", way.to);
        Ok(())
    }
}

/// A rail at the source whose table is there, or is coming.
struct Open<'a> {
    workshop: &'a Workshop,
    here: &'a Arc<Registered>,
    directory: Arc<Directory>,
    rail: u16,
}

impl<'a> Open<'a> {
    fn new(
        end: &End,
        workshop: &'a Workshop,
        here: &'a Arc<Registered>,
        rail: u16,
    ) -> Result<Self, TransportError> {
        let say = workshop.preamble(Purpose::Table { rail }, end.migration);
        let table = workshop.dial_inlet(&say)?;
        let directory = Arc::new(Directory::new(table, here.memory.layout()));
        Ok(Self { workshop, here, directory, rail })
    }

    fn dial(&self, end: &End, channel: u16) -> Result<Box<dyn PageSender>, TransportError> {
        let Self { workshop, here, directory, rail } = self;
        let say = workshop.preamble(Purpose::Pages { channel, rail: *rail }, end.migration);
        let outlet = workshop.dial_outlet(&say, RemoteAccess::Nothing)?;
        let (here, directory) = (Arc::clone(here), Arc::clone(directory));
        let slice_bytes = workshop.slice_bytes();
        Ok(Box::new(RdmaPageSender::new(outlet, here, directory, CAPABILITIES, slice_bytes)))
    }
}

/// Connects data channels, over all rails in turn. One that does not lead to the destination is done without.
pub(crate) fn dial_senders(
    end: &End,
    here: &Arc<Registered>,
    beside: &[Beside],
    channels: u16,
) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
    let first = Open::new(end, &end.workshop, here, 0)?;
    let mut others = Vec::new();
    // No rail without a channel.
    for (rail, Beside { way, workshop, registered }) in (1..channels).zip(beside) {
        match Open::new(end, workshop, registered, rail) {
            Ok(open) => others.push((*way, open)),
            Err(error) => Beside::done_without(end, *way, &error)?,
        }
    }
    let rails = 1 + others.len();
    let dial = |channel: u16| {
        let Some((way, rail)) =
            (usize::from(channel) % rails).checked_sub(1).and_then(|at| others.get(at))
        else {
            return first.dial(end, channel);
        };
        rail.dial(end, channel).or_else(|error| {
            Beside::done_without(end, *way, &error)?;
            first.dial(end, channel)
        })
    };
    (0..channels).map(dial).collect()
}

/// A rail at the destination.
pub(crate) struct Laid {
    workshop: Workshop,
    registered: Arc<Registered>,
    announcer: Arc<Announcer>,
}

impl Laid {
    /// Answers a request for a table.
    pub(crate) fn new(
        end: &End,
        memory: &Arc<GuestMemory>,
        rail: u16,
        table: Request,
    ) -> Result<Self, TransportError> {
        let peer = table.id.peer().unwrap_or(end.workshop.peer);
        let mut workshop = end.workshop.beside(&table.id, Way { to: peer, from: None })?;
        if rail > 0 {
            // Others make up for it.
            workshop.options = workshop.options.for_one_of_several();
        }
        // What is registered already is, whatever was asked for.
        let when = RegistrationMode::Ahead;
        let (registered, _) =
            end.register_beside(&mut workshop, memory, Access::RemoteWrite, when)?;
        let outlet = workshop.accept_outlet(table)?;
        let announcer = Arc::new(Announcer::new(outlet, Arc::clone(&registered), rail));
        announcer.announce()?;
        Ok(Self { workshop, registered, announcer })
    }

    /// Whether it is by the device that a request came to.
    pub(crate) fn is_of(&self, id: &Id) -> bool {
        id.context() == Some(self.workshop.pd.context())
    }

    pub(crate) fn accept(&self, pages: Request) -> Result<Box<dyn PageReceiver>, TransportError> {
        let inlet = self.workshop.accept_inlet(pages, RemoteAccess::Write)?;
        let (registered, announcer) = (Arc::clone(&self.registered), Arc::clone(&self.announcer));
        Ok(Box::new(RdmaPageReceiver::new(inlet, registered, announcer)))
    }
}
