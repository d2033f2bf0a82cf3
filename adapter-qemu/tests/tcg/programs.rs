//! Guests of a real QEMU, moved by `pageferry-qemu`.

use crate::commands::{Receiving, has_kvm, may_track, migrate, recover, refused};
use pageferry_qemu::Tracking;
use pageferry_qemu::testing::{Console, Disk, Guests, QEMU, Running};
use serde_json::Value;

const PAGES: u32 = 4096;

/// From one host at that address to the next, by one transport after the other; QEMU here quits, and the program there
/// may end.
fn moves_from_host_to_host(guests: &Guests, address: &str, transports: &[&str]) {
    let mut console = Console::of(guests, "0");
    let mut source = Running::start(guests, "0").unwrap();
    let mut pass = console.pass();
    let mut last = None;
    for (hop, transport) in transports.iter().enumerate() {
        let [from, host] = [hop, hop + 1].map(|host| host.to_string());
        let mut console = Console::of(guests, &host);
        let [going, coming] = [&from, &host].map(|host| guests.path(&format!("{host}.events")));
        let events = [&going, &coming].map(|path| format!("--events={}", path.display()));
        let options = ["--transport", transport, &events[1]];
        let (mut receiving, address) = Receiving::at(address, guests, &host, &options);
        let options = ["--transport", transport, "--downtime-limit", "2s", &events[0]];
        let (report, status) = migrate(guests, &from, &address, &options);
        assert_eq!(status, Some(0), "{report}");
        assert_eq!(report["outcome"], "completed", "{report}");
        assert_eq!(report["guest_at"], "destination", "{report}");
        assert_eq!(report["memory_match"], true, "{report}");
        eprintln!(
            "by {}, seen by {}: {} ms, downtime {} ms",
            report["transport"], report["dirty_source"], report["total_ms"], report["downtime_ms"]
        );
        let report = receiving.leave();
        assert_eq!(report["outcome"], "completed", "{report}");
        assert_eq!(report["memory_match"], true, "{report}");
        for path in [&going, &coming] {
            let events = std::fs::read_to_string(path).unwrap();
            let ended: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
            assert_eq!(ended["event"], "ended", "{events}");
            assert_eq!(ended["outcome"], "completed", "{events}");
        }
        // On a guest that is written all the time a pass is soon over that was begun there.
        let (began, ended) = (console.pass(), console.pass());
        assert!(began > pass && ended > began, "pass {pass} there, then {began} and {ended}");
        pass = ended;
        if hop == 0 {
            assert!(source.child.wait().unwrap().success(), "QEMU at the source did not quit");
        }
        // What it had is nobody's any more.
        for path in guests.ram_files(&from) {
            std::fs::remove_file(path).unwrap();
        }
        last = Some(receiving);
    }
    drop(last);
}

/// Ten times by each transport.
#[test]
fn a_guest_moves_from_host_to_host() {
    if !may_track() {
        return;
    }
    let Some(guests) = Guests::build(PAGES) else { return };
    moves_from_host_to_host(&guests, "127.0.0.1", &["tcp", "auto"].repeat(10));
}

/// The same with KVM, which writes to memory as another than the process that it is seen in.
#[test]
fn a_guest_with_kvm_moves_from_host_to_host() {
    let Some(guests) = guests_with_kvm() else { return };
    moves_from_host_to_host(&guests, "127.0.0.1", &["tcp", "auto"].repeat(5));
}

#[test]
fn a_guest_with_kvm_moves_over_rdma() {
    let Ok(address) = std::env::var("PAGEFERRY_RDMA_ADDRESS") else {
        return eprintln!("skipped, because PAGEFERRY_RDMA_ADDRESS names no RDMA device");
    };
    let Some(guests) = guests_with_kvm() else { return };
    moves_from_host_to_host(&guests, &address, &["rdma"; 10]);
}

/// Says so if there are none here.
fn guests_with_kvm() -> Option<Guests> {
    if !has_kvm() || !may_track() {
        return None;
    }
    let mut guests = Guests::bare(PAGES)?;
    guests.accelerator = "kvm";
    // Memory is compared at a tenth of the speed where KVM is emulated.
    guests.ram = vec![("ram", 64)];
    Some(guests)
}

/// From one host to another, with a disk that is written and read all the time and a second vCPU.
fn a_guest_with_a_disk_moves(direct: bool) {
    if !may_track() {
        return;
    }
    let Some(mut guests) = Guests::build(PAGES) else { return };
    guests.vcpus = 2;
    // Not beside RAM: /dev/shm knows no direct I/O.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![0; 4 << 20]).unwrap();
    if direct && !supports_o_direct(&path) {
        return eprintln!("skipped, because {} has no direct I/O", path.display());
    }
    guests.disk = Some(Disk { path, direct });
    let (mut here, mut there) = (Console::of(&guests, "a"), Console::of(&guests, "b"));
    let mut source = Running::start(&guests, "a").unwrap();
    let before = ["memory", "second", "disk"].map(|process| here.pass_of(process));
    let (mut receiving, address) = Receiving::start(&guests, "b", &[]);
    let (report, status) = migrate(&guests, "a", &address, &["--downtime-limit", "2s"]);
    assert_eq!(status, Some(0), "{report}");
    assert_eq!(report["memory_match"], true, "{report}");
    // One for the start, and one for each round but the last, before which the guest was paused.
    let (pulses, rounds) = (report["pulses"]["count"].as_u64(), report["rounds"].as_u64());
    assert_eq!(
        pulses.is_some(),
        direct || Tracking::of_this_kernel().unwrap() == Tracking::SoftDirty
    );
    assert!(pulses.is_none() || pulses >= rounds, "{report}");
    eprintln!("{} of {} ms; pulses: {}", report["downtime"], report["total_ms"], report["pulses"]);
    receiving.leave();
    for (process, before) in ["memory", "second", "disk"].into_iter().zip(before) {
        // Whole passes there.
        let passes = [there.pass_of(process), there.pass_of(process), there.pass_of(process)];
        assert!(passes[0] > before, "pass {before} of {process} here, and then {passes:?} there");
    }
    assert!(source.child.wait().unwrap().success(), "QEMU at the source did not quit");
}

#[test]
fn a_guest_with_a_disk_by_way_of_the_page_cache_moves() {
    a_guest_with_a_disk_moves(false);
}

/// What is read from the disk while dirty pages are looked for would be lost: the guest stands still for that.
#[test]
fn a_guest_with_a_disk_past_the_page_cache_moves() {
    a_guest_with_a_disk_moves(true);
}

/// Each a file of its own, of their own sizes; the names come in another order than the nodes.
#[test]
fn a_guest_with_several_nodes_moves() {
    if !may_track() {
        return;
    }
    let Some(mut guests) = Guests::build(PAGES) else { return };
    guests.ram = vec![("near", 128), ("far", 96), ("middle", 32)];
    let (mut here, mut there) = (Console::of(&guests, "a"), Console::of(&guests, "b"));
    let mut source = Running::start(&guests, "a").unwrap();
    let pass = here.pass();
    let (mut receiving, address) = Receiving::start(&guests, "b", &[]);
    let (report, status) = migrate(&guests, "a", &address, &["--downtime-limit", "2s"]);
    assert_eq!(status, Some(0), "{report}");
    assert_eq!(report["memory_match"], true, "{report}");
    assert_eq!(report["memory_bytes"], 256 << 20, "{report}");
    receiving.leave();
    let passes = [there.pass(), there.pass()];
    assert!(passes[0] > pass && passes[1] > passes[0], "pass {pass} here, then {passes:?} there");
    assert!(source.child.wait().unwrap().success(), "QEMU at the source did not quit");
}

/// What writes RAM unseen is found before anything moves, all of it at once, and the guest runs on.
#[test]
fn what_is_not_seen_is_refused() {
    let Some(guests) = Guests::bare(PAGES) else { return };
    let mut console = Console::of(&guests, "a");
    let mut arguments = guests.arguments("a");
    arguments.extend(["-device".into(), "virtio-balloon-pci,id=balloon0".into()]);
    let source = Running::with(&guests, "a", &arguments).unwrap();
    console.pass();
    // This test has the RAM mapped as a vhost-user backend would.
    let ram = std::fs::File::options().read(true).write(true).open(guests.path("a.ram")).unwrap();
    let other = vm_memory::MmapRegion::<()>::from_file(vm_memory::FileOffset::new(ram, 0), 1 << 20);
    let (report, status) = migrate(&guests, "a", "127.0.0.1:1", &[]);
    drop(other);
    assert_eq!((status, &report["guest_at"]), (Some(1), &"source".into()), "{report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("balloon0 (virtio-balloon-pci): it gives RAM back"), "{error}");
    assert!(error.contains("has mapped the RAM too"), "{error}");
    console.pass();
    drop(source);
}

fn supports_o_direct(file: &std::path::Path) -> bool {
    use rustix::fs::{Mode, OFlags, open};
    open(file, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).is_ok()
}

/// Another guest's RAM and monitor are left alone, and a QEMU that is not there is told of, before anybody is waited
/// for.
#[test]
fn what_is_another_guests_is_not_taken() {
    let Some(guests) = Guests::bare(PAGES) else { return };
    let _console = Console::of(&guests, "a");
    let other = Running::start(&guests, "a").unwrap();
    other.connect().unwrap();
    for (host, ram, wrong) in
        [("b", "a.ram", "a.ram is there already"), ("a", "b.ram", "another QEMU's")]
    {
        let error = refused(&guests, host, ram, QEMU);
        assert!(error.contains(wrong), "{error}");
    }
    std::fs::write(guests.path("c.qmp"), b"a file").unwrap();
    let error = refused(&guests, "c", "c.ram", QEMU);
    assert!(error.contains("cannot be a monitor's socket"), "{error}");
    for qemu in ["/nonexistent/qemu", "qemu-of-nobody", "/etc/passwd"] {
        let error = refused(&guests, "e", "e.ram", qemu);
        assert!(error.contains(&format!("there is no program {qemu}")), "{error}");
    }
    assert!(other.connect().unwrap().run_state().unwrap().running);
    // And a path that nothing is at is no guest that is gone.
    assert_eq!(recover(&guests, "d", &[]), None);
}
