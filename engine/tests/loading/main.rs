//! A destination that still loads device state of a switchover that was called off: it does nothing else
//! meanwhile, and that costs the migration nothing.

#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use pageferry::convergence::Policy;
use pageferry::dirty::DirtySources;
use pageferry::memory::PageRange;
use pageferry::testing::{TestMemory, WrappedChannel, WrappedSource, memory_transport};
use pageferry::transport::{OneLink, SourceLink};
use pageferry::{
    Arrived, Departed, Destination, Event, Machine, MachineError, Source, SwitchoverStage, Timeouts,
};
use support::{SharedLog, SoftwareLog, TestMachine};

/// A link that loses its second data channel when it is told to.
fn unlucky(link: Box<dyn SourceLink>, lost: Arc<AtomicBool>) -> WrappedSource {
    WrappedSource::new(link).channels(move |channel, inner| match channel {
        1 => Box::new(WrappedChannel::new(inner).breaking(Arc::clone(&lost))),
        _ => inner,
    })
}

/// Pages that the first load writes: one with data, and one that is zero at the source and never mentioned.
const WRITTEN: [PageRange; 2] = [
    PageRange { region: 0, first_page: 700, pages: 1 },
    PageRange { region: 0, first_page: 400, pages: 1 },
];

/// Its first load goes on until it was called off, and for a while more.
#[derive(Debug)]
struct Loading {
    inner: TestMachine,
    memory: TestMemory,
    called_off: Option<Receiver<()>>,
    longer: Duration,
    written: Vec<PageRange>,
}

impl Machine for Loading {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.inner.pause()
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.inner.resume()
    }
    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.inner.save(state)
    }
    fn check_state_schema(&self, source: &[u8]) -> Result<(), MachineError> {
        self.inner.check_state_schema(source)
    }
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        if let Some(called_off) = self.called_off.take() {
            called_off.recv()?;
            thread::sleep(self.longer);
            for PageRange { region, first_page, .. } in WRITTEN {
                self.memory.fill_page(region, first_page, 99);
            }
            self.written = WRITTEN.to_vec();
        }
        self.inner.load(state)
    }
    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        Ok(std::mem::take(&mut self.written))
    }
    fn unload(&mut self) -> Result<(), MachineError> {
        self.inner.unload()
    }
    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.inner.release_resources()
    }
    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        self.inner.reacquire_resources()
    }
}

/// Moves a guest, whose first switchover is called off while the destination loads.
fn called_off_once() -> (Departed<TestMachine>, Arrived<Loading>) {
    let (here, there) = (TestMemory::new(&[1000]), TestMemory::new(&[1000]));
    (0..500).for_each(|page| here.fill_page(0, page, 1));
    let (source_link, destination_link) = memory_transport::pair();
    let log = SoftwareLog::new(&here);
    let mut mine = TestMachine::new(&here, &log, 100, 42);
    mine.resume().unwrap();
    mine.await_writes();
    let mut inner = TestMachine::new(&there, &SoftwareLog::new(&there), 100, 43);
    inner.contend_with(&mine);
    // Nothing may take as long as half of it: no word on a lost channel, no page, no frame.
    let patience = Duration::from_secs(2);
    let (tell, told) = unbounded();
    let (memory, longer, written) = (there.clone(), 2 * patience, Vec::new());
    let theirs = Loading { inner, memory, called_off: Some(told), longer, written };

    let lost = Arc::new(AtomicBool::new(false));
    let timeouts = Timeouts { handshake: patience, stall: patience, ..Timeouts::default() };
    let source = Source::new().channels(2).timeouts(timeouts).policy(Policy::KeepTrying);
    // Which compares memory before the guest goes on.
    let source = source.downtime_limit(Duration::from_millis(400)).verify(true);
    let (handle, losing) = (source.handle(), Arc::clone(&lost));
    let source = source.on_event(move |event| {
        if let Event::CalledOff { stage: Some(SwitchoverStage::DeviceState), .. } = event {
            losing.store(true, Ordering::SeqCst);
            // What one load took is no reason against another.
            handle.set_downtime_limit(Duration::from_secs(60));
            tell.send(()).expect("the destination loads");
        }
    });
    let (departed, arrived) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new()
                .negotiate(OneLink::destination(Box::new(destination_link)))
                .unwrap();
            offer.receive(theirs, there.memory())
        });
        let dirty = DirtySources::new(vec![Box::new(SharedLog(log))]);
        let link = Box::new(unlucky(Box::new(source_link), lost));
        let departed = source.migrate(mine, here.memory(), dirty, OneLink::source(link));
        (departed, receiving.join().expect("the destination does not panic"))
    });
    (departed.expect("the source hands over"), arrived.expect("the guest arrives"))
}

/// And what it has written is gone again.
#[test]
fn a_load_that_outlives_its_switchover_costs_time_alone() {
    let (departed, arrived) = called_off_once();
    assert_eq!(departed.statistics.lost_channels, 1);
    assert!(departed.statistics.switchover_attempts > 1);
    assert!(arrived.machine.called_off.is_none() && arrived.machine.inner.is_running());
    assert!(arrived.verified && !arrived.paused);
}
