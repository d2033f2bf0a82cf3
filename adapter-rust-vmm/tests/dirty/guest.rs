//! A guest of a few bytes: one vCPU that adds one to the first word of each page of a range.
#![expect(unsafe_code, reason = "KVM takes memory slots as raw addresses")]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::kvm::KVM_EXIT_DIRTY_RING_FULL;
use pageferry_rust_vmm::{DirtyRings, KvmSlot, VcpuRing, guest_memory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::suite::Writer;

/// Guest address of the page of code and halt word. It is no guest memory to the engine: this
/// process writes to it, and KVM's log would not tell.
const CODE_ADDR: u64 = 0x8000_0000;

/// 32-bit code. In: esi first address, ecx end address, ebx
/// address of the word that says when to halt.
const CODE: [u8; 20] = [
    0x89, 0xf7, // again: mov edi, esi
    0xff, 0x07, // next: inc dword [edi]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x39, 0xcf, // cmp edi, ecx
    0x72, 0xf4, // jb next
    0x83, 0x3b, 0x00, // cmp dword [ebx], 0
    0x74, 0xed, // je again
    0xf4, // hlt
];

/// The same with a pause after each page.
const PAUSING_CODE: [u8; 28] = [
    0x89, 0xf7, // again: mov edi, esi
    0xff, 0x07, // next: inc dword [edi]
    0xba, 0x18, 0x00, 0x00, 0x00, // mov edx, 24
    0x4a, // pause: dec edx
    0x75, 0xfd, // jnz pause
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x39, 0xcf, // cmp edi, ecx
    0x72, 0xec, // jb next
    0x83, 0x3b, 0x00, // cmp dword [ebx], 0
    0x74, 0xe5, // je again
    0xf4, // hlt
];

/// Dirty rings for a guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rings {
    pub(crate) entries: u32,
    /// Whether vCPUs write one page in fifty instructions, not in five. A KVM that interprets a
    /// thousand before it looks whether the ring is full then looks in time.
    pub(crate) pausing: bool,
}

/// Guest address of the word that says when to halt: 0 go on, else halt after this pass.
const HALT_WORD: u64 = CODE_ADDR + 0x800;

/// A VM whose vCPUs write to its memory.
pub(crate) struct Guest {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) slots: Vec<KvmSlot>,
    ranges: Vec<PageRange>,
    /// One for each range.
    vcpus: Vec<Mutex<(VcpuFd, Option<VcpuRing>)>>,
    /// If it was made with them.
    pub(crate) rings: Option<DirtyRings>,
    /// The page at `CODE_ADDR`.
    code: GuestMemoryMmap,
}

impl Guest {
    /// A guest with memory at `regions` (guest address, bytes), shown to it by `slots` (region,
    /// first page, pages), of which it writes `ranges`. `None`, said loudly, where there is no KVM.
    pub(crate) fn new(
        regions: &[(u64, usize)],
        slots: &[(u16, u64, u64)],
        ranges: Vec<PageRange>,
    ) -> Option<Self> {
        Self::with_rings(regions, slots, ranges, None)
    }

    /// The same with dirty rings.
    pub(crate) fn with_rings(
        regions: &[(u64, usize)],
        slots: &[(u16, u64, u64)],
        ranges: Vec<PageRange>,
        wanted: Option<Rings>,
    ) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                eprintln!("skipped, because /dev/kvm cannot be used here: {error}");
                return None;
            }
        };
        let regions: Vec<_> =
            regions.iter().map(|(addr, len)| (GuestAddress(*addr), *len)).collect();
        let mapped: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let memory = Arc::new(guest_memory(Arc::new(mapped)).unwrap());

        let vm = Arc::new(kvm.create_vm().unwrap());
        let rings = match wanted.map(|rings| DirtyRings::enable(Arc::clone(&vm), rings.entries)) {
            None => None,
            Some(Ok(rings)) => Some(rings),
            Some(Err(error)) => {
                eprintln!("skipped, because {error}: {:?}", std::error::Error::source(&error));
                return None;
            }
        };
        let slots: Vec<_> = (3..)
            .zip(slots)
            .map(|(slot, (region, first_page, pages))| {
                let region = memory.regions()[usize::from(*region)];
                let offset = first_page * PAGE_BYTES;
                KvmSlot {
                    slot,
                    guest_addr: region.layout.guest_addr + offset,
                    len_bytes: pages * PAGE_BYTES,
                    host_addr: region.host_addr.addr() as u64 + offset,
                    flags: 0,
                }
            })
            .collect();
        let code_addr = GuestAddress(CODE_ADDR);
        let code: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(code_addr, 4096)]).unwrap();
        let pausing = wanted.is_some_and(|rings| rings.pausing);
        let instructions: &[u8] = if pausing { &PAUSING_CODE } else { &CODE };
        code.write_slice(instructions, code_addr).unwrap();
        let code_slot = KvmSlot {
            slot: 0,
            guest_addr: CODE_ADDR,
            len_bytes: PAGE_BYTES,
            host_addr: code.get_host_address(code_addr).unwrap().addr() as u64,
            flags: 0,
        };
        for slot in slots.iter().chain([&code_slot]) {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: slot.flags,
                guest_phys_addr: slot.guest_addr,
                memory_size: slot.len_bytes,
                userspace_addr: slot.host_addr,
            };
            // SAFETY: mappings that outlive the vCPUs: both are the guest's.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpu = |id| {
            let vcpu = flat_vcpu(&vm, id);
            let ring = rings.as_ref().map(|rings| rings.add_vcpu(&vcpu).unwrap());
            Mutex::new((vcpu, ring))
        };
        let vcpus = (0..).zip(&ranges).map(|(id, _)| vcpu(id)).collect();
        Some(Self { vm, memory, slots, ranges, vcpus, rings, code })
    }

    /// What the first vCPU's thread does when its ring is full.
    pub(crate) fn first_ring_is_full(&self) {
        let (_, ring) = &*self.vcpus[0].lock().unwrap();
        ring.as_ref().expect("a ring").on_full().unwrap();
    }

    /// Tells the vCPUs whether to halt after a pass.
    fn set_halt(&self, halt: bool) {
        self.code.store(u32::from(halt), GuestAddress(HALT_WORD), Ordering::Relaxed).unwrap();
    }

    fn run(&self, vcpu: &Mutex<(VcpuFd, Option<VcpuRing>)>, range: PageRange) {
        let region = self.memory.layout().regions()[usize::from(range.region)];
        let first = region.guest_addr + range.first_page * PAGE_BYTES;
        let (vcpu, ring) = &mut *vcpu.lock().unwrap();
        let regs = kvm_regs {
            rip: CODE_ADDR,
            rflags: 2,
            rsi: first,
            rcx: first + range.len_bytes(),
            rbx: HALT_WORD,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => return,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    ring.as_ref().expect("a ring").on_full().unwrap();
                }
                Err(error) if error.errno() == libc::EINTR => {}
                exit => panic!("the guest left with {exit:?}"),
            }
        }
    }
}

/// A vCPU in flat 32-bit protected mode without paging.
fn flat_vcpu(vm: &VmFd, id: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(id).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x8, type_: 11, ..data };
    sregs.ds = data;
    sregs.es = data;
    sregs.ss = data;
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu
}

impl Writer for Guest {
    fn ranges(&self) -> Vec<PageRange> {
        self.ranges.clone()
    }

    fn touch(&self, range: PageRange) {
        self.set_halt(true);
        self.run(&self.vcpus[0], range);
    }

    fn hammer(&self, stop: &AtomicBool) {
        self.set_halt(false);
        std::thread::scope(|scope| {
            for (vcpu, range) in self.vcpus.iter().zip(&self.ranges) {
                scope.spawn(|| self.run(vcpu, *range));
            }
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            self.set_halt(true);
        });
    }
}
