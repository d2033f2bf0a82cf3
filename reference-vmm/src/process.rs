//! The process guest: the same workloads without KVM, by threads writing to guest memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_device_state::{Component, DeviceState, HookError, RegisterError, Registry};
use vm_memory::GuestMemoryError;

use crate::devices::Devices;
use crate::error::GuestError;
use crate::layout::{Layout, PAGE_BYTES, PAGE_COUNTER, Slice, slot};
use crate::linear::LinearMemory;
use crate::run_control::{RunControl, Workers};
use crate::workload::contents::{canary, generator_start, vector_word};
use crate::workload::pacer::Pacer;
use crate::workload::{
    GENERATOR_MULTIPLIER, HOT_WRITES_IN_A_ROW, WorkloadConfig, WorkloadKind, hot_pages,
};

/// 64-bit halves of XMM0 to XMM15.
const VECTOR_WORDS: u64 = 32;

/// What guest code would hold in registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, DeviceState)]
#[device_state(name = "thread", priority = 50)]
pub(crate) struct Registers {
    /// Steps left until the next beat.
    #[device_state(tag = 1)]
    granted: u32,
    /// `sequential`: next page of the slice.
    #[device_state(tag = 2)]
    position: u64,
    #[device_state(tag = 3)]
    generator: u64,
    /// `hot-cold`: writes until one goes anywhere.
    #[device_state(tag = 4)]
    hot_left: u64,
    #[device_state(tag = 5)]
    beats: u64,
    #[device_state(tag = 6)]
    canary: u64,
    #[device_state(tag = 7, max_len = 32)]
    vectors: Vec<u64>,
}

/// A parked thread, to be saved and loaded.
struct Thread<'a>(&'a Mutex<Registers>);

impl Component for Thread<'_> {
    type State = Registers;

    fn save(&mut self) -> Result<Registers, HookError> {
        Ok(lock(self.0).clone())
    }

    fn load(&mut self, registers: Registers) -> Result<(), HookError> {
        *lock(self.0) = registers;
        Ok(())
    }
}

impl Registers {
    fn at_boot(seed: u64, vcpu: u8) -> Self {
        Self {
            generator: generator_start(seed, vcpu),
            hot_left: HOT_WRITES_IN_A_ROW,
            canary: canary(seed, vcpu),
            vectors: (0..VECTOR_WORDS).map(|word| vector_word(seed, vcpu, word)).collect(),
            ..Self::default()
        }
    }
}

/// A guest whose virtual CPUs are plain threads.
#[derive(Debug)]
pub(crate) struct ProcessMachine {
    workers: Workers,
    vcpus: Vec<Arc<Mutex<Registers>>>,
    seed: u64,
}

impl ProcessMachine {
    pub(crate) fn create(
        memory: &LinearMemory,
        layout: &Layout,
        workload: &WorkloadConfig,
        devices: &Arc<Devices>,
    ) -> Result<Self, GuestError> {
        let vcpus: Vec<_> = (0..layout.vcpus()).map(|_| Arc::default()).collect();
        let bodies = (0..layout.vcpus()).zip(&vcpus).map(|(vcpu, registers)| {
            let registers = Arc::clone(registers);
            let devices = devices.clone();
            let mut pacer = Pacer::new(workload, vcpu, layout.vcpus());
            let program = Program {
                memory: memory.clone(),
                kind: workload.kind,
                slice: layout.slice(vcpu),
                slot: Layout::slot(vcpu),
            };
            move |control: &RunControl| {
                program
                    .run(&mut lock(&registers), control, &devices, &mut pacer)
                    .map_err(|error| pageferry::Chain::of(&GuestError::from(error)).to_string())
            }
        });
        let workers = Workers::spawn(bodies.collect(), |_| ()).map_err(GuestError::Thread)?;
        Ok(Self { workers, vcpus, seed: workload.seed })
    }

    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// The threads must be parked, here and below.
    pub(crate) fn boot(&self, banner: &str, devices: &Devices) {
        for byte in banner.bytes() {
            devices.serial.write(0, byte);
        }
        for (vcpu, registers) in (0..).zip(&self.vcpus) {
            *lock(registers) = Registers::at_boot(self.seed, vcpu);
        }
    }

    /// Adds the threads to what is saved and loaded.
    pub(crate) fn register<'a>(&'a self, registry: &mut Registry<'a>) -> Result<(), RegisterError> {
        (0..)
            .zip(&self.vcpus)
            .try_for_each(|(vcpu, registers)| registry.add_component(vcpu, Thread(registers)))
    }

    /// For each thread, whether it stands between the two counts of a write: it never does.
    pub(crate) fn writes_in_flight(&self) -> Vec<bool> {
        vec![false; self.vcpus.len()]
    }

    pub(crate) fn fpu_intact(&self) -> bool {
        (0..).zip(&self.vcpus).all(|(vcpu, registers)| {
            let expected = (0..VECTOR_WORDS).map(|word| vector_word(self.seed, vcpu, word));
            lock(registers).vectors.iter().copied().eq(expected)
        })
    }
}

fn lock(registers: &Mutex<Registers>) -> MutexGuard<'_, Registers> {
    registers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread does, in the order in which the guest code does it.
#[derive(Debug)]
struct Program {
    memory: LinearMemory,
    kind: WorkloadKind,
    slice: Slice,
    slot: u64,
}

impl Program {
    fn run(
        &self,
        registers: &mut Registers,
        control: &RunControl,
        devices: &Devices,
        pacer: &mut Pacer,
    ) -> Result<(), GuestMemoryError> {
        while control.running() {
            if registers.granted == 0 {
                self.store(registers)?;
                devices.heartbeat.beat();
                registers.granted = pacer.grant(control);
                if self.kind == WorkloadKind::Sequential {
                    self.memory.add_u64(self.slot + slot::WRITES, registers.granted.into())?;
                }
            } else {
                self.step(registers)?;
                registers.granted -= 1;
            }
        }
        Ok(())
    }

    fn store(&self, registers: &mut Registers) -> Result<(), GuestMemoryError> {
        self.memory.add_u64(self.slot + slot::BEATS_MEMORY, 1)?;
        registers.beats = registers.beats.wrapping_add(1);
        self.memory.store_u64(self.slot + slot::BEATS_REGISTER, registers.beats)?;
        self.memory.store_u64(self.slot + slot::CANARY, registers.canary)?;
        for (word, value) in (0..VECTOR_WORDS).zip(&registers.vectors) {
            self.memory.store_u64(self.slot + slot::XMM + 8 * word, *value)?;
        }
        Ok(())
    }

    fn step(&self, registers: &mut Registers) -> Result<(), GuestMemoryError> {
        match self.kind {
            // No such guest is created.
            WorkloadKind::Idle | WorkloadKind::Fpu => Ok(()),
            WorkloadKind::Sequential => {
                let address = self.page(registers.position) + PAGE_COUNTER;
                let count = self.memory.load_u8(address)?;
                self.memory.store_u8(address, count.wrapping_add(1))?;
                registers.position = registers.position.wrapping_add(1) % self.slice.pages;
                Ok(())
            }
            WorkloadKind::Random => self.count_at_random(registers, self.slice.pages),
            WorkloadKind::HotCold if registers.hot_left == 0 => {
                registers.hot_left = HOT_WRITES_IN_A_ROW;
                self.count_at_random(registers, self.slice.pages)
            }
            WorkloadKind::HotCold => {
                registers.hot_left -= 1;
                self.count_at_random(registers, hot_pages(self.slice.pages))
            }
        }
    }

    fn count_at_random(
        &self,
        registers: &mut Registers,
        pages: u64,
    ) -> Result<(), GuestMemoryError> {
        registers.generator = registers.generator.wrapping_mul(GENERATOR_MULTIPLIER);
        let page = high_half(registers.generator, pages);
        self.memory.add_u64(self.page(page) + PAGE_COUNTER, 1)?;
        self.memory.add_u64(self.slot + slot::WRITES, 1)
    }

    /// A saved position may be any number; it is brought into the slice before it is an address.
    fn page(&self, page: u64) -> u64 {
        self.slice.linear + page % self.slice.pages * PAGE_BYTES
    }
}

/// The high 64 bits of the product: evenly spread below the second factor.
fn high_half(a: u64, b: u64) -> u64 {
    u64::try_from((u128::from(a) * u128::from(b)) >> 64).unwrap_or(u64::MAX)
}
