//! The KVM guest: a small PC in 64-bit mode, with KVM's interrupt controllers where it has them.
#![expect(unsafe_code, reason = "KVM is given guest memory by address")]

pub(crate) mod boot;
mod code;
mod cpuid;
mod exceptions;
pub(crate) mod fpu;
pub(crate) mod state;
#[cfg(test)]
mod tests;
mod vcpu;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, kvm_mp_state, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use pageferry::Chain;
use pageferry_device_state::{RegisterError, Registry};
use pageferry_rust_vmm::DirtyRings;
use pageferry_rust_vmm::cpu::CpuProfile;
use pageferry_rust_vmm::time::{self, Meanwhile};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::{Devices, SERIAL_IRQ};
use crate::error::GuestError;
use crate::layout::{CODE, Layout, PAGE_BYTES, WORKING_SET, slot};
use crate::linear::LinearMemory;
use crate::ram::{Backing, GuestRam};
use crate::run_control::{RunControl, Workers};
use crate::tracking::DirtyTracking;
use crate::workload::arithmetic::Registers;
use crate::workload::contents::write_banner;
use crate::workload::pacer::Pacer;
use crate::workload::{WorkloadConfig, WorkloadKind};
use state::{Capabilities, Clock, Counters, InterruptControllers, Pit, Vcpu, failed};

/// The version of KVM's interface; it has not changed since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;
/// Three pages below the BIOS that Intel processors need, in the hole below 4 GiB.
const TASK_STATE_ADDRESS: usize = 0xfffb_d000;
/// One page below those, likewise.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Beats of a trial: the first ones come before any arithmetic.
const TRIAL_BEATS: u64 = 3;
const TRIAL_TIMEOUT: Duration = Duration::from_secs(20);

/// A memory slot of a KVM guest: a region of guest memory as KVM was told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// KVM's number for it.
    pub slot: u32,
    /// Guest physical address.
    pub guest_address: u64,
    /// Length.
    pub len_bytes: u64,
    /// Where it is mapped in this process.
    pub host_address: u64,
}

/// What others need to track a KVM guest's writes: the VM and its memory slots, registered with no
/// flags. Setting a slot anew with `KVM_MEM_LOG_DIRTY_PAGES` is theirs to do.
#[derive(Debug, Clone)]
pub struct KvmHandles {
    /// The virtual machine.
    pub vm: Arc<VmFd>,
    /// Its memory.
    pub slots: Vec<MemorySlot>,
    /// Its dirty rings, if it was made with them.
    pub rings: Option<DirtyRings>,
}

/// A virtual machine.
#[derive(Debug)]
pub(crate) struct KvmMachine {
    /// First, so that the threads are gone before what they use.
    workers: Workers,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    handles: KvmHandles,
    capabilities: Capabilities,
    counters: Counters,
    /// XCR0 for a guest with all the components that have a pattern.
    xcr0: u64,
    memory: LinearMemory,
    workload: WorkloadConfig,
}

/// Opens KVM, or says why it can't be used.
pub(crate) fn open() -> Result<Kvm, String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm can't be opened: {error}"))?;
    match kvm.get_api_version() {
        KVM_API_VERSION => {}
        version => return Err(format!("/dev/kvm has version {version}, not {KVM_API_VERSION}")),
    }
    for (capability, name) in [
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::ExtCpuid, "cpuid"),
        (Cap::MpState, "run states"),
        (Cap::VcpuEvents, "vcpu events"),
        (Cap::Debugregs, "debug registers"),
        (Cap::Xsave, "xsave"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(format!("/dev/kvm lacks {name}"));
        }
    }
    Ok(kvm)
}

/// Whether virtual CPUs get through the arithmetic of the `fpu` workload; the reason when not. It is
/// tried once per process: nothing else tells of a KVM that interprets guest code.
pub(crate) fn computes() -> Result<(), String> {
    static COMPUTES: OnceLock<Result<(), String>> = OnceLock::new();
    let tried = || try_to_compute().map_err(|error| Chain::of(&error).to_string()).flatten();
    COMPUTES.get_or_init(tried).clone()
}

/// Runs a guest with one page to write to for a few beats.
fn try_to_compute() -> Result<Result<(), String>, GuestError> {
    let workload = WorkloadConfig {
        kind: WorkloadKind::Fpu,
        working_set_bytes: PAGE_BYTES,
        dirty_rate_pages_per_second: None,
        seed: 0,
    };
    let regions = [(0, WORKING_SET + PAGE_BYTES)];
    let layout = Layout::new(&regions, 1, workload.working_set_bytes)?;
    let ram = GuestRam::for_guest(&regions, Backing::Anonymous, false)?;
    let memory = LinearMemory::new(&ram, &layout);
    let (board, serial_interrupt) = Board::new(DirtyTracking::default())?;
    let devices = Arc::new(Devices::new(serial_interrupt));
    let cpu = board.cpu(None)?;
    let machine = KvmMachine::create(board, &cpu, &ram, &memory, &layout, &workload, &devices)?;
    machine.boot(&layout, &workload, "")?;
    let control = machine.workers.control();
    let deadline = Instant::now() + TRIAL_TIMEOUT;
    machine.workers.resume();
    while control.failure().is_none() && devices.heartbeat.snapshot().beats < TRIAL_BEATS {
        if Instant::now() > deadline {
            return Ok(Err(format!("no result after {TRIAL_TIMEOUT:?}")));
        }
        control.wait_while_running(Instant::now() + Duration::from_millis(1));
    }
    if machine.workers.pause(TRIAL_TIMEOUT).is_err() {
        return Ok(Err("the trial does not stop".to_owned()));
    }
    if let Some(failure) = control.failure() {
        return Ok(Err(format!("x87, SSE and AVX arithmetic were tried, and {failure}")));
    }
    if machine.fpu_intact()? {
        Ok(Ok(()))
    } else {
        Ok(Err("x87, SSE and AVX arithmetic were tried, with wrong results".to_owned()))
    }
}

/// A virtual machine without virtual CPUs, and the event that raises the serial port's interrupt.
pub(crate) struct Board {
    kvm: Kvm,
    vm: Arc<VmFd>,
    rings: Option<DirtyRings>,
    irqchip: bool,
    pit: bool,
}

impl Board {
    pub(crate) fn new(tracking: DirtyTracking) -> Result<(Self, Option<EventFd>), GuestError> {
        let kvm = open().map_err(|reason| GuestError::KvmUnavailable { reason })?;
        let vm = Arc::new(kvm.create_vm().map_err(failed("create a virtual machine"))?);
        let rings = match tracking {
            DirtyTracking::Ring { entries } => Some(DirtyRings::enable(Arc::clone(&vm), entries)?),
            _ => None,
        };
        if vm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(TASK_STATE_ADDRESS).map_err(failed("place the task state"))?;
        }
        if vm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
                .map_err(failed("place the identity map"))?;
        }
        let irqchip = vm.check_extension(Cap::Irqchip);
        let pit = irqchip && vm.check_extension(Cap::Pit2) && vm.check_extension(Cap::PitState2);
        let mut serial_interrupt = None;
        if irqchip {
            vm.create_irq_chip().map_err(failed("create the interrupt controllers"))?;
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| {
                GuestError::Device { operation: "create the serial port's interrupt", source }
            })?;
            vm.register_irqfd(&event, SERIAL_IRQ)
                .map_err(failed("connect the serial port's interrupt"))?;
            serial_interrupt = Some(event);
        }
        if pit {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(config).map_err(failed("create the timer (PIT)"))?;
        }
        Ok((Self { kvm, vm, rings, irqchip, pit }, serial_interrupt))
    }

    /// What virtual CPUs are made of: what the guest had, which KVM must have here, or all that there is.
    pub(crate) fn cpu(&self, had: Option<CpuProfile>) -> Result<CpuProfile, GuestError> {
        let host = CpuProfile::of_host(&self.kvm)?;
        let Some(had) = had else { return Ok(host) };
        had.check_on(&host)?;
        Ok(had)
    }

    fn capabilities(&self, cpu: &CpuProfile) -> Capabilities {
        Capabilities {
            irqchip: self.irqchip,
            pit: self.pit,
            clock: self.vm.check_extension(Cap::AdjustClock),
            xcrs: self.vm.check_extension(Cap::Xcrs),
            tsc_khz: self.vm.check_extension(Cap::GetTscKhz),
            tsc_control: self.vm.check_extension(Cap::TscControl),
            xsave_words: Capabilities::xsave_words(&self.vm),
            xsave_components: cpu.xsave_components(),
            msrs: cpu.msrs().to_vec(),
        }
    }

    fn add_memory(&self, ram: &GuestRam) -> Result<Vec<MemorySlot>, GuestError> {
        let mut slots = Vec::new();
        for (slot, region) in (0..).zip(ram.memory().iter()) {
            let added = MemorySlot {
                slot,
                guest_address: region.start_addr().0,
                len_bytes: region.len(),
                host_address: region.as_ptr() as u64,
            };
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: added.guest_address,
                memory_size: added.len_bytes,
                userspace_addr: added.host_address,
            };
            // SAFETY: the memory is a mapping that the machine keeps for as long as virtual CPUs
            // run, and that this VMM accesses as memory others write.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(failed(format!("give KVM the memory at {:#x}", added.guest_address)))?;
            slots.push(added);
        }
        Ok(slots)
    }
}

impl KvmMachine {
    pub(crate) fn create(
        board: Board,
        cpu: &CpuProfile,
        ram: &GuestRam,
        memory: &LinearMemory,
        layout: &Layout,
        workload: &WorkloadConfig,
        devices: &Arc<Devices>,
    ) -> Result<Self, GuestError> {
        vcpu::install_kick_handler()?;
        let slots = board.add_memory(ram)?;
        let capabilities = board.capabilities(cpu);
        let cpuid = cpu.cpuid()?;
        let count = layout.vcpus();
        let mut vcpus: Vec<Arc<Mutex<VcpuFd>>> = Vec::with_capacity(count.into());
        let mut bodies = Vec::with_capacity(count.into());
        for id in 0..count {
            let fd = board
                .vm
                .create_vcpu(id.into())
                .map_err(failed(format!("create virtual CPU {id}")))?;
            fd.set_cpuid2(&cpuid::for_vcpu(&cpuid, id, count))
                .map_err(failed(format!("set the cpuid of virtual CPU {id}")))?;
            let ring = board.rings.as_ref().map(|rings| rings.add_vcpu(&fd)).transpose()?;
            let fd = Arc::new(Mutex::new(fd));
            vcpus.push(fd.clone());
            let devices = devices.clone();
            let mut pacer = Pacer::new(workload, id, count);
            bodies.push(move |control: &RunControl| {
                vcpu::run(&mut lock(&fd), ring.as_ref(), control, &devices, &mut pacer)
            });
        }
        {
            let vcpus: Vec<_> = vcpus.iter().map(|vcpu| lock(vcpu)).collect();
            time::synchronize(vcpus.iter().map(|vcpu| &**vcpu))?;
        }
        let workers = Workers::spawn(bodies, vcpu::kick).map_err(GuestError::Thread)?;
        Ok(Self {
            workers,
            vcpus,
            handles: KvmHandles { vm: board.vm, slots, rings: board.rings },
            capabilities,
            counters: Counters::default(),
            // Of those that this VMM knows; x87 always.
            xcr0: fpu::X87 | cpu.xcr0() & (fpu::SSE | fpu::AVX),
            memory: memory.clone(),
            workload: workload.clone(),
        })
    }

    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    pub(crate) fn handles(&self) -> &KvmHandles {
        &self.handles
    }

    /// Writes code and tables and sets the registers. The virtual CPUs must be parked, here and
    /// below.
    pub(crate) fn boot(
        &self,
        layout: &Layout,
        workload: &WorkloadConfig,
        banner: &str,
    ) -> Result<(), GuestError> {
        boot::write_tables(&self.memory, layout)?;
        write_banner(&self.memory, banner)?;
        let mut components = fpu::X87 | fpu::SSE | fpu::AVX;
        for (id, vcpu) in (0..).zip(&self.vcpus) {
            let vcpu = lock(vcpu);
            let mut sregs = vcpu.get_sregs().map_err(failed("read the special registers"))?;
            boot::enter_long_mode(&mut sregs, id, workload.kind);
            vcpu.set_sregs(&sregs).map_err(failed("enter 64-bit mode"))?;
            vcpu.set_regs(&boot::registers(layout, workload, id))
                .map_err(failed("set the registers"))?;
            components = self.set_pattern(&vcpu, id, components)?;
            let mp_state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            vcpu.set_mp_state(mp_state).map_err(failed("make a virtual CPU runnable"))?;
        }
        Ok(boot::store_xsave_components(&self.memory, components)?)
    }

    /// Sets the vector registers, and says which of the components keep what was set.
    fn set_pattern(&self, vcpu: &VcpuFd, id: u8, components: u64) -> Result<u64, GuestError> {
        if self.capabilities.xcrs {
            let mut xcrs = vcpu.get_xcrs().map_err(failed("read XCR0"))?;
            xcrs.nr_xcrs = 1;
            xcrs.xcrs[0].xcr = 0;
            xcrs.xcrs[0].value = self.xcr0;
            vcpu.set_xcrs(&xcrs).map_err(failed("set XCR0"))?;
        }
        let words = self.capabilities.xsave_words;
        let seed = self.workload.seed;
        if self.workload.kind == WorkloadKind::Fpu {
            let computed = fpu::computed(&Registers::at(seed, id, 0, 0));
            return state::write_xsave(vcpu, words, &computed).map(|()| components);
        }
        // A KVM without AVX refuses the lot.
        for wanted in [components, components & !fpu::AVX] {
            let pattern = fpu::pattern(seed, id, wanted);
            if state::write_xsave(vcpu, words, &pattern).is_ok() {
                let kept = state::read_xsave(vcpu, words)?;
                return Ok(wanted & !fpu::missing(seed, id, wanted, &kept));
            }
        }
        let nothing = fpu::pattern(seed, id, 0);
        state::write_xsave(vcpu, words, &nothing).map(|()| 0)
    }

    /// Adds what KVM keeps to what is saved and loaded: as much as it offers here.
    /// What is loaded goes on by what the guest's time did meanwhile.
    pub(crate) fn register<'a>(
        &'a self,
        registry: &mut Registry<'a>,
        meanwhile: Meanwhile,
    ) -> Result<(), RegisterError> {
        let (vm, capabilities) = (&*self.handles.vm, &self.capabilities);
        let counters = &self.counters;
        if capabilities.irqchip {
            registry.add_component(0, InterruptControllers(vm))?;
        }
        if capabilities.pit {
            registry.add_component(0, Pit(vm))?;
        }
        for (id, fd) in (0..).zip(&self.vcpus) {
            registry.add_component(id, Vcpu { fd, capabilities, counters })?;
        }
        if capabilities.clock {
            registry.add_component(0, Clock { vm, vcpus: &self.vcpus, counters, meanwhile })?;
        }
        Ok(())
    }

    /// For each virtual CPU, whether it stands between the two counts of a write.
    pub(crate) fn writes_in_flight(&self) -> Result<Vec<bool>, GuestError> {
        let in_flight = |vcpu: &Arc<Mutex<VcpuFd>>| {
            let registers = lock(vcpu).get_regs().map_err(failed("read the registers"))?;
            Ok(code::write_in_flight(registers.rip.wrapping_sub(CODE)))
        };
        self.vcpus.iter().map(in_flight).collect()
    }

    /// Whether the vector registers hold what was set at boot, wherever that was.
    pub(crate) fn fpu_intact(&self) -> Result<bool, GuestError> {
        let components = boot::load_xsave_components(&self.memory)?;
        let seed = self.workload.seed;
        for (id, vcpu) in (0..).zip(&self.vcpus) {
            let vcpu = lock(vcpu);
            let found = state::read_xsave(&vcpu, self.capabilities.xsave_words)?;
            if self.workload.kind == WorkloadKind::Fpu {
                if let Err(wrong) = self.check_computed(&vcpu, id, &found)? {
                    tracing::warn!("virtual CPU {id} has lost registers: {wrong}");
                    return Ok(false);
                }
            } else if !fpu::intact(seed, id, components, &found) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the registers hold what the `fpu` workload has computed up to where the virtual CPU
    /// stands, and the steps are those that it counted in memory.
    fn check_computed(
        &self,
        vcpu: &VcpuFd,
        id: u8,
        xsave: &[u32],
    ) -> Result<Result<(), String>, GuestError> {
        let registers = vcpu.get_regs().map_err(failed("read the registers"))?;
        let (steps, done) =
            (registers.r12, code::operations_done(registers.rip.wrapping_sub(CODE)));
        let writes = self.memory.load_u64(Layout::slot(id) + slot::WRITES)?;
        if steps != writes && steps != writes.wrapping_add(1) {
            return Ok(Err(format!("it took {steps} steps, and {writes} as memory has it")));
        }
        let expected = Registers::at(self.workload.seed, id, steps, done);
        Ok(fpu::check(&expected, xsave).map_err(|wrong| {
            format!("after {steps} steps and {done} operations of the next, {wrong}")
        }))
    }
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}
