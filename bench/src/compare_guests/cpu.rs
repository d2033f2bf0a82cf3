//! CPU time of what moves a guest.

use std::collections::BTreeSet;
use std::time::Duration;

use pageferry_cli::cpu;
use pageferry_cli::outcome::Failure;
use pageferry_qemu::Qmp;
use pageferry_report::document::ms;

/// Of this process, of what it has started and ended meanwhile, and of some QEMUs, but for their virtual CPUs.
#[derive(Debug)]
pub(super) struct Cpu {
    before: Duration,
}

impl Cpu {
    pub(super) fn begin(qemus: &[&Qmp]) -> Result<Self, Failure> {
        Ok(Self { before: so_far(qemus)? })
    }

    /// In milliseconds; of the QEMUs that there are now.
    pub(super) fn end(self, qemus: &[&Qmp]) -> Result<f64, Failure> {
        Ok(ms(so_far(qemus)?.saturating_sub(self.before)))
    }
}

fn so_far(qemus: &[&Qmp]) -> Result<Duration, Failure> {
    let mut sum = cpu::time_of_process() + cpu::time_of_children()?;
    for qmp in qemus {
        let pid = qmp.peer_pid()?;
        let mut guest = Duration::ZERO;
        // One thread may run several.
        for thread in BTreeSet::from_iter(qmp.vcpu_threads()?) {
            guest += cpu::time_of_thread_of(pid, thread)?;
        }
        sum += cpu::time_of_process_of(pid)?.saturating_sub(guest);
    }
    Ok(sum)
}
