//! The link is lost at the handover: nobody resumes by himself, and the program says so. The peers
//! here are the engine's and the transport's own parts, so that they can vanish at that very moment.

use std::sync::Arc;
use std::thread;

use pageferry::memory::GuestMemory;
use pageferry::protocol::{Message, Prepare, Prepared, negotiate};
use pageferry::transport::{ControlChannel, DestinationLink, Interrupt, Link, OneLink, Received};
use pageferry::{Error, GuestAtSource, Machine, MachineError, Source};
use pageferry_rust_vmm::guest_memory;
use pageferry_tcp::{TcpAcceptor, TcpDestinationLink, TcpOptions, connect};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::host::guest_kind;
use crate::support::sides::{destination, source, source_that_stays};

fn hear(control: &mut ControlChannel) -> Message {
    let frame = control.receiver.receive(Some(PATIENCE)).expect("a frame");
    Message::decode(&frame).expect("a message")
}

fn say(control: &mut ControlChannel, message: &Message) {
    control.sender.send(&message.encode(), PATIENCE).expect("send a message");
}

/// Takes in everything a source sends up to its commit. What happens then is up to the caller.
fn take_in_until_commit(acceptor: &TcpAcceptor) -> (TcpDestinationLink, ControlChannel) {
    let mut link = acceptor.accept(Some(PATIENCE)).expect("accept");
    let mut control = link.control().expect("the control channel");
    let Message::Hello(hello) = hear(&mut control) else { panic!("no greeting") };
    let regions: Vec<_> =
        hello.layout.regions().iter().map(|region| (region.guest_addr, region.len_bytes)).collect();
    let ram = Ram::allocate(&regions, Backing::Memfd).expect("memory");
    let memory: Arc<GuestMemory> =
        Arc::new(guest_memory(Arc::clone(ram.memory())).expect("a layout"));
    let channels = hello.channels;
    let (_, welcome) = negotiate(&hello, channels, false, false).expect("it fits");
    say(&mut control, &Message::Welcome(welcome));
    assert_eq!(hear(&mut control), welcome.agreed(&hello));
    link.register(&memory).expect("register");
    say(&mut control, &Message::Registered);
    assert_eq!(hear(&mut control), Message::Registered);
    for mut receiver in link.open_receivers(channels, PATIENCE).expect("channels") {
        // Ends with the link.
        thread::spawn(move || while let Ok(Received::Batch(_)) = receiver.receive() {});
    }
    say(&mut control, &Message::Ready);
    loop {
        match hear(&mut control) {
            Message::Prepare(Prepare { attempt, .. }) => {
                let (written, damaged) = (Vec::new(), Vec::new());
                let prepared = Prepared { attempt, load_ns: 10_000, written, damaged };
                say(&mut control, &Message::Prepared(prepared));
            }
            Message::Commit => return (link, control),
            Message::Ping { number } => say(&mut control, &Message::Pong { number }),
            Message::Round { .. }
            | Message::Switchover { .. }
            | Message::StateChunk(_)
            | Message::CalledOff { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn acceptor() -> (TcpAcceptor, String) {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).expect("listen");
    let address = acceptor.local_addr().to_string();
    (acceptor, address)
}

#[test]
fn a_source_whose_commit_is_not_answered() {
    let (acceptor, address) = acceptor();
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    drop(take_in_until_commit(&acceptor));
    let report = source.await_report();
    assert_eq!((report.text("outcome"), report.text("guest_at")), ("uncertain", "unknown"));
    let error = report.text("error");
    assert!(error.contains("the destination may be running the guest"), "{error}");
    // Nobody may know whether it can go: the copy is kept until someone does.
    source.await_message("the copy is kept here, paused");
    source.say("migrate 127.0.0.1:1");
    source.await_message("it is open who has the guest");
    source.signal(Signal::INT);
    source.finish().assert_status(4);
}

/// The other side's copy is destroyed, or its host is fenced off: the guest goes on here, whichever side it is.
#[test]
fn a_copy_is_let_run_by_who_knows_that_it_is_the_only_one() {
    let (acceptor, address) = acceptor();
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    drop(take_in_until_commit(&acceptor));
    assert_eq!(source.await_report().text("guest_at"), "unknown");
    source.await_message("the copy is kept here, paused");
    source.say("resume");
    source.await_beats_beyond(beats);
    // And it can be moved from there.
    let (mut destination, address) = destination(&[]);
    source.say(format!("migrate {address}"));
    assert_eq!(source.await_report().text("outcome"), "completed");
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

#[test]
fn a_source_that_gets_its_guest_back() {
    let (acceptor, address) = acceptor();
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    let (link, mut control) = take_in_until_commit(&acceptor);
    say(&mut control, &Message::GaveBack { text: "no room after all".to_owned() });
    let why = ["the destination gave the guest back", "no room after all"];
    source.finish().report(1).assert_kept("failed", &why, beats);
    drop(link);
}

#[test]
fn a_source_that_is_interrupted_after_its_commit() {
    let (acceptor, address) = acceptor();
    let mut source = source_that_stays(&[]);
    source.say(format!("migrate {address}"));
    let (link, mut control) = take_in_until_commit(&acceptor);
    source.signal(Signal::INT);
    source.await_message("unless it is gone already");
    say(&mut control, &Message::Resumed { resume_ns: 1 });
    source.finish().report(0).assert_departed();
    drop(link);
}

/// A guest whose link breaks when the destination has loaded it and before the commit.
struct Breaking {
    machine: GuestMachine,
    link: Arc<dyn Interrupt>,
}

impl Machine for Breaking {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.machine.pause()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.machine.save(state)
    }

    fn state_schema(&self) -> Result<Vec<u8>, MachineError> {
        self.machine.state_schema()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.machine.load(state)
    }

    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.link.interrupt();
        Err("the link is gone".into())
    }
}

#[test]
fn a_destination_that_waits_for_a_commit() {
    let (mut destination, address) = destination(&[]);
    let config = GuestConfig {
        kind: if guest_kind() == "kvm" { GuestKind::Kvm } else { GuestKind::Process },
        regions: Ram::pc_regions(64 << 20),
        backing: Backing::Memfd,
        vcpus: 1,
        cpu: None,
        workload: WorkloadConfig {
            kind: WorkloadKind::Idle,
            working_set_bytes: 8 << 20,
            dirty_rate_pages_per_second: None,
            seed: 1,
        },
    };
    let mut guest = Guest::create(config.clone()).expect("a guest");
    guest.boot().expect("boot");
    guest.resume().expect("resume");
    let machine = GuestMachine { guest };
    let memory = machine.memory().expect("its memory");
    let dirty = machine.dirty_sources(&memory).expect("its trackers");
    let link = connect(address, TcpOptions::default()).expect("connect");
    let machine = Breaking { machine, link: link.interrupter() };
    let description = serde_json::to_vec(&config).expect("a description");
    let failure = Source::new()
        .description(description)
        .migrate(machine, &memory, dirty, OneLink::source(Box::new(link)))
        .err()
        .expect("a broken link");
    assert!(matches!(failure.guest, GuestAtSource::Running), "{:?}", failure.error);
    assert!(matches!(failure.error, Error::Machine { .. }), "{:?}", failure.error);

    let report = destination.await_report();
    assert_eq!((report.text("outcome"), report.text("guest_at")), ("uncertain", "unknown"));
    let error = report.text("error");
    assert!(error.contains("the source may have committed"), "{error}");
    assert!(report.is_null("heartbeats"), "{report:?}");
    destination.await_message("the copy is kept here, paused");
    assert!(destination.lives());
    destination.say("resume");
    destination.await_message("the guest runs here");
    destination.await_beats_beyond(0);
    destination.signal(Signal::INT);
    destination.finish().assert_status(4);
}
