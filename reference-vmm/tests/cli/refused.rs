//! Migrations that cannot begin: a clear error, and the guest goes on where it is.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry::memory::{Layout, PAGE_BYTES, RegionLayout};
use pageferry::protocol::Message;
use pageferry_vmm::ram::Ram;

use crate::support::peer::{
    closed_port, hello_of, let_in, listen, receive, send, small_guest, welcomed,
};
use crate::support::process::Process;
use crate::support::sides::{destination, destination_that_stays, source, source_of};

/// A source that is told to migrate to `address` fails for all these reasons, and keeps its guest.
fn assert_fails(address: &str, why: &[&str]) {
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    source.finish().report(1).assert_kept("failed", why, beats);
}

#[test]
fn nobody_listens() {
    let (_held, address) = closed_port();
    assert_fails(&address, &["failed to connect to", &address, "refused"]);
}

#[test]
fn addresses_that_are_none() {
    // No name has a part of more than 63 characters: no name server is asked.
    let unknown = format!("{}.invalid:7400", "a".repeat(64));
    for address in ["nonsense", "127.0.0.1:port", "127.0.0.1:99999", &unknown] {
        assert_fails(address, &["failed to connect to", address]);
    }
    // It could be an address of eight groups as well.
    assert_fails("fe80::1:7400", &["in brackets before its port: [fe80::1]:7400"]);
    assert_fails("[fe80::1%no-such0]:7400", &["is there a network interface no-such0?"]);
}

#[test]
fn a_port_that_is_in_use_and_addresses_that_cannot_be_listened_on() {
    let (_listener, used) = listen();
    for (address, why) in [
        (used.as_str(), "in use"),
        // For documentation (RFC 5737), so never this host's.
        ("192.0.2.1:0", "assign requested address"),
        ("nonsense", "invalid socket address"),
    ] {
        let mut destination =
            Process::start("destination", &["receive", "--json", "--listen", address]);
        let report = destination.finish().report(1);
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "nowhere"));
        assert!(report.text("error").contains(why), "{report:?}");
        let message = destination.await_message("error: failed to listen on ");
        assert!(message.contains(address) && message.contains(why), "{message}");
    }
}

#[test]
fn memory_of_another_size() {
    let (mut destination, address) = destination(&["--memory", "128M"]);
    assert_fails(&address, &["(declined)", "67108864", "134217728"]);
    let line = destination.await_message("no guest came from ");
    assert!(["67108864", "134217728"].iter().all(|part| line.contains(part)), "{line}");
    // It was not the guest that is waited for, which may come yet.
    let mut source = source_of(&["--memory", "128M", "--working-set", "8M", "--run-for", "100ms"]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

/// Nobody registers it for as long as so much would take: it is refused as it is offered, by all but who was
/// told to take it.
#[test]
fn more_memory_than_the_machine_has() {
    let here = pageferry_report::facts::memory_and_swap_bytes().expect("what the machine has");
    let (mut destination, address) = destination(&[]);
    let mut stranger = let_in(&address);
    let mut hello = hello_of(small_guest(), 1);
    let more = (here / PAGE_BYTES + 1) * PAGE_BYTES;
    let mut guest = small_guest();
    guest.regions = Ram::pc_regions(more);
    let regions = guest.regions.iter().map(|(guest_addr, len_bytes)| RegionLayout {
        guest_addr: *guest_addr,
        len_bytes: *len_bytes,
        backing_page_bytes: PAGE_BYTES,
    });
    hello.layout = Layout::new(regions.collect()).expect("a layout");
    hello.description = serde_json::to_vec(&guest).expect("a description");
    send(&mut stranger, &Message::Hello(hello).encode());
    let Message::Failed { text, .. } = receive(&mut stranger) else { panic!("it was welcomed") };
    for part in [&more.to_string(), &here.to_string(), &format!("--memory {more}")] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let line = destination.await_message("no guest came from ");
    assert!(line.contains("memory and swap"), "{line}");
    // The place is free for the guest that is waited for.
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

/// A control group with so much memory, if there can be one here; says so if not.
struct Group {
    folder: PathBuf,
    limit: &'static str,
}

impl Group {
    fn make() -> Option<Self> {
        // Of the first kind, or, with memory handed down, of the second.
        let kinds =
            [("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max")];
        let name = format!("pageferry-test-{}", std::process::id());
        let mut why = Vec::new();
        for (kind, limit) in kinds {
            let folder = Path::new("/sys/fs/cgroup").join(kind).join(&name);
            if let Err(error) = fs::create_dir(&folder) {
                why.push(format!("{}: {error}", folder.display()));
                continue;
            }
            let group = Self { folder, limit };
            if group.folder.join(limit).exists() {
                return Some(group);
            }
            why.push(format!("{} has no {limit}", group.folder.display()));
        }
        let why = why.join("; ");
        eprintln!("skipped, because control groups with a memory limit cannot be made here: {why}");
        None
    }

    fn set_limit(&self, bytes: u64) {
        fs::write(self.folder.join(self.limit), bytes.to_string()).expect("a limit");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Once who is in it is gone.
        let _ = fs::remove_dir(&self.folder);
    }
}

#[test]
fn more_memory_than_the_control_group_may_have() {
    let Some(group) = Group::make() else { return };
    group.set_limit(48 << 20);
    let (mut destination, address) = destination(&[]);
    fs::write(group.folder.join("cgroup.procs"), destination.pid().to_string()).expect("a move");
    let limit = (48 << 20).to_string();
    assert_fails(&address, &["(declined)", "67108864", &limit, "are left", "--memory 67108864"]);
    let line = destination.await_message("no guest came from ");
    assert!(line.contains(group.limit), "{line}");
    // With more it takes the next.
    group.set_limit(1 << 30);
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

/// A socket for both kinds of addresses sees IPv4 ones as IPv6.
#[test]
fn who_comes_by_ipv4_is_told_by_that_address() {
    let own = ["receive", "--with-parent", "--json", "--listen", "[::]:0"];
    for transport in ["--transport=tcp", "--transport=auto"] {
        let mut destination = Process::start("destination", &[&own[..], &[transport]].concat());
        let line = destination.await_message("listening on [::]:");
        let port = line.rsplit(':').next().expect("a port");
        drop(welcomed(&format!("127.0.0.1:{port}"), 1));
        destination.await_message("a source connected from 127.0.0.1:");
        destination.await_message("no guest came from 127.0.0.1:");
    }
}

#[test]
fn memory_of_the_size_that_is_wanted() {
    let (mut destination, address) = destination(&["--memory", "64M"]);
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn a_destination_that_has_a_guest_already() {
    let (mut destination, address) = destination_that_stays(&[]);
    let mut first = source(&[]);
    first.say(format!("migrate {address}"));
    first.finish().report(0).assert_departed();
    destination.await_report();
    assert_fails(&address, &["failed to connect to", "refused"]);
    assert!(destination.lives());
}
