//! Virtual CPUs that a host lacks something of: known before a page moves, and named on both sides.

use std::process::Command;

use pageferry_rust_vmm::cpu::CpuProfile;
use rustix::process::Signal;

use crate::support::host::{guest_kind, skipped};
use crate::support::process::Process;
use crate::support::sides::{destination, source_that_stays};

/// A baseline in a file that is removed in the end.
struct Baseline(String);

impl Baseline {
    fn new(name: &str, profile: &CpuProfile) -> Self {
        let path = format!("{}/{name}-{}.json", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        std::fs::write(&path, serde_json::to_vec(profile).expect("JSON")).expect("write");
        Self(path)
    }
}

impl Drop for Baseline {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn printed(args: &[&str]) -> CpuProfile {
    let (status, out) = Process::start("cpu", &[&["cpu"], args].concat()).finish_for_people();
    assert_eq!(status, Some(0), "{args:?}");
    serde_json::from_str(&out).expect("a profile")
}

/// What this host has; `None`, said loudly, if there is no KVM.
fn host() -> Option<CpuProfile> {
    if guest_kind() != "kvm" {
        skipped("there is no KVM");
        return None;
    }
    Some(printed(&[]))
}

/// Features that a guest of this VMM does without.
fn spare(host: &CpuProfile) -> Vec<&'static str> {
    const NEEDED: [&str; 8] = ["fpu", "pae", "cx8", "apic", "lm", "nx", "msr", "pse"];
    let names = host.features().filter_map(|feature| feature.name());
    let mut spare: Vec<_> = names.filter(|name| !NEEDED.contains(name)).collect();
    spare.sort_unstable();
    spare.dedup();
    assert!(spare.len() > 10, "{spare:?}");
    spare
}

/// Each feature that this host's KVM has is hidden once, and named; no other is.
#[test]
fn a_feature_that_is_hidden_is_missing() {
    let Some(host) = host() else { return };
    for name in spare(&host) {
        let less = printed(&["--without", name]);
        let lacks = host.check_on(&less).expect_err(name);
        assert!(lacks.iter().all(|lack| lack.to_string() == name), "{name}: {lacks}");
        assert_eq!(less.check_on(&host), Ok(()));
    }
}

#[test]
fn a_guest_does_not_move_to_a_host_that_lacks_what_it_has() {
    let Some(host) = host() else { return };
    let hidden: Vec<_> = spare(&host).into_iter().take(3).collect();
    let less = Baseline::new("less", &printed(&["--without", &hidden.join(",")]));
    let (mut destination, address) = destination(&["--cpu-baseline", &less.0]);
    let mut source = source_that_stays(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    let failed = source.await_report();
    assert_eq!((failed.text("outcome"), failed.text("guest_at")), ("failed", "source"));
    // In the same words on both sides, and nothing has moved.
    let said = destination.await_message("no guest came from");
    for name in hidden {
        assert!(failed.text("error").contains(name) && said.contains(name), "{said} {failed:?}");
    }
    assert_eq!(failed.count("pages.data"), 0);
    source.await_beats_beyond(beats);
    source.say("quit");
    source.finish().assert_status(1);

    // One that was made for both moves.
    let mut source = source_that_stays(&["--cpu-baseline", &less.0]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

/// A file that says two things of one leaf is none; and one that nobody writes can be given up.
#[test]
fn a_baseline_that_cannot_be_used_is_refused() {
    let Some(host) = host() else { return };
    let mut json = serde_json::to_value(&host).expect("JSON");
    let leaves = json["cpuid"].as_array_mut().expect("leaves");
    leaves.push(leaves[0].clone());
    let twice = Baseline::new("twice", &host);
    std::fs::write(&twice.0, json.to_string()).expect("write");
    let mut process = Process::start("cpu", &["cpu", &twice.0]);
    assert_eq!(process.finish_for_people().0, Some(1));
    process.await_message("says two things of CPUID");

    let pipe = Baseline::new("pipe", &host);
    std::fs::remove_file(&pipe.0).expect("remove");
    let made = Command::new("mkfifo").arg(&pipe.0).status().expect("mkfifo");
    assert!(made.success());
    for command in ["run", "receive"] {
        let mut process = Process::start("program", &[command, "--cpu-baseline", &pipe.0]);
        process.signal(Signal::TERM);
        assert_eq!(process.finish_for_people().0, None, "ended by the signal");
    }
}

/// What hosts have in common is no more than each has.
#[test]
fn a_baseline_is_what_hosts_have_in_common() {
    let Some(host) = host() else { return };
    let [one, other, ..] = spare(&host)[..] else { panic!("two features") };
    let [one, other] = [one, other].map(|name| host.clone().without(name).expect("a feature"));
    let [one, other] = [Baseline::new("one", &one), Baseline::new("other", &other)];
    let both = printed(&[&one.0, &other.0]);
    assert_eq!(both, printed(&["--without", &spare(&host)[..2].join(",")]));
}

#[test]
fn a_file_that_is_no_baseline_is_refused() {
    let Some(host) = host() else { return };
    let file = Baseline::new("odd", &host);
    std::fs::write(&file.0, b"{\"cpuid\":[]}").expect("write");
    for args in [
        vec!["cpu", &file.0],
        vec!["cpu", "/nowhere"],
        vec!["cpu", "--without", "sse9"],
        vec!["run", "--cpu-baseline", &file.0],
        vec!["receive", "--listen", "127.0.0.1:0", "--cpu-baseline", "/nowhere"],
    ] {
        let mut process = Process::start("program", &args);
        let (status, _) = process.finish_for_people();
        assert_eq!(status, Some(1), "{args:?}: {}", process.messages());
        process.await_message("error: ");
    }
}
