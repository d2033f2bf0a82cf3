//! `receive`: waits for a guest, and runs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, unbounded};
use indicatif::HumanBytes;
use pageferry::memory::GuestMemory;
use pageferry::threads::PinnedThreads;
use pageferry::transport::{DestinationLink, Warnings};
use pageferry::{
    Arrived, Blame, Destination, DestinationFailure, Event, GuestAtDestination, Offer, Statistics,
};
use pageferry_cli::child::end_with_parent;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report};
use pageferry_cli::say;
use pageferry_cli::watch::Watch;
use pageferry_cli::wishes::{
    Wish, accept, listen_to_signals, unless_interrupted, until_interrupted, wait_or_quit,
};
use pageferry_tcp::ZeroCopy;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig};
use rustix::process::Signal;

use crate::args::ReceiveArgs;
use crate::report::{check, describe, heartbeat};

pub(crate) fn receive(args: &ReceiveArgs) -> Result<Outcome, Failure> {
    if args.with_parent {
        end_with_parent(Signal::TERM)?;
    }
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let chosen = args.transport.choose(args.link.tcp(ZeroCopy::default()), &args.rdma)?;
    let transport = chosen.name();
    let address = args.listen.clone();
    // Looking up a name may take long, and nothing ends that.
    let listen = move || chosen.listen(&address).map(|acceptor| (chosen, acceptor));
    let Some(listening) = unless_interrupted(&wishes, listen)? else {
        return nobody_came(args, transport, "interrupted before a guest came".to_owned());
    };
    let (chosen, acceptor) = listening?;
    // Scripts read the port from this line.
    say!("listening on {}", acceptor.local_addr());
    // Strangers may be many.
    let lines = Warnings::default();
    let come = loop {
        let Some((peer, link)) = accept(&chosen, &acceptor, &wishes)? else {
            break Err("interrupted before a guest came".to_owned());
        };
        let told = match lines.turn() {
            Some(0) => Some(String::new()),
            left_out => left_out.map(|others| format!(", after {others} others")),
        };
        if let Some(others) = &told {
            say!("a source connected from {peer}{others}");
        }
        match take_in(args, link, &wishes, told.is_some())? {
            Come::Stranger(why) if told.is_some() => {
                say!("no guest came from {peer}: {why}; the next is waited for");
            }
            Come::Stranger(_) => {}
            Come::Interrupted => break Err("cancelled before a guest came".to_owned()),
            Come::Guest(guest) => break Ok(*guest),
        }
    };
    // Others are refused at once from now on, and do not wait for a guest's home that is taken.
    drop(acceptor);
    let report = |outcome, at, channels, memory_bytes, statistics: &Statistics| {
        Report::new(outcome, at, transport, channels, memory_bytes, statistics)
    };
    let Coming { channels, config, result, cancelled } = match come {
        Ok(coming) => coming,
        Err(why) => return nobody_came(args, transport, why),
    };
    let memory_bytes = config.memory_bytes();
    match result {
        Ok(arrived) => {
            let (at, statistics) = (GuestAt::Destination, &arrived.statistics);
            let mut report = report(Outcome::Completed, at, channels, memory_bytes, statistics);
            describe(&mut report, &config);
            report.memory_match = arrived.verified.then_some(true);
            run_on(args, arrived.machine.guest, report, &wishes)
        }
        Err(failure) => {
            let at = match failure.guest {
                GuestAtDestination::AtSource | GuestAtDestination::GivenBack => GuestAt::Source,
                _ => GuestAt::Unknown,
            };
            let outcome = Outcome::of(&failure.error, cancelled);
            let mut report = report(outcome, at, channels, memory_bytes, &failure.statistics);
            describe(&mut report, &config);
            report.error = Some(failure.error.chain().to_string());
            let outcome = finish(&report, args.json)?;
            if at == GuestAt::Unknown {
                keep_copy(&wishes);
            }
            Ok(outcome)
        }
    }
}

/// Ends a destination that was told to, before a guest was on its way.
fn nobody_came(args: &ReceiveArgs, transport: &str, why: String) -> Result<Outcome, Failure> {
    say!("{why}");
    let (ended, memory_bytes) = (Outcome::Cancelled, args.memory.unwrap_or_default());
    let statistics = Statistics::default();
    let mut report = Report::new(ended, GuestAt::Source, transport, 0, memory_bytes, &statistics);
    report.error = Some(why);
    finish(&report, args.json)
}

/// What came of somebody who connected.
enum Come {
    /// Its guest was on its way, at least.
    Guest(Box<Coming>),
    /// Nothing: it was no source, or not one for this host, or left too early. Why.
    Stranger(String),
    /// Nothing, and a Ctrl-C came meanwhile.
    Interrupted,
}

/// A guest that was on its way.
struct Coming {
    channels: u16,
    config: GuestConfig,
    result: Result<Arrived<GuestMachine>, Box<DestinationFailure<GuestMachine>>>,
    /// Whether a Ctrl-C came meanwhile: too late if the guest is here.
    cancelled: bool,
}

/// Takes in the guest of somebody who connected, if there is one.
fn take_in(
    args: &ReceiveArgs,
    link: Box<dyn DestinationLink>,
    wishes: &Receiver<Wish>,
    tell: bool,
) -> Result<Come, Failure> {
    let destination = Destination::new()
        .threads(Arc::new(PinnedThreads::new(args.pin.clone())))
        .timeouts(args.link.timeouts())
        .populate_ahead(args.populate);
    let handle = destination.handle();
    let watch = Watch::start(handle.clone())?;
    let mut show = watch.sink();
    let begun = Arc::new(AtomicBool::new(false));
    let begins = Arc::clone(&begun);
    let destination = destination.on_event(move |event| {
        if matches!(event, Event::RoundStarted { .. }) {
            begins.store(true, Ordering::Relaxed);
        }
        show(event);
    });
    let migrate = || take_in_uninterrupted(args, destination, link, &begun, tell);
    let (come, interrupted) = until_interrupted(wishes, migrate, || handle.cancel())?;
    Ok(match come {
        Come::Guest(coming) => Come::Guest(Box::new(Coming { cancelled: interrupted, ..*coming })),
        _ if interrupted => Come::Interrupted,
        come => come,
    })
}

/// As [`take_in`], and hears nobody. `begun` is set once the guest is on its way.
fn take_in_uninterrupted(
    args: &ReceiveArgs,
    destination: Destination,
    link: Box<dyn DestinationLink>,
    begun: &AtomicBool,
    tell: bool,
) -> Come {
    let offer = match destination.negotiate(link) {
        Ok(offer) => offer,
        Err(error) => return Come::Stranger(error.chain().to_string()),
    };
    if tell {
        say!("it offers a guest of {}", HumanBytes(offer.layout().len_bytes()));
    }
    let channels = offer.channels();
    let (machine, memory) = match machine_for(args, &offer) {
        Ok(home) => home,
        Err(error) => {
            let reason = pageferry::Chain::of(&*error).to_string();
            offer.decline(&reason);
            return Come::Stranger(reason);
        }
    };
    let config = machine.guest.config().clone();
    let result = offer.receive(machine, &memory);
    // No source breaks the protocol: who does is not the one that is waited for.
    let is_stranger = |failure: &DestinationFailure<GuestMachine>| {
        failure.guest == GuestAtDestination::AtSource
            && failure.error.blame() == Blame::PeerMisbehaved
    };
    match result {
        Err(failure) if !begun.load(Ordering::Relaxed) || is_stranger(&failure) => {
            Come::Stranger(failure.error.chain().to_string())
        }
        result => Come::Guest(Box::new(Coming { channels, config, result, cancelled: false })),
    }
}

/// Builds the machine that the source describes.
fn machine_for(
    args: &ReceiveArgs,
    offer: &Offer,
) -> Result<(GuestMachine, Arc<GuestMemory>), Failure> {
    let memory_bytes = offer.layout().len_bytes();
    if let Some(wanted) = args.memory
        && wanted != memory_bytes
    {
        return Err(format!(
            "the source has {memory_bytes} bytes of guest memory, --memory here takes only {wanted}"
        )
        .into());
    }
    let here_bytes = pageferry_report::facts::memory_and_swap_bytes();
    if args.memory.is_none()
        && let Some(here_bytes) = here_bytes
        && memory_bytes > here_bytes
    {
        return Err(format!(
            "the source has {memory_bytes} bytes of guest memory, and this machine {here_bytes} of \
             memory and swap; --memory {memory_bytes} here takes it all the same"
        )
        .into());
    }
    let mut config: GuestConfig = serde_json::from_slice(offer.description()).map_err(|error| {
        format!("the source's description of the guest makes no sense: {error}")
    })?;
    let described: Vec<_> = config.regions.clone();
    let offered =
        offer.layout().regions().iter().map(|region| (region.guest_addr, region.len_bytes));
    if !offered.eq(described) {
        return Err("the source's description of the guest does not fit its memory map".into());
    }
    config.backing = args.backing;
    let machine = GuestMachine { guest: Guest::create(config)? };
    let memory = machine.memory()?;
    Ok((machine, memory))
}

/// Runs the guest that arrived: for as long as asked, or until told to end.
fn run_on(
    args: &ReceiveArgs,
    mut guest: Guest,
    mut report: Report,
    wishes: &Receiver<Wish>,
) -> Result<Outcome, Failure> {
    let before = guest.heartbeat().beats;
    if guest.await_beats(before + 10).is_err() {
        report.fail("the guest does not beat at the destination".to_owned());
    }
    let Some(time) = args.run_for else {
        heartbeat(&mut report, guest.heartbeat());
        let outcome = finish(&report, args.json)?;
        say!("the guest runs here; Ctrl-C ends it");
        wait_or_quit(wishes, None);
        return Ok(outcome);
    };
    wait_or_quit(wishes, Some(time));
    check(&mut guest, &mut report)?;
    heartbeat(&mut report, guest.heartbeat());
    if args.timeline {
        report.timeline.get_or_insert_default().gaps = guest.heartbeat_gaps();
    }
    finish(&report, args.json)
}

/// The copy of a guest whose owner is unknown is kept until the operator ends this process.
fn keep_copy(wishes: &Receiver<Wish>) {
    say!("the copy is kept, paused; Ctrl-C destroys it");
    wait_or_quit(wishes, None);
}

fn finish(report: &Report, json: bool) -> Result<Outcome, Failure> {
    report.print(json)?;
    Ok(report.outcome)
}
