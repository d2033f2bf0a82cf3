//! `receive`: waits for a guest, and runs it.

use std::error::Error;
use std::sync::Arc;

use crossbeam_channel::{Receiver, select, unbounded};
use pageferry::threads::PinnedThreads;
use pageferry::transport::TransportError;
use pageferry::{Destination, GuestAtDestination, MigrationHandle, Offer, Statistics};
use pageferry_tcp::ZeroCopy;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig};

use crate::args::ReceiveArgs;
use crate::outcome::Outcome;
use crate::report::{GuestAt, Report};
use crate::resident::{await_beats, check};
use crate::signals::{Wish, end_with_parent, listen_to_signals, wait_or_quit};
use crate::watch::Watch;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

pub(crate) fn receive(args: &ReceiveArgs) -> Result<Outcome> {
    if args.with_parent {
        end_with_parent()?;
    }
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let chosen = args.transport.choose(ZeroCopy::default(), &args.rdma)?;
    let acceptor = chosen.listen(&args.listen)?;
    // Scripts read the port from this line.
    say!("listening on {}", acceptor.local_addr());

    let accepting = {
        let interrupt = acceptor.interrupter();
        let (done, accepted) = crossbeam_channel::bounded(1);
        std::thread::scope(|scope| {
            scope.spawn(|| done.send(chosen.accept(&acceptor)));
            loop {
                select! {
                    recv(accepted) -> link => break link.map_err(|_| TransportError::Closed)?,
                    recv(wishes) -> wish => {
                        if matches!(wish, Ok(Wish::Interrupt)) {
                            interrupt.interrupt();
                        }
                    }
                }
            }
        })
    };
    let (peer, link) = match accepting {
        Err(TransportError::Interrupted) => {
            say!("interrupted before a guest came");
            return Ok(Outcome::Cancelled);
        }
        link => link?,
    };
    // The port stays with the link, which has others told to come later. Without it they are
    // refused at once, and do not wait for a guest's home that is taken.
    drop(acceptor);
    say!("a source connected from {peer}");

    let destination = Destination::new()
        .threads(Arc::new(PinnedThreads::new(args.pin.clone())))
        .populate_ahead(args.populate);
    let handle = destination.handle();
    let watch = Watch::start(handle.clone())?;
    let destination = destination.on_event(watch.sink());
    let migrating = cancel_on_interrupt(&wishes, &handle);
    let offer = match destination.negotiate(link) {
        Ok(offer) => offer,
        Err(error) => {
            drop(watch);
            let mut report = Report::new(
                Outcome::of(&error),
                GuestAt::Source,
                chosen.name(),
                0,
                args.memory.unwrap_or_default(),
                &Statistics::default(),
            );
            report.error = Some(error.chain().to_string());
            return finish(&report, args.json);
        }
    };
    let (channels, memory_bytes) = (offer.channels(), offer.layout().len_bytes());
    let machine = match machine_for(args, &offer) {
        Ok(machine) => machine,
        Err(error) => {
            let reason = pageferry::Chain::of(&*error).to_string();
            offer.decline(&reason);
            drop(watch);
            let statistics = Statistics::default();
            let outcome = Outcome::Failed;
            let mut report = Report::new(
                outcome,
                GuestAt::Source,
                chosen.name(),
                channels,
                memory_bytes,
                &statistics,
            );
            report.error = Some(reason);
            return finish(&report, args.json);
        }
    };
    let config = machine.guest.config().clone();
    let memory = machine.memory()?;
    let result = offer.receive(machine, &memory);
    drop(migrating);
    drop(watch);
    match result {
        Ok(arrived) => {
            let statistics = &arrived.statistics;
            let mut report = Report::new(
                Outcome::Completed,
                GuestAt::Destination,
                chosen.name(),
                channels,
                memory_bytes,
                statistics,
            );
            report.guest(&config);
            report.memory_match = arrived.verified.then_some(true);
            run_on(args, arrived.machine.guest, report, &wishes)
        }
        Err(failure) => {
            let at = match failure.guest {
                GuestAtDestination::Uncertain => GuestAt::Unknown,
                _ => GuestAt::Source,
            };
            let outcome = Outcome::of(&failure.error);
            let mut report = Report::new(
                outcome,
                at,
                chosen.name(),
                channels,
                memory_bytes,
                &failure.statistics,
            );
            report.guest(&config);
            report.error = Some(failure.error.chain().to_string());
            let outcome = finish(&report, args.json)?;
            if failure.guest == GuestAtDestination::Uncertain {
                keep_copy(&wishes);
            }
            Ok(outcome)
        }
    }
}

/// Builds the machine that the source describes.
fn machine_for(args: &ReceiveArgs, offer: &Offer) -> Result<GuestMachine> {
    let memory_bytes = offer.layout().len_bytes();
    if let Some(wanted) = args.memory
        && wanted != memory_bytes
    {
        return Err(format!(
            "the source has {memory_bytes} bytes of guest memory, --memory here takes only {wanted}"
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
    Ok(GuestMachine { guest: Guest::create(config)? })
}

/// Runs the guest that arrived: for as long as asked, or until told to end.
fn run_on(
    args: &ReceiveArgs,
    mut guest: Guest,
    mut report: Report,
    wishes: &Receiver<Wish>,
) -> Result<Outcome> {
    let before = guest.heartbeat().beats;
    if !await_beats(&guest, before + 10) {
        report.fail("the guest does not beat at the destination".to_owned());
    }
    let Some(time) = args.run_for else {
        report.heartbeat(guest.heartbeat());
        let outcome = finish(&report, args.json)?;
        say!("the guest runs here; Ctrl-C ends it");
        wait_or_quit(wishes, None);
        return Ok(outcome);
    };
    wait_or_quit(wishes, Some(time));
    check(&mut guest, &mut report)?;
    report.heartbeat(guest.heartbeat());
    if args.timeline {
        report.timeline.get_or_insert_default().add_gaps(guest.heartbeat_gaps());
    }
    finish(&report, args.json)
}

/// Cancels the migration on Ctrl-C, until dropped.
fn cancel_on_interrupt(wishes: &Receiver<Wish>, handle: &MigrationHandle) -> CancelOnInterrupt {
    let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
    let (wishes, handle) = (wishes.clone(), handle.clone());
    let thread = std::thread::spawn(move || {
        loop {
            select! {
                recv(stopped) -> _ => return,
                recv(wishes) -> wish => match wish {
                    Ok(Wish::Interrupt) => handle.cancel(),
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
        }
    });
    CancelOnInterrupt { stop: Some(stop), thread: Some(thread) }
}

struct CancelOnInterrupt {
    stop: Option<crossbeam_channel::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for CancelOnInterrupt {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The copy of a guest whose owner is unknown is kept until the operator ends this process.
fn keep_copy(wishes: &Receiver<Wish>) {
    say!("the copy is kept, paused; Ctrl-C destroys it");
    wait_or_quit(wishes, None);
}

fn finish(report: &Report, json: bool) -> Result<Outcome> {
    report.print(json)?;
    Ok(report.outcome)
}
