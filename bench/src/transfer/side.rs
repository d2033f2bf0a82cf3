//! A side of a transfer.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use pageferry::digest::Digest;
use pageferry::dirty::{DirtySource, DirtySources};
use pageferry::transport::OneLink;
use pageferry::{Destination, Event, Source, Statistics};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_rust_vmm::PagemapScan;
use pageferry_vmm::ram::Ram;

use super::machine::MemoryOnly;
use super::wire::{Answer, Contestant, Measured, Order, Setup};
use super::writer::Writer;
use super::{bare, memory};
use crate::links::{self, HERE, Listener};
use crate::sides::{self, SideName, answer};
use crate::usage::Growth;

/// One side, as it is told.
pub(crate) fn serve(name: SideName) -> Result<Outcome, Failure> {
    let mut side = None;
    sides::serve(|order| obey(name, &mut side, order))
}

struct Side {
    setup: Setup,
    /// At a destination of the last measurement.
    ram: Option<Ram>,
}

fn obey(name: SideName, side: &mut Option<Side>, order: Order) -> Result<(), Failure> {
    match (side, order) {
        (side @ None, Order::Prepare(setup)) => {
            let ram = match name {
                SideName::Source => {
                    let ram = memory::map(&setup)?;
                    memory::fill(ram.memory(), &setup)?;
                    Some(ram)
                }
                SideName::Destination => None,
            };
            *side = Some(Side { setup, ram });
            answer(&Answer::Ready)
        }
        (Some(Side { setup, ram }), Order::Receive(contestant)) => {
            // Given back first: there may not be enough for two.
            *ram = None;
            let fresh = ram.insert(memory::map(setup)?);
            let measured = match contestant {
                Contestant::Engine => receive_by_engine(fresh, setup)?,
                Contestant::Bare => {
                    let listener = TcpListener::bind(HERE)?;
                    answer(&Answer::Listening(listener.local_addr()?))?;
                    bare::receive(fresh.memory(), setup, &listener)?
                }
            };
            answer(&Answer::Measured(measured))
        }
        (Some(Side { setup, ram: Some(ram) }), Order::Send(contestant, address)) => {
            let measured = match contestant {
                Contestant::Engine => send_by_engine(ram, setup, address)?,
                Contestant::Bare => bare::send(ram.memory(), setup, address)?,
            };
            answer(&Answer::Measured(measured))
        }
        (Some(Side { ram: Some(ram), .. }), Order::Digest) => {
            let digest = Digest::of(&*memory::describe(ram)?)?;
            answer(&Answer::Digest(digest.to_string()))
        }
        (_, order) => Err(format!("the {name} was told to do {order:?} out of turn").into()),
    }
}

fn send_by_engine(ram: &Ram, setup: &Setup, address: SocketAddr) -> Result<Measured, Failure> {
    let memory = memory::describe(ram)?;
    let mut machine = MemoryOnly::default();
    let mut trackers: Vec<Box<dyn DirtySource>> = Vec::new();
    if setup.dirty_rate > 0 {
        PagemapScan::supported()?;
        trackers.push(Box::new(PagemapScan::new(Arc::clone(&memory))));
        machine.writer = Some(Writer::start(Arc::clone(ram.memory()), setup)?);
    }
    let window = machine.window.clone();
    let source = Source::new().channels(setup.channels).on_event(move |event| {
        if matches!(event, Event::Registered(_)) {
            window.begin();
        }
    });
    let source = match setup.batch_bytes {
        Some(bytes) => source.batch_bytes(bytes),
        None => source,
    };
    let growth = Growth::watch(&memory);
    let link = links::connect(setup.way, setup.zero_copy, address)?;
    let departed = source
        .migrate(machine, &memory, DirtySources::new(trackers), OneLink::source(link))
        .map_err(|failure| failure.error)?;
    let statistics = &departed.statistics;
    let machine = departed.machine;
    Ok(Measured {
        nanoseconds: u64::try_from(statistics.transfer.as_nanos())?,
        cpu_nanoseconds: machine
            .window
            .nanoseconds()
            .saturating_sub(machine.writer_cpu_nanoseconds),
        peak_bytes: growth.peak_bytes(),
        ..counters(statistics)
    })
}

fn receive_by_engine(ram: &Ram, setup: &Setup) -> Result<Measured, Failure> {
    let memory = memory::describe(ram)?;
    let machine = MemoryOnly::default();
    let window = machine.window.clone();
    let growth = Growth::watch(&memory);
    let listener = Listener::bind(setup.way)?;
    answer(&Answer::Listening(listener.address()))?;
    let link = listener.accept()?;
    let destination = Destination::new().populate_ahead(setup.populate_threads);
    let destination = destination.on_event(move |event| {
        if matches!(event, Event::Registered(_)) {
            window.begin();
        }
    });
    let offer = destination.negotiate(OneLink::destination(link))?;
    let arrived = offer.receive(machine, &memory).map_err(|failure| failure.error)?;
    Ok(Measured {
        cpu_nanoseconds: arrived.machine.window.nanoseconds(),
        peak_bytes: growth.peak_bytes(),
        ..counters(&arrived.statistics)
    })
}

fn counters(statistics: &Statistics) -> Measured {
    Measured {
        payload_bytes: statistics.pages.data * pageferry::memory::PAGE_BYTES,
        system_calls: statistics.system_calls,
        user_copied_bytes: statistics.user_copied_bytes,
        zero_copy: statistics.zero_copy.into(),
        polls: statistics.work_requests.polls,
        ..Measured::default()
    }
}
