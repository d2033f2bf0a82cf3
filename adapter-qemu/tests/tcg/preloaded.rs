//! A QEMU that hands a userfaultfd over, so that nobody has to trace it.

use std::ffi::OsString;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use pageferry_qemu::Tracking;
use pageferry_qemu::testing::{Console, Guests, QEMU, Running};

use crate::commands::{Receiving, has_strace, may_track, migrating, migrating_without_ptrace};

/// Beside this program, which depends on it.
fn library() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    tests.with_file_name("libpageferry_qemu_preload.so")
}

/// A QEMU that hands them over at that path.
fn start(guests: &Guests, host: &str, path: &Path) -> Running {
    let setting = |name: &str, path: &Path| {
        let mut setting = OsString::from(name);
        setting.push(path);
        setting
    };
    let mut command = Command::new("env");
    command.arg(setting("LD_PRELOAD=", &library()));
    command.arg(setting("PAGEFERRY_USERFAULTFD=", path)).arg(QEMU);
    let monitor = guests.path(&format!("{host}.qmp"));
    Running::by(&mut command, monitor, &guests.arguments(host)).unwrap()
}

/// Says so if there are none here that take a userfaultfd.
fn guests() -> Option<Guests> {
    if !may_track() {
        return None;
    }
    if Tracking::of_this_kernel().unwrap() == Tracking::SoftDirty {
        eprintln!("skipped, because soft-dirty bits take no userfaultfd");
        return None;
    }
    Guests::bare(4096)
}

#[test]
fn a_guest_of_a_qemu_that_may_not_be_traced_moves() {
    let Some(guests) = guests() else { return };
    if !has_strace() {
        return;
    }
    let (mut here, mut there) = (Console::of(&guests, "a"), Console::of(&guests, "b"));
    let path = guests.path("a.userfaultfd");
    // What another QEMU left is no obstacle.
    drop(UnixListener::bind(&path).unwrap());
    let mut source = start(&guests, "a", &path);
    let pass = here.pass();
    let (mut receiving, address) = Receiving::start(&guests, "b", &[]);
    let migrate = |options: &[&str]| {
        let options = [&["--verify", "--downtime-limit", "2s"], options].concat();
        migrating_without_ptrace(&guests, "a", &address, &options).end()
    };
    let (report, status) = migrate(&[]);
    assert_eq!(status, Some(1), "{report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("not permitted to trace process"), "{error}");

    // Who leaves without one holds nobody up: more of them than seconds that it is waited.
    (0..20).for_each(|_| drop(UnixStream::connect(&path).unwrap()));
    let (report, status) = migrate(&["--userfaultfd", path.to_str().unwrap()]);
    assert_eq!(status, Some(0), "{report}");
    assert_eq!(report["memory_match"], true, "{report}");
    assert_eq!(report["dirty_source"], "foreign pagemap scan", "{report}");
    receiving.leave();
    let passes = [there.pass(), there.pass()];
    assert!(passes[0] > pass && passes[1] > passes[0], "pass {pass} here, then {passes:?} there");
    assert!(source.child.wait().unwrap().success(), "QEMU at the source did not quit");
}

/// The guest runs on.
#[test]
fn a_userfaultfd_of_another_process_is_refused() {
    let Some(guests) = guests() else { return };
    let mut console = Console::of(&guests, "a");
    let (path, other) = (guests.path("a.userfaultfd"), guests.path("b.userfaultfd"));
    let _source = start(&guests, "a", &path);
    console.pass();
    let refused = |path: &Path| {
        let options = ["--userfaultfd", path.to_str().unwrap()];
        let (report, status) = migrating(&guests, "a", "127.0.0.1:1", &options).end();
        assert_eq!(status, Some(1), "{report}");
        report["error"].as_str().unwrap().to_owned()
    };
    let error = refused(&other);
    assert!(error.contains("is preloaded into it"), "{error}");
    assert!(error.contains("No such file"), "{error}");
    // This test's.
    let _listener = UnixListener::bind(&other).unwrap();
    let error = refused(&other);
    assert!(error.contains(&format!("process {} listens there", std::process::id())), "{error}");
    // And a right one is taken, up to where nobody waits for the guest.
    let error = refused(&path);
    assert!(error.contains("refused"), "{error}");
    console.pass();
}
