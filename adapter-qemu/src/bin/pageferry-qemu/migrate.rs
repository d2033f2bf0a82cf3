//! `migrate`: moves a guest away.

use std::sync::Arc;

use crossbeam_channel::unbounded;
use pageferry::dirty::DirtySources;
use pageferry_cli::departure::Departure;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Pulses, Report};
use pageferry_cli::say;
use pageferry_cli::wishes::{listen_to_signals, listen_to_stdin};
use pageferry_qemu::quota::{Before, Quotas};
use pageferry_qemu::record::{Record, RecordFile, Recorded, Standing};
use pageferry_qemu::{PulseStatistics, QemuPulses, QemuSource, Qmp, Tracking, Vm, preflight, ram};
use pageferry_report::document::ms;
use pageferry_rust_vmm::ForeignProcess;

use crate::args::MigrateArgs;

/// Moves it. Where it is if this fails, is in `guest_at`.
pub(crate) fn migrate(args: &MigrateArgs, guest_at: &mut GuestAt) -> Result<Outcome, Failure> {
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    listen_to_stdin(wishes_in)?;
    let observers = args.observers.open()?;
    // Whoever is at work on the guest has its monitor too.
    let left = RecordFile::left(&args.qmp)?;
    let qmp = Arc::new(Qmp::connect(&args.qmp)?);
    *guest_at = GuestAt::Source;
    if let Some(left) = left {
        if !qmp.run_state()?.running {
            return Err(left.left_over(&args.qmp).into());
        }
        // Its own speed is what it had before that.
        left.record().slowed.iter().try_for_each(Before::restore)?;
    }
    let backends = ram::backends_of(&qmp)?;
    let vm = Vm::of(&qmp, backends.iter().map(|(backend, _)| backend.clone()).collect())?;
    let pid = args.pid.map_or_else(|| qmp.peer_pid(), Ok)?;
    let tracking = Tracking::of_this_kernel()?;
    let direct_disks = preflight::check(&qmp, pid, &backends, tracking)?;
    let mut machine = QemuSource::new(Arc::clone(&qmp))?;
    let mut record = Record::new(Standing::Here, Some(args.to.clone()), Vec::new());
    if !args.throttle_cgroup.is_empty() {
        let quotas = Quotas::new(&args.throttle_cgroup, &qmp.vcpu_threads()?)?;
        record.slowed = quotas.before();
        machine = machine.slowed_by(quotas);
    }
    let machine = Recorded::source(machine, RecordFile::create(&args.qmp, record)?);
    let memory = ram::map(&backends)?;
    let process = ForeignProcess::open(pid)?;
    let pulses = Arc::new(QemuPulses::new(Arc::clone(&qmp)));
    let with_direct_io = !direct_disks.is_empty();
    let handed = args.userfaultfd.as_deref();
    let tracker = tracking.source(process, handed, &memory, &pulses, with_direct_io)?;
    let sources = DirtySources::new(vec![tracker]);
    let dirty_source = sources.names().concat();
    say!("a guest of QEMU {}, {}, vCPUs: {}", vm.qemu, vm.machine, vm.vcpus);
    if tracking.needs_pulses(with_direct_io) {
        let why = if with_direct_io {
            format!("disks with cache.direct=on: {}", direct_disks.join(", "))
        } else {
            "Linux before 6.7".to_owned()
        };
        say!("it stands still for a moment with each round ({why})");
    }
    let departure = Departure {
        migration: &args.migration,
        description: serde_json::to_vec(&vm)?,
        memory_bytes: memory.layout().len_bytes(),
        verify: args.verify,
        record: false,
        observers: &observers,
    };
    *guest_at = GuestAt::Unknown;
    let gone = departure.migrate(machine, |_| Ok((memory, sources)), &args.to, &wishes)?;
    let mut report = gone.report;
    report.guest = Some("qemu".to_owned());
    report.vcpus = u8::try_from(vm.vcpus).ok();
    report.dirty_source = Some(dirty_source);
    report.pulses = tracking.needs_pulses(with_direct_io).then(|| {
        let PulseStatistics { count, total, longest } = pulses.statistics();
        Pulses { count, total_ms: ms(total), longest_ms: ms(longest) }
    });
    end(&report, &qmp, gone.machine.file, args);
    report.print(args.json)?;
    Ok(report.outcome)
}

/// Ends QEMU here if its guest runs elsewhere, and the record if nothing is left to decide.
fn end(report: &Report, qmp: &Qmp, record: RecordFile, args: &MigrateArgs) {
    if report.guest_at == GuestAt::Unknown {
        let monitor = args.qmp.display();
        say!("see `pageferry-qemu recover --qmp {monitor}`, and the same at the destination");
        record.leave();
    } else if report.outcome == Outcome::Completed {
        if let Err(error) = record.stand(Standing::Gone) {
            say!("the guest runs at the destination; {error}");
        }
        if let Err(error) = qmp.quit() {
            say!("the guest runs at the destination; QEMU here did not quit: {error}");
            record.leave();
        }
    }
}
