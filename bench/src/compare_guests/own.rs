//! pageferry, by its library.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pageferry::dirty::DirtySources;
use pageferry::transport::OneLink;
use pageferry::{Destination, Source};
use pageferry_cli::outcome::Failure;
use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_qemu::ram::{self, Made};
use pageferry_qemu::testing::Running;
use pageferry_qemu::{QemuCommand, QemuDestination, QemuPulses, QemuSource, Tracking};
use pageferry_report::document::ms;
use pageferry_rust_vmm::ForeignProcess;

use super::stage::{Moved, Mover, Stage};
use crate::links::{Listener, Way, connect};
use crate::qemu::PATIENCE;

pub(super) struct Own {
    pub(super) way: Way,
    pub(super) channels: u16,
    pub(super) downtime_limit: Duration,
}

impl Mover for Own {
    fn name(&self) -> String {
        format!("pageferry, {}", self.way)
    }

    fn go(&self, stage: &Stage) -> Result<Moved, Failure> {
        let tracking = Tracking::of_this_kernel()?;
        let command = QemuCommand {
            program: "qemu-system-x86_64".into(),
            arguments: stage.guests.arguments(&stage.there),
        };
        // QEMU's own has a QEMU that waits already, too.
        let made = Made::create(&stage.guests.ram_files(&stage.there))?;
        let mut home = QemuDestination::start(command, made)?;
        let qmp_there = Arc::clone(home.qmp().ok_or("its QEMU is gone")?);
        let memory_there = home.map(&ram::backends_of(&qmp_there)?)?;
        let listener = Listener::bind(self.way)?;
        let address = listener.address();
        // All that may fail comes before somebody waits for a source. As `pageferry-qemu migrate` does it.
        let memory = ram::map(&ram::backends_of(&stage.qmp)?)?;
        let pulses = Arc::new(QemuPulses::new(Arc::clone(&stage.qmp)));
        let process = ForeignProcess::open(stage.pid)?;
        let sources =
            DirtySources::new(vec![tracking.source(process, None, &memory, &pulses, false)?]);
        let machine = QemuSource::new(Arc::clone(&stage.qmp))?;
        let source = Source::new()
            .channels(self.channels)
            .downtime_limit(self.downtime_limit)
            .deadline(PATIENCE);
        let cpu = stage.cpu(&qmp_there)?;
        let (sent, received) = thread::scope(|scope| {
            let receiving = scope.spawn(|| -> Result<_, Failure> {
                let offer =
                    Destination::new().negotiate(OneLink::destination(listener.accept()?))?;
                Ok(offer.receive(home, &memory_there).map_err(|failed| failed.error)?)
            });
            let sent = connect(self.way, ZeroCopyChoice::Auto, address).and_then(|link| {
                let departed = source.migrate(machine, &memory, sources, OneLink::source(link));
                Ok(departed.map_err(|failed| failed.error)?.statistics)
            });
            (sent, receiving.join())
        });
        let received = received.map_err(|_| "the destination panicked")?;
        let departed = sent?;
        let (child, qmp_there) =
            received?.machine.keep().ok_or("the QEMU of a guest that moved is gone")?;
        let monitor = stage.guests.path(&format!("{}.qmp", stage.there));
        let there = Running { child, monitor };
        let cpu_ms = cpu.end(&[&stage.qmp, &qmp_there])?;
        Ok(Moved {
            total_ms: ms(departed.total),
            downtime_ms: ms(departed.downtime.total()),
            wire_bytes: departed.wire_bytes + departed.device_state.bytes,
            cpu_ms,
            _there: there,
        })
    }
}
