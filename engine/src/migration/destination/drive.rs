//! The destination's driver.

mod returning;
mod taking_over;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use tracing::Span;

use super::closing::Closing;
use super::loading::load;
use super::populate::Populating;
use super::{Arrived, Destination, DestinationFailure, GuestAtDestination};
use crate::config::Timeouts;
use crate::control::handover::{
    DestinationAction, DestinationHandover, DestinationInput, DestinationState,
};
use crate::control::protocol::{
    Agreement, Conversation, FailureReason, Hello, Incompatibility, Message, PageSample, Prepare,
    Prepared, Side, Welcome, negotiate as negotiate_hello,
};
use crate::error::{Chain, Error};
use crate::host::{Guarded, caught};
use crate::machine::Machine;
use crate::migration::receiver::{self, ReceiverReport};
use crate::migration::session::{Item, Patience, SOURCE, Session, SessionSettings, unexpected};
use crate::pages::digest::Digest;
use crate::pages::memory::{GuestMemory, Layout, PageRange};
use crate::pages::sums::{PageSums, sum_of};
use crate::progress::{Event, EventSink, Shared, UnderWay};
use crate::snapshot::Phase;
use crate::stats::{ChannelGauge, Statistics};
use crate::threads::ThreadRole;
use crate::transport::{
    DestinationLink, LandingWatch, LinkPurpose, Rendezvous, Returning, RunKind, TransportError,
};
use returning::{Back, Epoch};

/// What a trial may take in all, as a multiple of the time for any page to land: it keeps others out.
const TRIAL_STALLS: u32 = 4;

/// How long the source has to end its channels in order once the guest runs here.
const FINISH: Duration = Duration::from_secs(1);

pub(super) struct Drive {
    span: Span,
    events: EventSink,
    timeouts: Timeouts,
    // Dropped in this order: threads end before the link they use.
    session: Session<ReceiverReport>,
    /// `None` while it is lost.
    link: Option<Box<dyn DestinationLink>>,
    rendezvous: Box<dyn Rendezvous>,
    settings: SessionSettings,
    epoch: Epoch,
    hello: Hello,
    welcome: Welcome,
    agreement: Agreement,
    handover: DestinationHandover,
    populate_threads: u16,
    populating: Arc<Populating>,
    gauges: Arc<Vec<CachePadded<ChannelGauge>>>,
    /// Checksums of what has landed, where both sides keep them.
    sums: Option<Arc<PageSums>>,
    /// The digest of memory that this side took for the switchover under way.
    digest: Option<Digest>,
    /// Whether the source's was the same.
    verified: bool,
    /// Whether the guest was paused at the source when it was saved, and stays so.
    paused: bool,
    /// When a trial is over, if this is one.
    trial_ends: Option<Patience>,
    /// For how long its first round is waited for, as long as there was none.
    first_round: Option<Patience>,
    closing: Closing,
    /// Pages that the load for the last switchover wrote.
    written: Vec<PageRange>,
    /// What became of the guest, once that is settled.
    fate: Option<Message>,
    /// Whether somebody had cancelled when that was too late: then it stays without effect.
    cancelled_late: bool,
    /// Reports that came when they did not matter. They do once a switchover is called off.
    late: VecDeque<ReceiverReport>,
    started: Instant,
    statistics: Statistics,
    // Last: it has ended when all that is gone.
    _under_way: UnderWay,
}

/// What the source said when all was loaded.
enum Answer {
    Commit,
    CalledOff,
}

/// Hears the greeting and answers if it does not fit.
pub(super) fn negotiate(
    destination: Destination,
    mut rendezvous: Box<dyn Rendezvous>,
) -> Result<Drive, Error> {
    let Destination { common, most_channels, populate_threads, events, shared, under_way } =
        destination;
    let span = tracing::info_span!("migration", side = "destination");
    let _span = span.clone().entered();
    let settings = SessionSettings {
        side: Side::Destination,
        spawn: common.spawn,
        shared,
        send_timeout: common.timeouts.stall,
        life_signs: None,
    };
    let mut link = accept(&mut *rendezvous, LinkPurpose::Begin, None, &settings)?;
    let started = Instant::now();
    let mut session = Session::on(&mut *link, settings.clone(), Conversation::default())?;
    let rejoins = caught("the rendezvous", || rendezvous.waits_again())?;
    let wishes = Wishes {
        most_channels,
        wants_data_ranges: populate_threads > 0,
        rejoins: rejoins && !common.timeouts.rejoin.is_zero(),
    };
    let patience = Patience::now("the source's greeting", common.timeouts.handshake);
    let heard = hear(&mut session, &wishes, patience);
    match heard {
        Ok((hello, agreement, welcome)) => {
            let at_most = common.timeouts.stall.saturating_mul(TRIAL_STALLS);
            let trial_ends = hello.trial.then(|| Patience::now("the end of a trial", at_most));
            let gauges = Arc::new(ChannelGauge::for_channels(agreement.channels));
            session.shared().board.set_gauges(Arc::clone(&gauges));
            if agreement.rejoins {
                session.outlives_its_link();
                let returning = Returning::by(hello.key.clone(), 0);
                caught("the transport", || link.expect_return(returning))?;
            }
            Ok(Drive {
                _under_way: under_way,
                span,
                events,
                timeouts: common.timeouts,
                session,
                link: Some(link),
                rendezvous,
                settings,
                epoch: Epoch::default(),
                hello,
                welcome,
                agreement,
                handover: DestinationHandover::default(),
                populate_threads,
                populating: Populating::new(),
                gauges,
                sums: None,
                digest: None,
                verified: false,
                paused: false,
                trial_ends,
                first_round: None,
                closing: Closing::default(),
                written: Vec::new(),
                fate: None,
                cancelled_late: false,
                late: VecDeque::new(),
                started,
                statistics: Statistics::default(),
            })
        }
        Err(error) => {
            session.tell(&error);
            session.close();
            Err(error)
        }
    }
}

/// Waits for somebody.
fn accept(
    rendezvous: &mut dyn Rendezvous,
    purpose: LinkPurpose,
    timeout: Option<Duration>,
    settings: &SessionSettings,
) -> Result<Box<dyn DestinationLink>, Error> {
    let interrupter = caught("the rendezvous", || rendezvous.interrupter())?;
    settings.shared.while_dialling(&interrupter, || rendezvous.accept(purpose, timeout))
}

/// Takes the checksums of what has landed.
fn watch(sums: Arc<PageSums>, memory: Arc<GuestMemory>) -> LandingWatch {
    let mut page = Vec::new();
    LandingWatch::new(move |runs| {
        for run in runs {
            match run.kind {
                // The transport has looked every run up.
                RunKind::Data => drop(sums.note_data(&memory, run.range, &mut page)),
                RunKind::Zero => sums.note_zero(run.range),
            }
        }
    })
}

/// What this side wants of a migration.
struct Wishes {
    most_channels: u16,
    wants_data_ranges: bool,
    rejoins: bool,
}

fn hear(
    session: &mut Session<ReceiverReport>,
    wishes: &Wishes,
    patience: Patience,
) -> Result<(Hello, Agreement, Welcome), Error> {
    let hello = match session.next_message(patience)? {
        Message::Hello(hello) => hello,
        other => return Err(unexpected(&other, "waiting for a greeting")),
    };
    let &Wishes { most_channels, wants_data_ranges, rejoins } = wishes;
    let (agreement, welcome) = negotiate_hello(&hello, most_channels, wants_data_ranges, rejoins)?;
    Ok((hello, agreement, welcome))
}

impl Drive {
    pub(super) fn layout(&self) -> &Layout {
        &self.hello.layout
    }

    pub(super) fn description(&self) -> &[u8] {
        &self.hello.description
    }

    pub(super) fn is_trial(&self) -> bool {
        self.hello.trial
    }

    pub(super) fn agreement(&self) -> Agreement {
        self.agreement
    }

    pub(super) fn decline(mut self, reason: &str) {
        let told = Message::Failed { reason: FailureReason::Declined, text: reason.to_owned() };
        self.session.say_last(&told);
        self.session.close();
    }

    pub(super) fn receive<M: Machine>(
        mut self,
        machine: M,
        memory: &Arc<GuestMemory>,
    ) -> Result<Arrived<M>, Box<DestinationFailure<M>>> {
        let _span = self.span.clone().entered();
        let mut machine = Guarded(machine);
        // What the host's code does is caught where it is called; this is for the engine's own defects.
        let result = caught("the engine", || self.run(&mut machine, memory)).flatten();
        let (verified, paused) = (self.verified, self.paused);
        let outcome = self.conclude(result);
        let statistics =
            caught("the end of the migration", || self.end()).unwrap_or_else(|panic| {
                tracing::error!(error = %panic.chain(), "not all was cleaned up");
                Statistics::default()
            });
        let machine = machine.0;
        match outcome {
            Ok(()) => Ok(Arrived { machine, paused, statistics, verified }),
            Err((error, guest)) => {
                Err(Box::new(DestinationFailure { machine, guest, error, statistics }))
            }
        }
    }

    /// Tells the host. A sink that panics hears no more.
    fn emit(&mut self, event: &Event) -> Result<(), Error> {
        caught("the event sink", || (self.events)(event))
            .inspect_err(|_| self.events = Box::new(|_| {}))
    }

    /// The same, where nothing that a sink does changes what follows.
    fn tell(&mut self, event: &Event) {
        if let Err(panic) = self.emit(event) {
            tracing::error!(error = %panic.chain(), "an event was not heard");
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        self.session.shared()
    }

    fn run<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), Error> {
        tracing::info_span!("setup").in_scope(|| self.set_up(machine, memory))?;
        self.shared().set_phase(Phase::PreCopy);
        self.statistics.setup = self.started.elapsed();

        let span = loop {
            let error = match self.take_in(machine, memory) {
                Ok(span) => break span,
                Err(error) => error,
            };
            match self.await_return(memory, || machine.unload(), error)? {
                Back::Copying => {}
                Back::Committed => break Span::current(),
            }
        };
        let outcome =
            span.in_scope(|| tracing::info_span!("commit").in_scope(|| self.take_over(machine)));
        self.tell_fate(memory);
        outcome
    }

    /// Pages and device state over one link, until the source commits. The span of that switchover.
    fn take_in<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        memory: &Arc<GuestMemory>,
    ) -> Result<Span, Error> {
        loop {
            let (prepare, state) =
                tracing::info_span!("pages").in_scope(|| self.take_in_pages(memory))?;
            let attempt = prepare.attempt;
            let damaged = self.damaged(memory, &prepare)?;
            if !damaged.is_empty() {
                // The source calls it off, and sends them again.
                let pages = damaged.iter().map(|range| u64::from(range.pages)).sum::<u64>();
                tracing::warn!(
                    pages,
                    "pages arrived otherwise than they were sent, in parts of memory of so many"
                );
                let (load_ns, written) = (0, Vec::new());
                let answer = Prepared { attempt, load_ns, written, damaged };
                self.session.send(&Message::Prepared(answer))?;
                continue;
            }
            let span = tracing::info_span!("switchover", attempt).entered();
            let prepared = load(machine, attempt, &state, memory.layout())?;
            self.statistics.device_state.bytes = prepare.state_bytes;
            self.statistics.device_state.load = Duration::from_nanos(prepared.load_ns);
            if self.handover.handle(DestinationInput::Loaded { attempt })
                != DestinationAction::SendPrepared(attempt)
            {
                return Err(unexpected(
                    &Message::Prepare(prepare),
                    "that switchover was called off",
                ));
            }
            self.written.clone_from(&prepared.written);
            self.session.send_committed(&Message::Prepared(prepared))?;
            self.emit(&Event::Loaded)?;
            self.paused = prepare.paused;
            match self.await_commit()? {
                Answer::Commit => {
                    self.handover.handle(DestinationInput::Commit);
                    return Ok(span.exit());
                }
                Answer::CalledOff => {
                    self.shared().set_phase(Phase::PreCopy);
                    machine.unload()?;
                }
            }
        }
    }

    /// All that comes before the first page.
    fn set_up<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), Error> {
        self.hello.check_layout(memory.layout())?;
        machine
            .check_state_schema(&self.hello.state_schema)?
            .map_err(|cause| Incompatibility::DeviceState(Chain::of(&*cause).to_string()))?;
        self.session.send(&Message::Welcome(self.welcome))?;
        let patience = Patience::now("the source to agree", self.timeouts.handshake);
        match self.session.next_message(patience)? {
            Message::Agreed { .. } => {}
            other => return Err(unexpected(&other, "waiting for the source to agree")),
        }
        self.emit(&Event::Agreed(self.agreement))?;
        if self.agreement.page_sums {
            self.sums = Some(Arc::new(PageSums::new(memory.layout())));
        }
        self.open_channels(memory)
    }

    fn open_channels(&mut self, memory: &Arc<GuestMemory>) -> Result<(), Error> {
        if self.link()?.capabilities().needs_registration {
            self.emit(&Event::Registering { bytes: memory.layout().len_bytes() })?;
        }
        let Self { session, link, .. } = self;
        let link = link.as_deref_mut().ok_or(TransportError::Closed)?;
        let registration = session.wait_in(|| link.register(memory))?;
        self.statistics.registration.add(&registration);
        self.emit(&Event::Registered(registration))?;
        self.session.send(&Message::Registered)?;
        let at_most = self.timeouts.registration(memory.layout().len_bytes());
        let patience = Patience::now("the source to register guest memory", at_most);
        match self.session.next_message(patience)? {
            Message::Registered => {}
            other => return Err(unexpected(&other, "waiting for the source's registration")),
        }
        let Self { session, link, agreement, timeouts, .. } = self;
        let link = link.as_deref_mut().ok_or(TransportError::Closed)?;
        let channels =
            session.wait_in(|| link.open_receivers(agreement.channels, timeouts.handshake))?;
        for (channel, mut pages) in (0..).zip(channels) {
            if let Some(sums) = &self.sums {
                let watch = watch(Arc::clone(sums), Arc::clone(memory));
                caught("the transport", || pages.watch_landings(watch))??;
            }
            self.closing.add(caught("the transport", || pages.interrupter())?);
            let gauges = Arc::clone(&self.gauges);
            let feed = self.session.feed();
            self.session.spawn(ThreadRole::Receiver(channel), move || {
                receiver::run(channel, pages, &gauges, &feed);
            })?;
        }
        self.session.send(&Message::Ready)?;
        // It looks at all of its memory first, which is no more than registering it was.
        self.first_round = Some(Patience::now("the source's first round", at_most));
        Ok(())
    }

    fn link(&mut self) -> Result<&mut (dyn DestinationLink + 'static), TransportError> {
        self.link.as_deref_mut().ok_or(TransportError::Closed)
    }

    /// Until the source says that everything is here: pages land by themselves, device state
    /// comes on the control channel.
    fn take_in_pages(&mut self, memory: &Arc<GuestMemory>) -> Result<(Prepare, Vec<u8>), Error> {
        let mut state = Vec::new();
        loop {
            let item = if let Some(report) = self.late.pop_front() {
                Item::Report(report)
            } else {
                // It decides how long that takes, and says something every second or so. What keeps it
                // from that, such as to look at all of its memory, takes longer with more of that.
                let registration = self.timeouts.registration(memory.layout().len_bytes());
                let silence = self.timeouts.stall.saturating_add(registration);
                let patient = || match self.trial_ends {
                    Some(ends) => ends,
                    None => Patience::now(SOURCE, silence),
                };
                self.session.next(self.first_round.unwrap_or_else(patient))?
            };
            match item {
                Item::Message(Message::Round { round, dirty_pages }) => {
                    self.first_round = None;
                    self.shared().board.begin_round(round, dirty_pages);
                    self.emit(&Event::RoundStarted { round, dirty_pages })?;
                }
                Item::Message(Message::DataRanges(ranges)) => {
                    self.populating.start(
                        &mut self.session,
                        self.populate_threads,
                        memory,
                        ranges,
                    )?;
                }
                Item::Message(Message::Switchover { .. }) => {
                    (self.digest, self.verified) = (None, false);
                    self.shared().set_phase(Phase::Switchover);
                }
                Item::Message(Message::Ping { number }) => {
                    self.session.send(&Message::Pong { number })?;
                }
                Item::Message(Message::CloseChannel { channel }) => self.closing.close(channel),
                Item::Message(Message::CalledOff { attempt }) => {
                    // In the middle of its state, or before.
                    state.clear();
                    self.called_off(attempt)?;
                    self.shared().set_phase(Phase::PreCopy);
                }
                Item::Message(Message::StateChunk(chunk)) => state.extend_from_slice(&chunk),
                Item::Message(Message::Verify { attempt }) => {
                    let digest = Digest::of(memory)?;
                    self.digest = Some(digest);
                    self.session.send(&Message::Verified { attempt, digest })?;
                }
                Item::Message(Message::Compared { digest, .. }) => self.compare(digest)?,
                Item::Message(Message::Prepare(prepare)) => return Ok((prepare, state)),
                Item::Message(other) => return Err(unexpected(&other, "pages were coming in")),
                Item::Report(ReceiverReport::Failed { error, .. }) if self.hello.trial => {
                    // It is over, most likely, and that was said on the control channel.
                    return Err(self.session.explain(error));
                }
                Item::Report(ReceiverReport::Failed { channel, error }) => {
                    let error = self.closing.explain(channel, error);
                    // The thread that placed what came on it is through, so nothing lands later.
                    let closed = Message::ChannelClosed { channel };
                    let others = self.agreement.channels - self.epoch.lost_channels - 1;
                    let survived = matches!(error, Error::Transport(TransportError::Lost { .. }))
                        && others > 0
                        && self.session.send(&closed).is_ok();
                    if !survived {
                        return Err(error);
                    }
                    tracing::warn!(channel, error = %error.chain(), "a data channel is lost");
                    self.statistics.lost_channels += 1;
                    self.epoch.lost_channels += 1;
                    self.gauges[usize::from(channel)].lost.store(true, Ordering::Relaxed);
                    self.emit(&Event::ChannelLost { channel })?;
                }
                Item::Report(ReceiverReport::Ended) => {}
            }
        }
    }

    /// Pages that arrived otherwise than they were sent, with those that lie near. Fails where only some are compared, and
    /// differ: nobody knows of the others, and what is known here would be lost with the link.
    fn damaged(&self, memory: &GuestMemory, prepare: &Prepare) -> Result<Vec<PageRange>, Error> {
        let (mut copy, mut differing) = (Vec::new(), 0);
        for &PageSample { region, page, sum } in &prepare.samples {
            differing += usize::from(sum_of(memory, region, page, &mut copy)? != sum);
        }
        if differing > 0 {
            return Err(Error::SamplesDiffer { pages: differing, of: prepare.samples.len() });
        }
        Ok(self.sums.as_ref().map(|sums| sums.differing(&prepare.sums)).unwrap_or_default())
    }

    /// The source lets the guest go on.
    fn called_off(&mut self, attempt: u32) -> Result<(), Error> {
        if self.handover.handle(DestinationInput::CalledOff { attempt })
            == DestinationAction::Refuse
        {
            let state = "no such switchover was under way";
            return Err(unexpected(&Message::CalledOff { attempt }, state));
        }
        self.shared().board.write(|written| written.called_off += 1);
        self.emit(&Event::CalledOff { attempt, stage: None, stood: Duration::ZERO })
    }

    /// Compares memory here with the source's word on its own.
    fn compare(&mut self, source_digest: Digest) -> Result<(), Error> {
        match self.digest {
            Some(here) if here == source_digest => {
                self.verified = true;
                Ok(())
            }
            Some(destination_digest) => {
                Err(Error::MemoryDiffers { source_digest, destination_digest })
            }
            None => Err(Error::Internal("memory was compared before it was asked for")),
        }
    }

    fn conclude(&mut self, result: Result<(), Error>) -> Result<(), (Error, GuestAtDestination)> {
        let Err(error) = result else {
            self.await_finish();
            return Ok(());
        };
        let error = self.session.explain(error);
        self.handover.handle(match error {
            Error::PeerFailed { .. } => DestinationInput::SourceFailed,
            _ => DestinationInput::Failed,
        });
        match self.handover.state() {
            DestinationState::Uncertain => {
                // A source that has not committed yet keeps its guest then.
                self.session.tell(&error);
                let error = Error::UncertainDestination(Box::new(error));
                Err((error, GuestAtDestination::Uncertain))
            }
            DestinationState::GaveBack => Err((error, GuestAtDestination::GivenBack)),
            DestinationState::Owner => Err((error, GuestAtDestination::Unresumed)),
            _ => {
                self.session.tell(&error);
                Err((error, GuestAtDestination::AtSource))
            }
        }
    }

    /// Waits a little for the channels to end in order, so that the source does not see us
    /// break them.
    fn await_finish(&mut self) {
        let patience = Patience::now("channels to end", FINISH);
        let ended = usize::from(self.epoch.lost_channels) + self.late.len();
        let mut missing = usize::from(self.agreement.channels).saturating_sub(ended);
        while missing > 0 {
            match self.session.next_committed(patience) {
                Ok(Item::Report(_)) => missing -= 1,
                Err(Error::TimedOut { .. }) => return,
                _ => {}
            }
        }
    }

    fn end(mut self) -> Statistics {
        self.populating.stop();
        self.session.close();
        let mut statistics = std::mem::take(&mut self.statistics);
        statistics.total = self.started.elapsed();
        statistics.populated = self.populating.statistics(self.populate_threads);
        let control_bytes = self.epoch.control_bytes + self.session.control_bytes();
        statistics.take_from(&self.gauges, control_bytes);
        statistics
    }
}
