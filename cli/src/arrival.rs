//! A guest that is waited for, of any machine: whoever comes and brings none is told of, and the next is
//! waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Receiver;
use indicatif::HumanBytes;
use pageferry::memory::GuestMemory;
use pageferry::threads::PinnedThreads;
use pageferry::transport::{Rendezvous, Warnings};
use pageferry::{
    Arrived, Blame, Destination, DestinationFailure, Event, GuestAtDestination, Machine, Offer,
};

use crate::events::Happening;
use crate::metrics::Side;
use crate::observers::Observers;
use crate::outcome::{Failure, Outcome};
use crate::report::{GuestAt, Report};
use crate::transport::{Begun, Chosen, LinkArgs};
use crate::watch::Watch;
use crate::wishes::{Wish, accept, unless_interrupted, until_interrupted};

/// How guests are taken in.
#[derive(Debug)]
pub struct Reception<'a> {
    /// Time limits.
    pub link: &'a LinkArgs,
    /// CPUs to bind the threads of data channels to, in turn.
    pub pin: &'a [usize],
    /// Threads that allocate the guest's memory ahead of the data.
    pub populate: u16,
    /// Who is told of it as it happens.
    pub observers: &'a Observers,
}

/// A guest that was on its way.
#[derive(Debug)]
pub struct Arrival<M> {
    transport: &'static str,
    channels: u16,
    memory_bytes: u64,
    /// Whether it is here.
    pub result: Result<Arrived<M>, Box<DestinationFailure<M>>>,
    /// Whether a Ctrl-C came meanwhile: too late if the guest is here.
    cancelled: bool,
}

/// What came of somebody who connected.
enum Come<M> {
    /// Its guest was on its way, at least.
    Guest(Box<Arrival<M>>),
    /// Nothing: it was no source, or not one for this host, or left too early. Why.
    Stranger(String),
    /// Nothing, and a Ctrl-C came meanwhile.
    Interrupted,
}

impl Reception<'_> {
    /// Listens, says where, and waits until a guest was on its way, for which `home` makes the machine. `Err`
    /// if a Ctrl-C came first, and when.
    pub fn await_guest<M: Machine + Send>(
        &self,
        chosen: Chosen,
        address: &str,
        wishes: &Receiver<Wish>,
        home: impl Fn(&Offer) -> Result<(M, Arc<GuestMemory>), Failure> + Sync,
    ) -> Result<Result<Box<Arrival<M>>, String>, Failure> {
        let come = self.await_anybody(chosen, address, wishes, home)?;
        match &come {
            Ok(arrival) => self.observers.ended(Side::Destination, &arrival.report()),
            Err(why) => self.observers.events.ended_before(why),
        }
        Ok(come)
    }

    /// As [`Reception::await_guest`], and tells nobody how it ends.
    fn await_anybody<M: Machine + Send>(
        &self,
        chosen: Chosen,
        address: &str,
        wishes: &Receiver<Wish>,
        home: impl Fn(&Offer) -> Result<(M, Arc<GuestMemory>), Failure> + Sync,
    ) -> Result<Result<Box<Arrival<M>>, String>, Failure> {
        let address = address.to_owned();
        // Looking up a name may take long, and nothing ends that.
        let listen = move || chosen.listen(&address).map(|acceptor| (chosen, acceptor));
        let Some(listening) = unless_interrupted(wishes, listen)? else {
            return Ok(Err("interrupted before a guest came".to_owned()));
        };
        let (chosen, acceptor) = listening?;
        // Scripts read the port from this line.
        let address = acceptor.local_addr();
        say!("listening on {address}");
        self.observers.events.tell(Happening::Listening { address: address.to_string() });
        // Strangers may be many.
        let lines = Warnings::default();
        // Others are refused at once when this returns, and do not wait for a guest's home that is taken.
        loop {
            let Some((peer, link)) = accept(&chosen, &acceptor, wishes)? else {
                return Ok(Err("interrupted before a guest came".to_owned()));
            };
            let told = match lines.turn() {
                Some(0) => Some(String::new()),
                left_out => left_out.map(|others| format!(", after {others} others")),
            };
            if let Some(others) = &told {
                say!("a source connected from {peer}{others}");
                self.observers.events.tell(Happening::Connected { peer: peer.to_string() });
            }
            let rendezvous = Box::new(Begun::with(link, chosen.rendezvous(&acceptor)));
            match self.take_in(rendezvous, chosen.name(), wishes, told.is_some(), &home)? {
                Come::Stranger(why) if told.is_some() => {
                    say!("no guest came from {peer}: {why}; the next is waited for");
                }
                Come::Stranger(_) => {}
                Come::Interrupted => return Ok(Err("cancelled before a guest came".to_owned())),
                Come::Guest(arrival) => return Ok(Ok(arrival)),
            }
        }
    }

    /// Takes in the guest of somebody who connected, if there is one.
    fn take_in<M: Machine + Send>(
        &self,
        rendezvous: Box<dyn Rendezvous>,
        transport: &'static str,
        wishes: &Receiver<Wish>,
        tell: bool,
        home: &(impl Fn(&Offer) -> Result<(M, Arc<GuestMemory>), Failure> + Sync),
    ) -> Result<Come<M>, Failure> {
        let destination = Destination::new()
            .threads(Arc::new(PinnedThreads::new(self.pin.to_vec())))
            .timeouts(self.link.timeouts())
            .populate_ahead(self.populate);
        let handle = destination.handle();
        let watch = Watch::start(handle.clone(), self.observers, Side::Destination)?;
        let mut show = watch.sink();
        let begun = Arc::new(AtomicBool::new(false));
        let begins = Arc::clone(&begun);
        let destination = destination.on_event(move |event| {
            if matches!(event, Event::RoundStarted { .. }) {
                begins.store(true, Ordering::Relaxed);
            }
            // Of a stranger there is nothing to say, until it may be none.
            if tell || begins.load(Ordering::Relaxed) {
                show(event);
            }
        });
        let migrate =
            || take_in_uninterrupted(destination, rendezvous, transport, &begun, tell, home);
        let (come, cancelled) = until_interrupted(wishes, migrate, || handle.cancel())?;
        Ok(match come {
            Come::Guest(arrival) => Come::Guest(Box::new(Arrival { cancelled, ..*arrival })),
            _ if cancelled => Come::Interrupted,
            come => come,
        })
    }
}

/// As [`Reception::take_in`], and hears nobody. `begun` is set once the guest is on its way.
fn take_in_uninterrupted<M: Machine>(
    destination: Destination,
    rendezvous: Box<dyn Rendezvous>,
    transport: &'static str,
    begun: &AtomicBool,
    tell: bool,
    home: &impl Fn(&Offer) -> Result<(M, Arc<GuestMemory>), Failure>,
) -> Come<M> {
    let offer = match destination.negotiate(rendezvous) {
        Ok(offer) => offer,
        Err(error) => return Come::Stranger(error.chain().to_string()),
    };
    let (channels, memory_bytes) = (offer.channels(), offer.layout().len_bytes());
    let trial = offer.is_trial();
    if tell {
        let what = if trial { "asks for" } else { "offers" };
        say!("it {what} a guest of {}", HumanBytes(memory_bytes));
    }
    let (machine, memory) = match home(&offer) {
        Ok(home) => home,
        Err(error) => {
            let reason = pageferry::Chain::of(&*error).to_string();
            offer.decline(&reason);
            return Come::Stranger(reason);
        }
    };
    let result = offer.receive(machine, &memory);
    // No source breaks the protocol: who does is not the one that is waited for.
    let is_stranger = |failure: &DestinationFailure<M>| {
        failure.guest == GuestAtDestination::AtSource
            && failure.error.blame() == Blame::PeerMisbehaved
    };
    match result {
        Err(failure) if trial && failure.guest == GuestAtDestination::AtSource => {
            Come::Stranger(failure.error.chain().to_string())
        }
        Err(failure) if !begun.load(Ordering::Relaxed) || is_stranger(&failure) => {
            Come::Stranger(failure.error.chain().to_string())
        }
        result => {
            let cancelled = false;
            Come::Guest(Box::new(Arrival { transport, channels, memory_bytes, result, cancelled }))
        }
    }
}

impl<M> Arrival<M> {
    /// What the migration did; of the guest no more than where it is.
    pub fn report(&self) -> Report {
        let (outcome, at, statistics) = match &self.result {
            Ok(arrived) => (Outcome::Completed, GuestAt::Destination, &arrived.statistics),
            Err(failure) => {
                let at = match failure.guest {
                    GuestAtDestination::AtSource | GuestAtDestination::GivenBack => GuestAt::Source,
                    _ => GuestAt::Unknown,
                };
                (Outcome::of(&failure.error, self.cancelled), at, &failure.statistics)
            }
        };
        let (channels, memory_bytes) = (self.channels, self.memory_bytes);
        let mut report =
            Report::new(outcome, at, self.transport, channels, memory_bytes, statistics);
        match &self.result {
            Ok(arrived) => {
                report.memory_match = arrived.verified.then_some(true);
                report.guest_paused = arrived.paused;
            }
            Err(failure) => report.error = Some(failure.error.chain().to_string()),
        }
        report
    }
}
