//! Guests that move while each of the engine's threads may call no more than docs/embedding.md lists, by a seccomp
//! filter that ends the process (SIGSYS) where one does.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pageferry::threads::{Running, Spawn, StdThreads, ThreadBody, ThreadRole};
use pageferry::transport::{Connector, Rendezvous};
use pageferry::{Destination, Source};
use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_tcp::testing::shared_key;
use pageferry_tcp::{KernelTls, TcpAcceptor, TcpDialler, TcpOptions};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::Guest;
use pageferry_vmm::workload::WorkloadKind;
use seccompiler::{BpfMap, apply_filter, compile_from_json};

use crate::common::{assert_ok, booted, config, kinds, run_for_beats, wait_for_beats};
use crate::documented;

/// A filter for each row of the table.
fn filters() -> Arc<BpfMap> {
    let table = documented::system_calls();
    let everyone = &table["every one"];
    let filter = |calls: &BTreeSet<String>| {
        let allowed: Vec<_> =
            calls.union(everyone).map(|call| serde_json::json!({ "syscall": call })).collect();
        serde_json::json!({ "mismatch_action": "trap", "match_action": "allow", "filter": allowed })
    };
    let filters: BTreeMap<_, _> = table.iter().map(|(role, calls)| (role, filter(calls))).collect();
    let json = serde_json::to_vec(&filters).expect("JSON");
    let arch = std::env::consts::ARCH.try_into().expect("an architecture that has filters");
    Arc::new(compile_from_json(json.as_slice(), arch).expect("names of system calls"))
}

#[derive(Clone)]
struct Filtered(Arc<BpfMap>);

impl Filtered {
    fn wrap(&self, role: ThreadRole, body: ThreadBody) -> ThreadBody {
        let filters = Arc::clone(&self.0);
        Box::new(move || {
            let name = role.to_string();
            let filter = filters.iter().find(|(row, _)| name.starts_with(row.as_str()));
            apply_filter(filter.expect("a row for each role").1).expect("a filter");
            body();
        })
    }
}

impl Spawn for Filtered {
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> std::io::Result<Box<dyn Running>> {
        StdThreads.spawn(role, self.wrap(role, body))
    }
}

/// A guest of each kind moves between two such sides, and lost nothing.
fn assert_moves(tcp: &TcpOptions, rings: Option<&Rings>) {
    let filtered = Filtered(filters());
    for kind in kinds() {
        let config = config(kind, WorkloadKind::Sequential, 1);
        let mut machine = GuestMachine { guest: booted(config.clone()) };
        machine.guest.resume().expect("it runs");
        wait_for_beats(&machine.guest, 5);
        let acceptor = TcpAcceptor::bind_with("127.0.0.1:0", tcp.clone(), |body| {
            thread::Builder::new().spawn(filtered.wrap(ThreadRole::Acceptor, body))
        });
        let acceptor = acceptor.expect("a port of loopback");
        let dialler = TcpDialler::new(acceptor.local_addr().to_string(), tcp.clone());
        let (connector, rendezvous): (Box<dyn Connector>, Box<dyn Rendezvous>) = match rings {
            Some(rings) => (
                Box::new(rings.dialler(dialler)),
                Box::new(rings.rendezvous(acceptor.rendezvous())),
            ),
            None => (Box::new(dialler), Box::new(acceptor.rendezvous())),
        };
        let (memory, dirty) = machine.described().expect("it tracks what is written");
        let mut arrived = thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let destination =
                    Destination::new().threads(Arc::new(filtered.clone())).populate_ahead(1);
                let offer = destination.negotiate(rendezvous).expect("a source greets");
                let machine = GuestMachine { guest: Guest::create(config).expect("room for it") };
                let memory = machine.memory().expect("memory");
                offer.receive(machine, &memory).expect("it arrives").machine.guest
            });
            let source = Source::new()
                .channels(2)
                .downtime_limit(Duration::from_secs(10))
                .threads(Arc::new(filtered.clone()));
            source.migrate(machine, &memory, dirty, connector).expect("it leaves");
            receiving.join().expect("no panic")
        });
        arrived.pause().expect("it runs");
        run_for_beats(&mut arrived, 5);
        assert_ok(&arrived);
    }
}

#[test]
fn by_tcp() {
    assert_moves(&TcpOptions::default(), None);
}

#[test]
fn by_tcp_encrypted() {
    assert_moves(&shared_key(KernelTls::Auto), None);
}

#[test]
fn by_io_uring() {
    match Rings::new(IoUringOptions::default()) {
        Ok(rings) => assert_moves(&TcpOptions::default(), Some(&rings)),
        Err(error) => eprintln!("filtered::by_io_uring skipped, because {error}"),
    }
}

/// The filter is there: what is not listed ends the process, here one of its own.
#[test]
fn what_is_not_listed_is_not_called() {
    let filtered = Filtered(filters());
    let child = || -> std::io::Result<()> {
        let body =
            filtered.wrap(ThreadRole::Control, Box::new(|| drop(std::fs::remove_dir("/none"))));
        thread::spawn(body).join().map_err(|_| std::io::Error::other("it panicked"))
    };
    if std::env::var_os("FILTERED_CHILD").is_some() {
        child().expect("never comes back");
        return;
    }
    let program = std::env::current_exe().expect("this program");
    let status = std::process::Command::new(program)
        .args(["--exact", "filtered::what_is_not_listed_is_not_called"])
        .env("FILTERED_CHILD", "1")
        .status()
        .expect("it starts");
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}");
}
