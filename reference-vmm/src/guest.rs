//! A guest: memory, virtual CPUs and devices, started, stopped, saved and loaded.
//!
//! # Lifecycle
//!
//! [`Guest::create`] makes a paused guest that knows nothing. A source calls [`Guest::boot`]; a
//! destination has the memory brought to it and calls [`Guest::load`]. Then both may
//! [`Guest::resume`] and [`Guest::pause`].
//!
//! # Thread safety
//!
//! A `Guest` may be shared and sent. What changes it takes `&mut self`; heartbeat, failure and
//! serial output can be read while it runs.
//!
//! # Resource cleanup
//!
//! Dropping a guest ends and joins its threads and closes its virtual machine. Memory goes when
//! the last clone of its [`GuestRam`] does. A dropped guest with [`KvmHandles`] still around keeps the
//! VM, which does nothing without its virtual CPUs.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_device_state::{Registry, Schema};
use pageferry_rust_vmm::DirtyRings;
use pageferry_rust_vmm::time::Meanwhile;

use crate::devices::Devices;
use crate::error::{GuestError, StateError};
use crate::heartbeat::{HeartbeatGap, HeartbeatSnapshot};
use crate::kvm::{self, KvmMachine};
use crate::layout::{CLOCK, CLOCK_BEGAN, Layout};
use crate::linear::LinearMemory;
use crate::process::ProcessMachine;
use crate::ram::GuestRam;
use crate::run_control::{StillRunning, Workers};
use crate::throttle::Throttle;
use crate::tracking::DirtyTracking;
use crate::workload::oracle;
use crate::workload::{OracleReport, contents};

pub use crate::config::{
    GuestConfig, host_cpu, kvm_available, tracking_available, workload_available,
};
pub use crate::kind::GuestKind;
pub use crate::kvm::{KvmHandles, MemorySlot};

/// For a guest that lives to beat.
const BEAT_TIMEOUT: Duration = Duration::from_secs(10);

/// A virtual CPU that does not stop for this long sits in the kernel, waiting for memory.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(30);

/// A guest.
#[derive(Debug)]
pub struct Guest {
    machine: Machine,
    devices: Arc<Devices>,
    ram: GuestRam,
    memory: LinearMemory,
    layout: Layout,
    config: GuestConfig,
    tracking: DirtyTracking,
    contents: Contents,
    throttle: Throttle,
    /// What the guest's time does between a save and a load.
    meanwhile: Meanwhile,
    /// Bytes that were saved last: about as many come next.
    state_bytes: usize,
}

#[derive(Debug)]
enum Machine {
    Kvm(KvmMachine),
    Process(ProcessMachine),
}

/// What registers and devices hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Nothing,
    Guest,
    HalfLoaded,
}

impl Guest {
    /// Allocates memory and makes virtual CPUs, paused. Nothing in memory is touched.
    pub fn create(config: GuestConfig) -> Result<Self, GuestError> {
        Self::create_tracked(config, DirtyTracking::default())
    }

    /// The same, with a choice of what will track its writes. That it fits the guest is checked
    /// here, that this host has it only so far as the guest is made with it.
    pub fn create_tracked(
        mut config: GuestConfig,
        tracking: DirtyTracking,
    ) -> Result<Self, GuestError> {
        tracking.check(config.kind)?;
        workload_available(config.kind, config.workload.kind)?;
        let layout = Layout::new(&config.regions, config.vcpus, config.workload.working_set_bytes)?;
        let with_bitmap = tracking == DirtyTracking::Bitmap;
        let ram = GuestRam::for_guest(&config.regions, config.backing, with_bitmap)?;
        let memory = LinearMemory::new(&ram, &layout);
        let workload = &config.workload;
        let (machine, devices) = match config.kind {
            GuestKind::Kvm => {
                let (board, serial_interrupt) = kvm::Board::new(tracking)?;
                let devices = Arc::new(Devices::new(serial_interrupt));
                let cpu = board.cpu(config.cpu.take())?;
                let machine =
                    KvmMachine::create(board, &cpu, &ram, &memory, &layout, workload, &devices)?;
                config.cpu = Some(cpu);
                (Machine::Kvm(machine), devices)
            }
            GuestKind::Process => {
                let devices = Arc::new(Devices::new(None));
                let machine = ProcessMachine::create(&memory, &layout, workload, &devices)?;
                (Machine::Process(machine), devices)
            }
        };
        let contents = Contents::Nothing;
        let throttle = Throttle::new(config.vcpus);
        Ok(Self {
            machine,
            devices,
            ram,
            memory,
            layout,
            config,
            tracking,
            contents,
            throttle,
            meanwhile: Meanwhile::GoesOn,
            state_bytes: 0,
        })
    }

    /// Fills memory and sets the registers. For a source, once; the guest stays paused.
    pub fn boot(&mut self) -> Result<(), GuestError> {
        self.ensure_paused("boot the guest")?;
        let workload = &self.config.workload;
        let banner = contents::banner(workload, self.config.vcpus);
        contents::fill(&self.memory, &self.layout, workload)?;
        match &self.machine {
            Machine::Kvm(machine) => machine.boot(&self.layout, workload, &banner)?,
            Machine::Process(machine) => machine.boot(&banner, &self.devices),
        }
        self.contents = Contents::Guest;
        Ok(())
    }

    /// Lets the guest run. Nothing happens if it does already.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        self.ensure_alive("resume the guest")?;
        self.workers().resume();
        Ok(())
    }

    /// Stops the guest: every virtual CPU is outside it, its pending I/O done. Nothing happens if
    /// it stands already.
    pub fn pause(&mut self) -> Result<(), GuestError> {
        self.workers().pause(PAUSE_TIMEOUT).map_err(|StillRunning { vcpus }| {
            GuestError::PauseTimedOut { vcpus, waited_ms: PAUSE_TIMEOUT.as_millis() }
        })
    }

    /// Whether it stands still and goes on when it is [resumed](Self::resume). One that has ended does not.
    pub fn is_paused(&self) -> bool {
        self.workers().is_paused() && self.failure().is_none()
    }

    /// Slows the guest down until it dirties `percent` less, from the next beat of each virtual CPU
    /// on. Where dirty rings tell which of them dirties how much, those that dirty most are slowed
    /// down, and the others are left alone.
    pub fn throttle(&mut self, percent: u8) {
        let dirtied = match &self.machine {
            Machine::Kvm(machine) => machine.handles().rings.as_ref().map(DirtyRings::dirtied),
            Machine::Process(_) => None,
        };
        let percents = self.throttle.set(percent, dirtied);
        match &self.machine {
            Machine::Kvm(machine) => machine.workers().control().set_throttle(percents),
            Machine::Process(machine) => machine.workers().control().set_throttle(percents),
        }
    }

    /// By how much it is slowed down.
    pub fn throttle_percent(&self) -> u8 {
        self.throttle.percent()
    }

    /// Everything of a paused guest that is not in its memory, as bytes for [`Self::load`].
    pub fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        let mut state = Vec::new();
        self.save_to(&mut state)?;
        Ok(state)
    }

    /// The same, behind the bytes that are there. After an error nothing was appended.
    pub fn save_to(&mut self, state: &mut Vec<u8>) -> Result<(), GuestError> {
        self.ensure_saveable()?;
        let begin = state.len();
        // Growing it bit by bit would copy it again and again.
        state.reserve(self.state_bytes);
        // By one thread: others would wait for the CPUs that send the last pages.
        self.registry()?.save_to(state).map_err(StateError::from)?;
        self.state_bytes = state.len() - begin;
        Ok(())
    }

    /// The same, by so many threads: faster where CPUs are idle.
    pub fn save_by_threads(&mut self, threads: usize) -> Result<Vec<u8>, GuestError> {
        self.ensure_saveable()?;
        Ok(self.registry()?.save_by_threads(threads).map_err(StateError::from)?)
    }

    fn ensure_saveable(&self) -> Result<(), GuestError> {
        const OPERATION: &str = "save the guest's state";
        self.ensure_paused(OPERATION)?;
        self.ensure_alive(OPERATION)
    }

    /// What a KVM guest's time does between a save and the next [`load`](Self::load): it goes on unless this
    /// says otherwise.
    pub fn set_meanwhile(&mut self, meanwhile: Meanwhile) {
        self.meanwhile = meanwhile;
    }

    /// Takes over what [`Self::save`] gave. If it fails half-way the guest can only be dropped,
    /// or loaded again.
    pub fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.ensure_paused("load the guest's state")?;
        let loaded = self.registry()?.load(state);
        match &loaded {
            Ok(()) => self.contents = Contents::Guest,
            Err(error) if error.is_half_loaded() => self.contents = Contents::HalfLoaded,
            Err(_) => {}
        }
        Ok(loaded.map_err(StateError::from)?)
    }

    /// What the guest saves and loads, with all its devices. A guest need not be paused to say.
    pub fn schema(&self) -> Result<Schema, GuestError> {
        Ok(self.registry()?.schema())
    }

    /// All that is saved and loaded.
    fn registry(&self) -> Result<Registry<'_>, StateError> {
        let mut registry = Registry::new();
        match &self.machine {
            Machine::Kvm(machine) => machine.register(&mut registry, self.meanwhile)?,
            Machine::Process(machine) => machine.register(&mut registry)?,
        }
        self.devices.register(&mut registry)?;
        Ok(registry)
    }

    /// Its memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What it was made of.
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// What tracks its writes.
    pub fn tracking(&self) -> DirtyTracking {
        self.tracking
    }

    /// The virtual machine, for who tracks its writes. `None` for a process guest.
    pub fn kvm(&self) -> Option<KvmHandles> {
        match &self.machine {
            Machine::Kvm(machine) => Some(machine.handles().clone()),
            Machine::Process(_) => None,
        }
    }

    /// What the heartbeat saw.
    pub fn heartbeat(&self) -> HeartbeatSnapshot {
        self.devices.heartbeat.snapshot()
    }

    /// The time since the guest's first beat, by the time stamp counter as it read that at the last one. `None` where
    /// it has none: a process guest, or a KVM that does not tell how fast the counter is.
    pub fn clock(&self) -> Option<Duration> {
        let khz = self.config.cpu.as_ref()?.tsc_khz?;
        let read = |address| self.memory.load_u64(address).ok();
        let cycles = read(CLOCK)?.checked_sub(read(CLOCK_BEGAN).filter(|began| *began > 0)?)?;
        Some(Duration::from_secs_f64(cycles as f64 / f64::from(khz) / 1e3))
    }

    /// Waits until it has beaten so often. If it does not: why, as far as that is known.
    pub fn await_beats(&self, beats: u64) -> Result<(), String> {
        let began = Instant::now();
        while self.heartbeat().beats < beats {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            if began.elapsed() > BEAT_TIMEOUT {
                return Err("it does not beat".to_owned());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The longest silence of each of the newest slices of time, as far as it was spent here.
    pub fn heartbeat_gaps(&self) -> Vec<HeartbeatGap> {
        self.devices.heartbeat.gaps()
    }

    /// Forgets the longest gap between beats.
    pub fn reset_heartbeat_gap(&self) {
        self.devices.heartbeat.reset_gap();
    }

    /// Whether a paused guest's vector registers hold what they were given at boot, or with the
    /// `fpu` workload what it has computed.
    pub fn fpu_intact(&self) -> Result<bool, GuestError> {
        Ok(self.registers()?.0)
    }

    /// Checks the memory and vector registers of a paused guest.
    pub fn check_oracle(&self) -> OracleReport {
        let mut report = OracleReport {
            ok: false,
            detail: String::new(),
            writes: 0,
            beats: 0,
            pages: 0,
            fpu_intact: false,
        };
        let writes_in_flight = match self.registers() {
            Ok((fpu_intact, writes_in_flight)) => {
                report.fpu_intact = fpu_intact;
                writes_in_flight
            }
            Err(error) => {
                report.detail = pageferry::Chain::of(&error).to_string();
                return report;
            }
        };
        let workload = &self.config.workload;
        match oracle::check(&self.memory, &self.layout, workload, &writes_in_flight) {
            Ok(totals) => {
                (report.writes, report.beats) = (totals.writes, totals.beats);
                report.pages = totals.pages;
                report.ok = report.fpu_intact;
                report.detail = if report.ok {
                    let (kind, pages) = (workload.kind, totals.pages);
                    format!("{kind}: {pages} pages and the vector registers are as they should be")
                } else {
                    "the vector registers lost their contents".to_owned()
                };
            }
            Err(violation) => report.detail = pageferry::Chain::of(&violation).to_string(),
        }
        report
    }

    /// How the guest ended, if a virtual CPU did so by itself.
    pub fn failure(&self) -> Option<String> {
        self.workers().control().failure()
    }

    /// Has `hear` called with the reason once the guest ends by itself, by the thread that notices; at
    /// once if it has. Takes the place of who heard before.
    pub fn on_failure(&self, hear: impl FnOnce(&str) + Send + 'static) {
        self.workers().control().on_failure(Box::new(hear));
    }

    /// Everything the guest printed since it was created here.
    pub fn serial_output(&self) -> Vec<u8> {
        self.devices.serial.output()
    }

    /// What the oracle takes from registers: whether the vector registers are intact, and for each
    /// virtual CPU whether it is between the two counts of a write.
    fn registers(&self) -> Result<(bool, Vec<bool>), GuestError> {
        const OPERATION: &str = "read the guest's registers";
        self.ensure_paused(OPERATION)?;
        self.ensure_alive(OPERATION)?;
        match &self.machine {
            Machine::Kvm(machine) => Ok((machine.fpu_intact()?, machine.writes_in_flight()?)),
            Machine::Process(machine) => Ok((machine.fpu_intact(), machine.writes_in_flight())),
        }
    }

    fn workers(&self) -> &Workers {
        match &self.machine {
            Machine::Kvm(machine) => machine.workers(),
            Machine::Process(machine) => machine.workers(),
        }
    }

    fn ensure_paused(&self, operation: &'static str) -> Result<(), GuestError> {
        if self.workers().is_paused() { Ok(()) } else { Err(GuestError::Running { operation }) }
    }

    fn ensure_alive(&self, operation: &'static str) -> Result<(), GuestError> {
        match (self.contents, self.failure()) {
            (Contents::Nothing, _) => Err(GuestError::Empty { operation }),
            (Contents::HalfLoaded, _) => Err(GuestError::HalfLoaded { operation }),
            (Contents::Guest, Some(detail)) => Err(GuestError::Failed { operation, detail }),
            (Contents::Guest, None) => Ok(()),
        }
    }
}
