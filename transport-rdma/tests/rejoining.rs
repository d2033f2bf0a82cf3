//! Links that are lost in the middle of a migration and come back. On its own: what the device has is counted.

#[path = "support/device.rs"]
mod device;

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use device::address;
use pageferry::digest::Digest;
use pageferry::dirty::DirtySources;
use pageferry::testing::{IdleMachine, TestMemory};
use pageferry::transport::{Connector, Interrupt, LinkPurpose, SourceLink, TransportError};
use pageferry::{Destination, MigrationHandle, Source, Statistics};
use pageferry_identity::testing::shared_key;
use pageferry_rdma::{RdmaAcceptor, RdmaDialler, RdmaOptions, RegistrationMode, Security};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind, kvm_available};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};

const PAGES: u64 = 8192;
/// How often the link is lost.
const LOSSES: u64 = 5;
/// What a loss costs at most at that pace: some batches of two queue pairs.
const UNDER_WAY_BYTES: u64 = 4 << 20;
/// So that all of them come while pages are on their way.
const BYTES_PER_SECOND: u64 = 8 << 20;
/// No less than an emulated machine takes for anything.
const PATIENCE: Duration = Duration::from_secs(120);

type Ends = Arc<Mutex<Option<Arc<dyn Interrupt>>>>;

/// Dials, and keeps what ends the link.
struct Watched {
    inner: RdmaDialler,
    link: Ends,
}

impl Connector for Watched {
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        let link = self.inner.connect(purpose)?;
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link.interrupter());
        Ok(link)
    }

    fn redials(&self) -> bool {
        self.inner.redials()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

/// How many protection domains, completion queues, queue pairs and memory regions the kernel has, if rdma(8) can tell.
/// The context of a device is librdmacm's, which keeps it for as long as the process is there.
fn resources() -> Option<Vec<(String, u64)>> {
    let told = Command::new("rdma").args(["resource", "show"]).output().ok()?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let words: Vec<_> = told.split_whitespace().collect();
    let counted = words.windows(2).filter(|pair| ["pd", "cq", "qp", "mr"].contains(&pair[0]));
    let counts = counted.map(|pair| Some((pair[0].to_owned(), pair[1].parse().ok()?)));
    counts.collect::<Option<Vec<_>>>().filter(|counts| !counts.is_empty())
}

/// Ends the link that there is once so many bytes have landed in all.
fn lose_once_landed(handle: &MigrationHandle, due: u64, link: &Ends) {
    let began = Instant::now();
    while handle.snapshot().landed_bytes < due {
        assert!(began.elapsed() < PATIENCE, "{:?}", handle.snapshot());
        thread::yield_now();
    }
    let link = link.lock().unwrap_or_else(PoisonError::into_inner);
    link.as_ref().expect("a link").interrupt();
}

/// Moves memory over a link that is lost again and again; what both sides have done.
fn migrate(address: &str, options: &RdmaOptions) -> (Statistics, Statistics) {
    let (here, there) = (TestMemory::new(&[PAGES]), TestMemory::new(&[PAGES]));
    here.fill(7);
    let acceptor = RdmaAcceptor::bind((address, 0), options.clone()).expect("the device listens");
    let link = Ends::default();
    let dialler = RdmaDialler::new(acceptor.local_addr().to_string(), options.clone());
    let connector = Box::new(Watched { inner: dialler, link: Arc::clone(&link) });
    let rendezvous = Box::new(acceptor.rendezvous());
    let source = Source::new().channels(2).verify(true).downtime_limit(PATIENCE);
    let handle = source.handle();
    handle.limit_bandwidth(Some(BYTES_PER_SECOND.try_into().expect("more than none")));
    let (departed, arrived) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new().negotiate(rendezvous).expect("a source greets");
            offer.receive(IdleMachine, there.memory()).expect("it arrives").statistics
        });
        let leaving = scope.spawn(|| {
            let dirty = DirtySources::new(Vec::new());
            source
                .migrate(IdleMachine, here.memory(), dirty, connector)
                .expect("it leaves")
                .statistics
        });
        for loss in 1..=LOSSES {
            // More has landed each time.
            let due = loss * here.memory().layout().len_bytes() / (LOSSES + 2);
            lose_once_landed(&handle, due, &link);
        }
        (leaving.join().expect("no panic"), receiving.join().expect("no panic"))
    });
    let digests = [&here, &there].map(|memory| Digest::of(memory.memory()).expect("its memory"));
    assert_eq!(digests[0], digests[1]);
    (departed, arrived)
}

#[test]
fn a_link_that_is_lost_again_and_again_comes_back_and_nothing_of_it_stays() {
    let Some(address) = address() else { return };
    for registration in [RegistrationMode::AtStart, RegistrationMode::Ahead] {
        // Both prove who they are on each link anew.
        let security = Security::Tls(shared_key());
        let options = RdmaOptions { registration, security, ..RdmaOptions::default() };
        let before = resources();
        let (departed, arrived) = migrate(&address, &options);
        assert_eq!((u64::from(departed.rejoins), u64::from(arrived.rejoins)), (LOSSES, LOSSES));
        let (sent, all) = (departed.wire_bytes, PAGES * 4096);
        // What has landed is not sent again.
        assert!(sent < all + LOSSES * UNDER_WAY_BYTES, "{sent} bytes for {all}");
        // Nor is memory registered again; each side has all of it once.
        for side in [&departed, &arrived] {
            let registered =
                side.registration.registered_bytes + side.registered_on_the_way.registered_bytes;
            assert_eq!(registered, all, "{registration:?}");
        }
        match &before {
            Some(before) => assert_eq!(resources().as_ref(), Some(before)),
            None => eprintln!("what the device has is skipped, because rdma(8) does not tell"),
        }
        eprintln!("{registration:?}: {sent} bytes for {all}, {before:?}");
    }
}

/// In bytes a second.
fn rate(mib: u64) -> u64 {
    (mib << 20) / 8
}

/// A guest that writes, over a link that is lost so often while so many bytes are sent. What was sent.
fn move_guest(address: &str, mib: u64, losses: u64, spread_over: u64) -> u64 {
    let written_bytes = (mib - mib / 8) << 20;
    let kind = if kvm_available().is_ok() { GuestKind::Kvm } else { GuestKind::Process };
    let config = GuestConfig {
        kind,
        regions: Ram::pc_regions(mib << 20),
        backing: Backing::Memfd,
        vcpus: 1,
        cpu: None,
        workload: WorkloadConfig {
            kind: WorkloadKind::Sequential,
            working_set_bytes: written_bytes,
            dirty_rate_pages_per_second: Some(200),
            seed: 0x5eed,
        },
    };
    let mut machine = GuestMachine { guest: Guest::create(config.clone()).expect("room for it") };
    machine.guest.boot().expect("it boots");
    machine.guest.resume().expect("it runs");
    let options = RdmaOptions::default();
    let acceptor = RdmaAcceptor::bind((address, 0), options.clone()).expect("the device listens");
    let link = Ends::default();
    let inner = RdmaDialler::new(acceptor.local_addr().to_string(), options);
    let connector = Box::new(Watched { inner, link: Arc::clone(&link) });
    let rendezvous = Box::new(acceptor.rendezvous());
    let (memory, dirty) = machine.described().expect("it tracks what is written");
    let source = Source::new().channels(2).verify(true).downtime_limit(PATIENCE);
    let handle = source.handle();
    // All losses come while pages are on their way.
    let rate = rate(mib);
    handle.limit_bandwidth(Some(rate.try_into().expect("more than none")));
    let (departed, arrived) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new().negotiate(rendezvous).expect("a source greets");
            let machine = GuestMachine { guest: Guest::create(config).expect("room for it") };
            let memory = machine.memory().expect("memory");
            offer.receive(machine, &memory).expect("it arrives")
        });
        let leaving =
            scope.spawn(|| source.migrate(machine, &memory, dirty, connector).expect("it leaves"));
        for loss in 1..=losses {
            lose_once_landed(&handle, loss * spread_over / (losses + 2), &link);
        }
        (leaving.join().expect("no panic"), receiving.join().expect("no panic"))
    });
    assert_eq!(u64::from(departed.statistics.rejoins), losses);
    assert!(arrived.verified, "memory was not compared");
    let mut guest = arrived.machine.guest;
    guest.pause().expect("it runs");
    let report = guest.check_oracle();
    assert!(report.ok && report.fpu_intact, "{report:?}");
    eprintln!(
        "{kind} guest of {mib} MiB, {losses} losses: {} MiB sent, {:.1?}",
        departed.statistics.wire_bytes >> 20,
        departed.statistics.total
    );
    departed.statistics.wire_bytes
}

/// `PAGEFERRY_MEMORY_MIB=1024` for more of a guest.
#[test]
fn little_of_a_guest_is_sent_twice_over_a_link_that_is_lost_twenty_times() {
    let Some(address) = address() else { return };
    let mib = std::env::var("PAGEFERRY_MEMORY_MIB").ok().and_then(|mib| mib.parse().ok());
    let mib = mib.unwrap_or(64);
    let undisturbed = move_guest(&address, mib, 0, 0);
    let lost = move_guest(&address, mib, 20, undisturbed);
    // What is under way for an eighth of a second at that rate.
    let under_way = UNDER_WAY_BYTES.max(rate(mib) / 8);
    assert!(lost <= undisturbed + undisturbed / 10 + 20 * under_way, "{lost}, {undisturbed}");
}
