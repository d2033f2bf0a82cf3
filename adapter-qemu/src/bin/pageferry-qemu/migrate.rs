//! `migrate`: moves a guest away.

use std::sync::Arc;

use crossbeam_channel::unbounded;
use pageferry::dirty::DirtySources;
use pageferry_cli::departure::Departure;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::wishes::{listen_to_signals, listen_to_stdin};
use pageferry_qemu::{QemuSource, Qmp, Vm, preflight, ram};
use pageferry_rust_vmm::{ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd};

use crate::args::MigrateArgs;

pub(crate) fn migrate(args: &MigrateArgs) -> Result<Outcome, Failure> {
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    listen_to_stdin(wishes_in)?;
    let qmp = Arc::new(Qmp::connect(&args.qmp)?);
    let backends = ram::backends_of(&qmp)?;
    let vm = Vm::of(&qmp, backends.iter().map(|(backend, _)| backend.clone()).collect())?;
    let pid = args.pid.map_or_else(|| qmp.peer_pid(), Ok)?;
    preflight::check(&qmp, pid, &backends)?;
    let machine = QemuSource::new(Arc::clone(&qmp))?;
    let memory = ram::map(&backends)?;
    let process = ForeignProcess::open(pid)?;
    let tracker = ForeignPagemapScan::new(process, &memory, ForeignUserfaultfd::made_in)?;
    let sources = DirtySources::new(vec![Box::new(tracker)]);
    let dirty_source = sources.names().concat();
    say!("a guest of QEMU {}, {}, vCPUs: {}", vm.qemu, vm.machine, vm.vcpus);
    let departure = Departure {
        migration: &args.migration,
        description: serde_json::to_vec(&vm)?,
        memory_bytes: memory.layout().len_bytes(),
        verify: args.verify,
        record: false,
    };
    let gone = departure.migrate(machine, |_| Ok((memory, sources)), &args.to, &wishes)?;
    let mut report = gone.report;
    report.guest = Some("qemu".to_owned());
    report.vcpus = u8::try_from(vm.vcpus).ok();
    report.dirty_source = Some(dirty_source);
    // The guest runs elsewhere; what stands here is no use to anybody.
    if report.outcome == Outcome::Completed
        && let Err(error) = qmp.quit()
    {
        say!("the guest runs at the destination; QEMU here did not quit: {error}");
    }
    report.print(args.json)?;
    Ok(report.outcome)
}
