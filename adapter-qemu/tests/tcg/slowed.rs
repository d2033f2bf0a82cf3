//! Guests that write too fast, and are slowed down by a control group.

use std::fs;
use std::path::PathBuf;

use pageferry_qemu::testing::{Console, Guests, Running};

use crate::commands::{Heard, Receiving, may_track, migrating, recover, until};

/// A control group of this test's.
struct Group {
    folder: PathBuf,
    quota: &'static str,
}

impl Group {
    /// Says so, and why, if there can be none here.
    fn make() -> Option<Self> {
        // Of the first kind, or, with CPUs handed down, of the second.
        let kinds = [("cpu", "cpu.cfs_quota_us"), ("", "cpu.max"), ("unified", "cpu.max")];
        let name = format!("pageferry-test-{}", std::process::id());
        let mut why = Vec::new();
        for (kind, quota) in kinds {
            let folder = PathBuf::from("/sys/fs/cgroup").join(kind).join(&name);
            if let Err(error) = fs::create_dir(&folder) {
                why.push(format!("{}: {error}", folder.display()));
                continue;
            }
            let group = Self { folder, quota };
            if group.folder.join(quota).exists() {
                return Some(group);
            }
            why.push(format!("{} has no {quota}", group.folder.display()));
        }
        let why = why.join("; ");
        eprintln!("skipped, because control groups with a CPU quota cannot be made here: {why}");
        None
    }

    /// From now on that process is in it.
    fn take(&self, process: u32) {
        fs::write(self.folder.join("cgroup.procs"), process.to_string()).unwrap();
    }

    fn quota(&self) -> String {
        fs::read_to_string(self.folder.join(self.quota)).unwrap()
    }

    /// How often its threads had to wait for their next period.
    fn waited(&self) -> u64 {
        let stat = fs::read_to_string(self.folder.join("cpu.stat")).unwrap();
        let waited = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        waited.unwrap().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Once QEMU, which came later, is gone.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// By its quota, which it gets back, whatever becomes of the migration.
#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_and_gets_its_speed_back() {
    if !may_track() {
        return;
    }
    let Some(mut guests) = Guests::bare(4096) else { return };
    guests.rest_us = 0;
    let console = Console::of(&guests, "a");
    let Some(group) = Group::make() else { return };
    let source = Running::start(&guests, "a").unwrap();
    let heard = Heard::of(console);
    heard.await_pass();
    group.take(source.child.id());
    let before = group.quota();
    let folder = group.folder.to_str().unwrap();
    // It writes all of its pages again while they are sent.
    let link = ["--bandwidth-limit", "16M", "--switchover-bandwidth", "16M"];
    let slowed = ["--throttle-cgroup", folder, "--downtime-limit", "300ms", "--verify"];
    let options = [&link[..], &slowed].concat();
    let too_fast = |address: &str| {
        let mut program = migrating(&guests, "a", address, &options);
        program.hear("guest slowed down by 20 %");
        program
    };

    // Nobody is left to give it back.
    let _console = Console::of(&guests, "b");
    let (_there, address) = Receiving::start(&guests, "b", &[]);
    let mut program = too_fast(&address);
    program.kill();
    assert_ne!(group.quota(), before);
    let known = recover(&guests, "a", &["--run"]).unwrap();
    assert_eq!(known["record"]["slowed"][0]["contents"], before.trim_end());
    assert_eq!(group.quota(), before);

    // It stays, at its own speed.
    let waited = group.waited();
    let _console = Console::of(&guests, "c");
    let (_there, address) = Receiving::start(&guests, "c", &[]);
    let mut program = too_fast(&address);
    until("the guest is slowed down", || group.waited() != waited);
    program.say("cancel");
    let (report, status) = program.end();
    assert_eq!((status, &report["guest_at"]), (Some(3), &"source".into()), "{report}");
    assert_eq!(group.quota(), before);
    heard.await_pass();
}

/// Over a link that takes longer for what it writes all the time than it may stand still, so that nothing but its
/// quota helps. With a hundredth of a CPU it writes less than the link takes.
#[test]
fn a_guest_that_is_slowed_down_arrives() {
    const PAGES: u32 = 8192;
    if !may_track() {
        return;
    }
    let Some(mut guests) = Guests::bare(PAGES) else { return };
    (guests.rest_us, guests.work) = (0, 500);
    let (console, mut there) = (Console::of(&guests, "a"), Console::of(&guests, "b"));
    let Some(group) = Group::make() else { return };
    let mut source = Running::start(&guests, "a").unwrap();
    let heard = Heard::of(console);
    heard.await_pass();
    let passes = heard.next();
    group.take(source.child.id());
    let before = group.quota();
    let (mut receiving, address) = Receiving::start(&guests, "b", &[]);
    let options = [
        ["--bandwidth-limit", "28M"],
        ["--switchover-bandwidth", "28M"],
        ["--throttle-cgroup", group.folder.to_str().unwrap()],
        ["--downtime-limit", "600ms"],
    ]
    .concat();
    let mut program = migrating(&guests, "a", &address, &[&["--verify"], &options[..]].concat());
    program.hear("guest slowed down by 20 %");
    let (report, status) = program.end();
    assert_eq!(status, Some(0), "{report}");
    assert_eq!((&report["outcome"], &report["memory_match"]), (&"completed".into(), &true.into()));
    assert_eq!(report["convergence"], "throttled", "{report}");
    assert!(report["downtime_ms"].as_f64().unwrap() <= 600.0, "{report}");
    eprintln!("slowed down by {} %: {} ms", report["throttle_max_percent"], report["total_ms"]);
    assert_eq!(group.quota(), before);
    receiving.leave();
    let arrived = [there.pass(), there.pass()];
    assert!(arrived[0] > passes && arrived[1] > arrived[0], "{passes} here, {arrived:?} there");
    assert!(source.child.wait().unwrap().success(), "QEMU at the source did not quit");
}

/// It says so, and goes on.
#[test]
fn a_group_that_is_none_of_the_guests_is_refused() {
    if !may_track() {
        return;
    }
    let Some(guests) = Guests::bare(64) else { return };
    let mut console = Console::of(&guests, "a");
    let _source = Running::start(&guests, "a").unwrap();
    console.pass();
    let folder = guests.path("group");
    fs::create_dir(&folder).unwrap();
    let options = ["--throttle-cgroup", folder.to_str().unwrap()];
    let refused = || {
        let (report, status) = migrating(&guests, "a", "127.0.0.1:1", &options).end();
        assert_eq!((status, &report["guest_at"]), (Some(1), &"source".into()), "{report}");
        report["error"].as_str().unwrap().to_owned()
    };
    assert!(refused().contains("is no control group with a CPU quota"), "{}", refused());
    fs::write(folder.join("cpu.max"), "max 100000\n").unwrap();
    fs::write(folder.join("cgroup.threads"), "1\n").unwrap();
    assert!(refused().contains("in none of the control groups given"), "{}", refused());
    console.pass();
}
