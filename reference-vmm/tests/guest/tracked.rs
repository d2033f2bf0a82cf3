//! What a guest's tracker tells is enough to move it, each tracker for each kind of guest.

use pageferry::dirty::{DirtyBitmap, DirtySources};
use pageferry::memory::{GuestMemory, PageRange};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::error::{GuestError, TrackingError};
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind, tracking_available};
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::WorkloadKind;

use crate::common::{assert_ok, config, kinds, run_for_beats, wait_for_beats};

/// Harvests of a running guest, before the one of a guest that stands.
const ROUNDS: u32 = 4;

/// All trackers that see guests of the kind and that this host has, having said which it lacks.
fn trackers(kind: GuestKind) -> Vec<DirtyTracking> {
    // A guest fills the fewest entries at once, and never as many as a VMM would take.
    let all = [
        DirtyTracking::Log,
        DirtyTracking::Ring { entries: 256 },
        DirtyTracking::RING,
        DirtyTracking::UffdWp,
        DirtyTracking::Pagemap,
        DirtyTracking::Bitmap,
    ];
    let fitting = all.into_iter().filter(|tracking| tracking.check(kind).is_ok());
    let offered = fitting.filter(|tracking| match tracking_available(*tracking) {
        Ok(()) => true,
        Err(error) => {
            let error = pageferry::Chain::of(&error).to_string();
            eprintln!("{kind} guests tracked by {tracking} skipped, because {error}");
            false
        }
    });
    offered.collect()
}

fn machine(config: &GuestConfig, tracking: DirtyTracking) -> GuestMachine {
    let guest = Guest::create_tracked(config.clone(), tracking).expect("create");
    assert_eq!(guest.tracking(), tracking);
    GuestMachine { guest }
}

/// Moves a paused guest while it runs; it stays where it was, too, and stands.
fn moved(from: &mut GuestMachine, tracking: DirtyTracking) -> GuestMachine {
    let mut destination = machine(from.guest.config(), tracking);
    let (memory, into) = (from.memory().unwrap(), destination.memory().unwrap());
    let sources = from.dirty_sources(&memory).unwrap();
    sources.start().unwrap();
    from.guest.resume().unwrap();
    let mut copied = 0;
    for round in 0..=ROUNDS {
        if round < ROUNDS {
            // It writes before each beat. So many vCPUs may have done so before the last harvest.
            wait_for_beats(&from.guest, u64::from(from.guest.config().vcpus) + 1);
        } else {
            from.guest.pause().unwrap();
        }
        let mut pages = DirtyBitmap::new(memory.layout());
        sources.harvest(&mut pages).unwrap();
        let seen = !pages.is_empty() || round == ROUNDS;
        assert!(seen, "{tracking}: no write was seen in round {round}");
        if round == 0 {
            pages.fill();
        }
        copied += copy(&memory, &into, &sources, &pages);
    }
    let state = from.guest.save().unwrap();
    let mut pages = DirtyBitmap::new(memory.layout());
    sources.harvest(&mut pages).unwrap();
    copied += copy(&memory, &into, &sources, &pages);
    sources.stop().unwrap();
    destination.guest.load(&state).unwrap();
    let (there, here) = (destination.guest.check_oracle(), from.guest.check_oracle());
    assert!(there.ok && there == here, "{tracking}: {there:?} {here:?}");
    eprintln!("{} guest by {tracking}: {copied} pages", from.guest.config().kind);
    destination
}

fn copy(
    from: &GuestMemory,
    to: &GuestMemory,
    sources: &DirtySources,
    pages: &DirtyBitmap,
) -> usize {
    let (mut bytes, mut copied) = (Vec::new(), 0);
    for region in 0..u16::try_from(pages.regions()).unwrap() {
        sources.rearm(region, 0, pages.region_words(region)).unwrap();
        for page in (0..pages.region_pages(region)).filter(|page| pages.get(region, *page)) {
            let range = PageRange { region, first_page: page, pages: 1 };
            from.copy_out(range, &mut bytes).unwrap();
            to.copy_in(range, &bytes).unwrap();
            copied += 1;
        }
    }
    copied
}

/// The guest that arrived is tracked as the one that left was, and so is one that stayed.
#[test]
fn a_guest_moves_on_and_on() {
    for kind in kinds() {
        for tracking in trackers(kind) {
            let regions = vec![(0, 8 << 20)];
            let config = GuestConfig { regions, ..config(kind, WorkloadKind::HotCold, 2) };
            let mut first = machine(&config, tracking);
            first.guest.boot().unwrap();
            run_for_beats(&mut first.guest, 5);
            let mut second = moved(&mut first, tracking);
            let mut third = moved(&mut second, tracking);
            let mut elsewhere = moved(&mut first, tracking);
            for machine in [&mut first, &mut second, &mut third, &mut elsewhere] {
                run_for_beats(&mut machine.guest, 5);
                assert_ok(&machine.guest);
            }
            if let Some(rings) = first.guest.kvm().and_then(|handles| handles.rings) {
                let (full, over) = (rings.times_full(), rings.times_run_over());
                eprintln!("{} entries: {full} times full, {over} run over", rings.entries());
            }
        }
    }
}

#[test]
fn the_best_tracker_is_one_of_them() {
    for kind in kinds() {
        match DirtyTracking::Auto.decide(kind) {
            Ok(decided) => {
                assert_ne!(decided, DirtyTracking::Auto);
                decided.check(kind).unwrap();
                tracking_available(decided).unwrap();
                let machine = machine(&config(kind, WorkloadKind::Idle, 1), DirtyTracking::Auto);
                let memory = machine.memory().unwrap();
                let names = machine.dirty_sources(&memory).unwrap().names();
                let expected = match decided {
                    DirtyTracking::Log => "kvm dirty log",
                    DirtyTracking::Pagemap => "pagemap scan",
                    _ => "uffd write-protect",
                };
                assert_eq!(names, [expected]);
            }
            Err(error) => eprintln!("{kind} guests skipped, because {error}"),
        }
    }
}

#[test]
fn trackers_that_would_not_see_the_guest_are_refused() {
    let log_and_rings = [DirtyTracking::Log, DirtyTracking::RING];
    let pairs = log_and_rings.map(|tracking| (GuestKind::Process, tracking));
    for (kind, tracking) in pairs.into_iter().chain([(GuestKind::Kvm, DirtyTracking::Bitmap)]) {
        let error = Guest::create_tracked(config(kind, WorkloadKind::Idle, 1), tracking).err();
        let Some(GuestError::Tracking(TrackingError::Kind { .. })) = error else {
            panic!("{kind} {tracking}: {error:?}")
        };
    }
}

#[test]
fn rings_that_kvm_does_not_offer_are_refused() {
    if !kinds().contains(&GuestKind::Kvm) {
        return;
    }
    // Odd, so that no kernel takes it.
    let rings = DirtyTracking::Ring { entries: 4097 };
    let error = tracking_available(rings).unwrap_err();
    assert!(matches!(error, GuestError::Tracking(TrackingError::Ring(_))), "{error}");
}
