//! The source's driver: one straight line from the handshake to the handover, and one place
//! where every failure ends.

mod channels;
mod closing;
mod reopening;
mod returning;
mod rounds;
mod steering;
mod switchover;
mod trial;
mod waiting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;

use super::{Departed, GuestAtSource, Source, SourceFailure};
use crate::config::PageChecks;
use crate::control::convergence::Convergence;
use crate::control::handover::{SourceHandover, SourceInput, SourceState};
use crate::control::protocol::{
    Agreement, Conversation, Hello, MAX_DATA_RANGES, MAX_STATE_SCHEMA_BYTES, Message, MigrationKey,
    Side,
};
use crate::error::Error;
use crate::host::{Guarded, caught};
use crate::machine::{GuestAlarm, Machine};
use crate::migration::sender::{self, SenderReport, SenderSetup};
use crate::migration::session::{LIFE_SIGNS, Patience, Session, SessionSettings, unexpected};
use crate::pages::dirty::DirtySources;
use crate::pages::memory::{GuestMemory, PageRange};
use crate::pages::sums::PageSums;
use crate::progress::Event;
use crate::stats::{Ending, Statistics};
use crate::threads::ThreadRole;
use crate::transport::{Capabilities, Connector, LinkPurpose, SourceLink, TransportError};
use channels::Channels;
use closing::Closing;
use reopening::Reopening;
use returning::{Back, Epoch};
use steering::Steering;
use switchover::Switchover;

/// Who it was, if one of them panics.
const DIRTY_SOURCES: &str = "a dirty source";

/// Moves the guest; everything that began is ended, whatever happens.
pub(super) fn migrate<M: Machine>(
    source: Source,
    machine: M,
    memory: &Arc<GuestMemory>,
    dirty: DirtySources,
    mut connector: Box<dyn Connector>,
    started: Instant,
) -> Result<Departed<M>, Box<SourceFailure<M>>> {
    let _span = tracing::info_span!("migration", side = "source").entered();
    let mut statistics = Statistics::default();
    let mut source = source;
    let mut machine = Guarded(machine);
    let settings = SessionSettings {
        side: Side::Source,
        spawn: Arc::clone(&source.common.spawn),
        shared: Arc::clone(&source.shared),
        send_timeout: source.common.timeouts.stall,
        life_signs: Some(LIFE_SIGNS),
    };
    let begun = begin(&mut *connector, settings.clone());
    let (key, link, session) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            statistics.total = started.elapsed();
            let (guest, machine) = (GuestAtSource::untouched(&machine.0), machine.0);
            return Err(Box::new(SourceFailure { machine, guest, error, statistics }));
        }
    };
    let mut drive = Drive {
        session,
        link: Some(link),
        connector,
        settings,
        epoch: Epoch::first(key),
        reopening: None,
        memory: Arc::clone(memory),
        dirty: Arc::new(dirty),
        sums: None,
        damages: 0,
        tracking: false,
        handover: SourceHandover::default(),
        may_be_released: false,
        must_resume: false,
        paused: false,
        stands_since: Instant::now(),
        channels: Channels::new(memory.layout().clone(), source.channels),
        written_there: Vec::new(),
        damaged_there: Vec::new(),
        closing: Closing::new(source.channels),
        late: VecDeque::new(),
        convergence: Convergence::new(source.shared.settings()),
        steering: Steering::default(),
        clock: Instant::now(),
        harvested: Instant::now(),
        stop: Arc::new(AtomicBool::new(false)),
        statistics,
        source: &mut source,
    };
    drive.source.shared.board.set_gauges(Arc::clone(&drive.channels.gauges));
    // What the host's code does is caught where it is called; this is for the engine's own defects.
    let result = caught("the engine", || drive.run(&mut machine, started)).flatten();
    let outcome = drive.conclude(result, &mut machine);
    let paused = drive.paused;
    let mut statistics =
        caught("the end of the migration", || drive.end()).unwrap_or_else(|panic| {
            tracing::error!(error = %panic.chain(), "not all was cleaned up");
            Statistics::default()
        });
    statistics.total = started.elapsed();
    let machine = machine.0;
    match outcome {
        Ok(()) => Ok(Departed { machine, paused, statistics }),
        Err(ended) => {
            let (error, guest) = *ended;
            Err(Box::new(SourceFailure { machine, guest, error, statistics }))
        }
    }
}

/// Makes the first link, and a key for the migration.
#[expect(clippy::type_complexity, reason = "what a migration begins with")]
fn begin(
    connector: &mut dyn Connector,
    settings: SessionSettings,
) -> Result<(MigrationKey, Box<dyn SourceLink>, Session<SenderReport>), Error> {
    let failed = |cause| Error::Host { operation: "make a key for the migration", cause };
    let key = MigrationKey::random().map_err(failed)?;
    let mut link = dial(connector, LinkPurpose::Begin, &settings)?;
    let session = Session::on(&mut *link, settings, Conversation::default())?;
    Ok((key, link, session))
}

fn dial(
    connector: &mut dyn Connector,
    purpose: LinkPurpose,
    settings: &SessionSettings,
) -> Result<Box<dyn SourceLink>, Error> {
    let interrupter = caught("the connector", || connector.interrupter())?;
    settings.shared.while_dialling(&interrupter, || connector.connect(purpose))
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
struct Drive<'a> {
    source: &'a mut Source,
    // Dropped in this order: senders learn that there are no more
    // commands, threads end, and only then the link they use.
    channels: Channels,
    session: Session<SenderReport>,
    /// `None` while it is lost.
    link: Option<Box<dyn SourceLink>>,
    connector: Box<dyn Connector>,
    settings: SessionSettings,
    epoch: Epoch,
    /// `None` where it is the only link.
    reopening: Option<Reopening>,
    memory: Arc<GuestMemory>,
    dirty: Arc<DirtySources>,
    /// Checksums of what was sent, where both sides keep them.
    sums: Option<Arc<PageSums>>,
    /// How often the destination had other ones.
    damages: u32,
    /// Whether `dirty` was started.
    tracking: bool,
    handover: SourceHandover,
    /// Whether the machine was asked to release its resources: it may have, also if it failed.
    may_be_released: bool,
    /// Whether the guest may stand still outside of a switchover.
    must_resume: bool,
    /// Whether the guest was paused before the last switchover paused it.
    paused: bool,
    /// When it was paused for a switchover last, or committed.
    stands_since: Instant,
    closing: Closing,
    /// Pages that the destination wrote as it loaded device state, since the last harvest.
    written_there: Vec<PageRange>,
    /// Pages that arrived otherwise than they were sent, or lie near such, since the last harvest.
    damaged_there: Vec<PageRange>,
    /// Reports that came while nobody waited for any.
    late: VecDeque<SenderReport>,
    convergence: Convergence,
    steering: Steering,
    /// What `now` is counted from.
    clock: Instant,
    /// When the trackers were asked last, or began.
    harvested: Instant,
    stop: Arc<AtomicBool>,
    statistics: Statistics,
}

impl Drive<'_> {
    fn run<M: Machine>(&mut self, machine: &mut Guarded<M>, started: Instant) -> Result<(), Error> {
        let shared = Arc::clone(&self.source.shared);
        machine.set_alarm(GuestAlarm::new(move |cause| shared.raise(cause)))?;
        let agreement = tracing::info_span!("setup").in_scope(|| self.set_up(machine))?;
        self.statistics.setup = started.elapsed();
        self.clock = Instant::now();
        self.harvested = self.clock;
        if let Some(at_most) = self.source.trial {
            self.try_out(machine, at_most)?;
            return Err(Error::Trial(self.convergence.outlook().copied()));
        }
        while let Err(error) = self.move_guest(machine, agreement) {
            match self.come_back(machine, agreement, error)? {
                Back::Copying => {}
                Back::HandedOver => return Ok(()),
            }
        }
        Ok(())
    }

    /// Rounds and switchovers, over one link.
    fn move_guest<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        agreement: Agreement,
    ) -> Result<(), Error> {
        loop {
            self.pre_copy(machine)?;
            match self.switch_over(machine, agreement)? {
                Switchover::Done => return Ok(()),
                Switchover::CalledOff => {}
            }
        }
    }

    fn link(&mut self) -> Result<&mut (dyn SourceLink + 'static), TransportError> {
        self.link.as_deref_mut().ok_or(TransportError::Closed)
    }

    /// All that comes before the first page.
    fn set_up<M: Machine>(&mut self, machine: &mut Guarded<M>) -> Result<Agreement, Error> {
        let (agreement, wants_data_ranges) = self.handshake(machine)?;
        self.open_channels(agreement)?;
        if wants_data_ranges {
            let ranges = self.memory.data_ranges(MAX_DATA_RANGES / 4);
            self.session.send(&Message::DataRanges(ranges))?;
        }
        caught(DIRTY_SOURCES, || self.dirty.start())??;
        self.tracking = true;
        Ok(agreement)
    }

    /// Since the transfer began: the time of all that is learned and decided.
    fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// A moment on that clock as one of the system's; `None` if it never comes.
    fn instant(&self, at: Duration) -> Option<Instant> {
        self.clock.checked_add(at)
    }

    /// Tells the host. A sink that panics hears no more.
    fn emit(&mut self, event: &Event) -> Result<(), Error> {
        caught("the event sink", || (self.source.events)(event))
            .inspect_err(|_| self.source.events = Box::new(|_| {}))
    }

    /// The same, where nothing that a sink does changes what follows.
    fn tell(&mut self, event: &Event) {
        if let Err(panic) = self.emit(event) {
            tracing::error!(error = %panic.chain(), "an event was not heard");
        }
    }

    fn handshake<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
    ) -> Result<(Agreement, bool), Error> {
        let mut hello = Hello::new(
            self.epoch.key.clone(),
            self.memory.layout().clone(),
            self.source.channels,
            self.source.verify,
            std::mem::take(&mut self.source.description),
        );
        hello.trial = self.source.trial.is_some();
        hello.rejoins = !hello.trial
            && !self.source.common.timeouts.rejoin.is_zero()
            && caught("the connector", || self.connector.redials())?;
        hello.page_sums = self.keeps_sums()? && !hello.trial;
        hello.state_schema = machine.state_schema()?;
        if hello.state_schema.len() > MAX_STATE_SCHEMA_BYTES {
            return Err(Error::Configuration(format!(
                "schema of device state of {} bytes, at most {MAX_STATE_SCHEMA_BYTES} are possible",
                hello.state_schema.len()
            )));
        }
        let patience = Patience::now(
            "the destination's answer to the greeting",
            self.source.common.timeouts.handshake,
        );
        self.session.send(&Message::Hello(hello.clone()))?;
        let (agreement, wants_data_ranges) = match self.session.next_message(patience)? {
            Message::Welcome(welcome) => {
                let agreement = hello.check(&welcome)?;
                self.session.send(&welcome.agreed(&hello))?;
                (agreement, welcome.wants_data_ranges)
            }
            other => return Err(unexpected(&other, "waiting for a welcome")),
        };
        if agreement.rejoins {
            self.session.outlives_its_link();
            self.reopening = Some(Reopening::new(agreement));
        }
        if agreement.page_sums {
            self.sums = Some(Arc::new(PageSums::new(self.memory.layout())));
        }
        self.emit(&Event::Agreed(agreement))?;
        Ok((agreement, wants_data_ranges))
    }

    /// Whether both sides are to keep checksums of pages.
    fn keeps_sums(&mut self) -> Result<bool, Error> {
        let Capabilities { protects_pages, tells_landings, one_sided_write, .. } =
            self.link()?.capabilities();
        match self.source.page_checks {
            PageChecks::Off => Ok(false),
            PageChecks::Auto => Ok(!protects_pages && tells_landings),
            PageChecks::On if tells_landings || one_sided_write => Ok(tells_landings),
            PageChecks::On => Err(Error::Configuration(
                "pages cannot be checked over this transport: it does not tell what has landed"
                    .to_owned(),
            )),
        }
    }

    /// Whether some pages are compared with those at the destination, whose CPU sees none land.
    fn takes_samples(&mut self) -> Result<bool, Error> {
        let Capabilities { protects_pages, one_sided_write, .. } = self.link()?.capabilities();
        Ok(one_sided_write
            && self.sums.is_none()
            && match self.source.page_checks {
                PageChecks::Off => false,
                PageChecks::Auto => !protects_pages,
                PageChecks::On => true,
            })
    }

    fn open_channels(&mut self, agreement: Agreement) -> Result<(), Error> {
        let capabilities = self.link()?.capabilities();
        if capabilities.needs_registration {
            self.emit(&Event::Registering { bytes: self.memory.layout().len_bytes() })?;
        }
        let Self { session, link, memory, .. } = self;
        let link = link.as_deref_mut().ok_or(TransportError::Closed)?;
        let registration = session.wait_in(|| link.register(memory))?;
        self.statistics.registration.add(&registration);
        self.emit(&Event::Registered(registration))?;
        self.session.send(&Message::Registered)?;
        let at_most = self.source.common.timeouts.registration(self.memory.layout().len_bytes());
        let patience = Patience::now("the destination to register guest memory", at_most);
        match self.session.next_message(patience)? {
            Message::Registered => {}
            other => return Err(unexpected(&other, "waiting for the destination's registration")),
        }
        let Self { session, link, .. } = self;
        let link = link.as_deref_mut().ok_or(TransportError::Closed)?;
        let channels = session.wait_in(|| link.open_senders(agreement.channels))?;
        let patience =
            Patience::now("the destination to be ready", self.source.common.timeouts.handshake);
        match self.session.next_message(patience)? {
            Message::Ready => {}
            other => return Err(unexpected(&other, "waiting for the destination to be ready")),
        }
        for (channel, pages) in (0..).zip(channels) {
            let (commands, theirs) = unbounded();
            let interrupt = caught("the transport", || pages.interrupter())?;
            let setup = SenderSetup {
                channel,
                memory: Arc::clone(&self.memory),
                sources: Arc::clone(&self.dirty),
                pages,
                capabilities,
                batch_bytes: self.source.batch_bytes,
                sums: self.sums.clone(),
                stall: self.source.common.timeouts.stall,
                gauges: Arc::clone(&self.channels.gauges),
                stop: Arc::clone(&self.stop),
                shared: Arc::clone(self.session.shared()),
                commands: theirs,
                feed: self.session.feed(),
                leftovers: self.channels.leftovers(),
            };
            self.session.spawn(ThreadRole::Sender(channel), move || sender::run(setup))?;
            self.channels.add(commands, interrupt);
        }
        Ok(())
    }

    /// What to do about the result: tell the peer, and let the guest run if it is ours.
    fn conclude<M: Machine>(
        &mut self,
        result: Result<(), Error>,
        machine: &mut Guarded<M>,
    ) -> Result<(), Box<(Error, GuestAtSource)>> {
        let Err(error) = result else {
            self.statistics.convergence = match self.statistics.throttle_max_percent {
                0 => Ending::Converged,
                _ => Ending::Throttled,
            };
            self.tell(&Event::there(self.paused));
            self.channels.finish();
            return Ok(());
        };
        // Whoever lets it run again, now or by hand, has it at its own speed.
        self.end_throttling(machine);
        let was_stopped = self.must_resume || self.handover.state() != SourceState::Running;
        self.handover.handle(SourceInput::Failed);
        if self.handover.state() == SourceState::Uncertain {
            let error = self.session.explain(error);
            return Err(Box::new((Error::Uncertain(Box::new(error)), GuestAtSource::Uncertain)));
        }
        if matches!(error, Error::NotConverging { .. }) {
            self.statistics.convergence = Ending::GaveUp;
        }
        // The guest first: it has stood still long enough.
        let guest = if was_stopped {
            self.take_back(machine)
        } else {
            GuestAtSource::untouched(&machine.0)
        };
        let error = self.session.explain(error);
        self.session.tell(&error);
        if matches!(guest, GuestAtSource::Running) && !matches!(error, Error::Trial(_)) {
            self.tell(&Event::GuestKept);
        }
        Err(Box::new((error, guest)))
    }

    fn take_back<M: Machine>(&mut self, machine: &mut Guarded<M>) -> GuestAtSource {
        let reacquired = if self.may_be_released { machine.reacquire_resources() } else { Ok(()) };
        let paused = self.paused;
        let resumed = reacquired.and_then(|()| if paused { Ok(()) } else { machine.resume() });
        match resumed {
            Ok(()) if paused => GuestAtSource::StillPaused,
            Ok(()) => GuestAtSource::Running,
            Err(error) => GuestAtSource::Paused(error),
        }
    }

    /// Ends threads, puts back what has not landed, ends tracking.
    fn end(mut self) -> Statistics {
        let handed_over = self.handover.state() == SourceState::HandedOver;
        if !handed_over {
            self.stop.store(true, Ordering::Relaxed);
        }
        // Senders end by their last command or by the lack of further ones; those that wait
        // inside the transport by the interrupt.
        let channels = self.channels.live();
        self.channels.dismiss();
        if handed_over {
            self.await_finish(channels);
        }
        self.session.close();
        if self.tracking {
            if !handed_over && let Err(error) = self.put_back() {
                tracing::warn!(error = %error.chain(), "dirty pages were not put back");
            }
            let stopped = caught(DIRTY_SOURCES, || self.dirty.stop());
            if let Err(error) = stopped.and_then(|stopped| Ok(stopped?)) {
                tracing::warn!(error = %error.chain(), "dirty tracking goes on");
            }
        }
        let mut statistics = std::mem::take(&mut self.statistics);
        let control_bytes = self.epoch.control_bytes + self.session.control_bytes();
        statistics.take_from(&self.channels.gauges, control_bytes);
        statistics
    }

    /// Gives the trackers back what has not landed.
    fn put_back(&mut self) -> Result<(), Error> {
        self.channels.take_back()?;
        let dirty = self.channels.dirty()?;
        Ok(caught(DIRTY_SOURCES, || self.dirty.put_back(dirty))??)
    }
}
