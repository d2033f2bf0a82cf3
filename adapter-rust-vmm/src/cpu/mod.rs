//! What the virtual CPUs of a guest are made of, and whether another host's KVM has all of it.
//!
//! A guest looks once, when it boots, what its CPU can do, and goes on by that wherever it is. So the
//! destination gives its virtual CPUs what they had at the source, by `cpuid` and all, and before the first page
//! moves it is known whether its KVM can do that. The source's [`CpuProfile`] travels in the description of the
//! guest ([`Offer::description`](pageferry::Offer::description)):
//!
//! ```no_run
//! # use kvm_ioctls::Kvm;
//! # use pageferry_rust_vmm::cpu::CpuProfile;
//! # fn example(source: CpuProfile) -> Result<(), Box<dyn std::error::Error>> {
//! let here = CpuProfile::of_host(&Kvm::new()?)?;
//! // The error names each thing that is missing: pass it to `Offer::decline`.
//! source.check_on(&here)?;
//! // On both sides: the same for the virtual CPUs, but for what differs from one to the next.
//! let cpuid = source.cpuid()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is compared
//!
//! | | the guest's host before | this host |
//! |---|---|---|
//! | features: the bits of `cpuid` that [`Feature`] knows, XSAVE components among them | has it | must have it |
//! | vendor; the hypervisor's signature (leaf 0x4000_0000) | | the same |
//! | physical and linear address bits; version and number of performance counters | | no less |
//! | where each XSAVE component is, how long it is, and how it is aligned | | the same |
//! | length of XSAVE areas | | no less |
//! | model specific registers that belong to the state | has it | must have it |
//! | frequency of the time stamp counter | | the same within 250 ppm, or KVM scales it |
//! | what KVM keeps: interrupt controllers, timer, clock, XCR0 | has it | must have it |
//!
//! All else may differ: family, model, stepping, brand, caches, topology, frequencies, thermal and power
//! management, the number of leaves. The guest keeps what its `cpuid` said.
//!
//! Not compared are the *values* of registers that tell of features (`IA32_ARCH_CAPABILITIES`, those of VMX): a KVM
//! that does not take one says so when it is loaded.
//!
//! A component that the kernel gives to virtual CPUs only on demand (AMX) is there if the process asked for it
//! (`ARCH_REQ_XCOMP_GUEST_PERM`) before the profile was taken.
//!
//! # Sources
//!
//! The kernel's Documentation/virt/kvm/api.rst (`KVM_GET_SUPPORTED_CPUID`, `KVM_SET_CPUID2`,
//! `KVM_GET_MSR_INDEX_LIST`, `KVM_GET_TSC_KHZ`) and Documentation/virt/kvm/x86/cpuid.rst.

mod compare;
mod names;

use std::collections::BTreeSet;
use std::fmt;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2,
    kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use compare::{Lack, Lacks};

/// Length of an XSAVE area where KVM does not say: that of `struct kvm_xsave`.
const MIN_XSAVE_BYTES: u32 = 4096;

/// In ECX of leaf 1.
const XSAVE: u32 = 1 << 26;

/// The XSAVE component of protection keys, and the feature, in ECX of leaf 7.
const PKRU: u32 = 9;
const PKU: u32 = 1 << 3;

/// What KVM reads or writes at once (`KVM_MAX_MSR_ENTRIES`).
const MAX_MSRS: usize = 256;

/// A register that `cpuid` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

/// What `cpuid` says of one leaf.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Leaf {
    function: u32,
    /// Zero where it means nothing.
    index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

impl Leaf {
    fn get(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    /// Without what tells one CPU from the others: it is that of the host's CPU that was asked.
    fn of_any_cpu(entry: &kvm_cpuid_entry2) -> Self {
        let leaf = Self::from(entry);
        match leaf.function {
            1 => Self { ebx: leaf.ebx & 0xffff, ..leaf },
            0xb | 0x1f => Self { edx: 0, ..leaf },
            0x8000_001e => Self { eax: 0, ebx: leaf.ebx & !0xff, ..leaf },
            _ => leaf,
        }
    }

    fn get_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
        let index = if flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 { index } else { 0 };
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: &Leaf) -> Self {
        let Leaf { function, index, flags, eax, ebx, ecx, edx } = *leaf;
        Self { function, index, flags, eax, ebx, ecx, edx, ..Self::default() }
    }
}

/// A bit of `cpuid` by which a guest learns that its CPU can do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// The leaf: EAX when `cpuid` is executed.
    pub function: u32,
    /// The subleaf: ECX then.
    pub index: u32,
    /// The register that has the bit.
    pub register: Register,
    /// Which bit.
    pub bit: u32,
}

impl Feature {
    /// Every feature of that name, as Linux calls it in `/proc/cpuinfo`: some are said twice.
    pub fn named(name: &str) -> Vec<Self> {
        Self::all().filter(|feature| feature.name() == Some(name)).collect()
    }

    /// All that can be missing, with a name or without.
    fn all() -> impl Iterator<Item = Self> {
        names::FEATURES.iter().flat_map(|bits| {
            let names::Bits { function, index, register, .. } = *bits;
            let features = (0..32).filter(|bit| bits.features() >> bit & 1 != 0);
            features.map(move |bit| Self { function, index, register, bit })
        })
    }

    /// Its name, as Linux has it in `/proc/cpuinfo`.
    pub fn name(&self) -> Option<&'static str> {
        let place = (self.function, self.index, self.register);
        let bits = names::FEATURES
            .iter()
            .find(|bits| (bits.function, bits.index, bits.register) == place)?;
        bits.name(self.bit)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, index, register, bit } = self;
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "bit {bit} of {register} in CPUID {function:#x}.{index}"),
        }
    }
}

/// What virtual CPUs are made of: what a KVM offers, or what a guest was given of it.
///
/// As JSON (serde) it is what the programs call a CPU baseline. What comes from elsewhere says what it likes:
/// [`check_on`](Self::check_on) and [`cpuid`](Self::cpuid) take any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuProfile {
    /// In KVM's order.
    cpuid: Vec<Leaf>,
    /// In order.
    msrs: Vec<u32>,
    xsave_bytes: u32,
    /// How fast the guest's time stamp counter is, in kHz. None where KVM does not say.
    pub tsc_khz: Option<u32>,
    tsc_scaling: bool,
    /// What KVM keeps, by the names of [`KEPT`].
    kept: Vec<String>,
}

/// What of KVM belongs to the state of a guest.
const KEPT: [(&str, &[Cap]); 5] = [
    ("interrupt controllers", &[Cap::Irqchip]),
    ("timer (PIT)", &[Cap::Irqchip, Cap::Pit2, Cap::PitState2]),
    ("clock", &[Cap::AdjustClock]),
    ("XCR0", &[Cap::Xcrs]),
    ("time stamp counter's frequency", &[Cap::GetTscKhz]),
];

/// Why there is no profile, or none that can be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CpuError {
    /// KVM did not answer.
    #[error("failed to {operation}")]
    Kvm {
        /// What was asked.
        operation: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// It lists more than there can be.
    #[error("a CPU profile with {found} {what} makes no sense: {most} are the most")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// It says two things of one leaf, or something of a subleaf of a leaf that has none: KVM could tell the guest
    /// something else than was compared.
    #[error("a CPU profile that says two things of CPUID {function:#x}.{index} makes no sense")]
    Ambiguous {
        /// Of which leaf.
        function: u32,
        /// Of which subleaf.
        index: u32,
    },
    /// There is no feature of that name.
    #[error("there is no CPU feature called {name:?}; they have the names of /proc/cpuinfo")]
    NoSuchFeature {
        /// What was asked for.
        name: String,
    },
}

fn failed(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError::Kvm { operation, source }
}

impl CpuProfile {
    /// All that KVM has for virtual CPUs here. Makes a virtual machine with one, and drops it.
    pub fn of_host(kvm: &Kvm) -> Result<Self, CpuError> {
        let vm = kvm.create_vm().map_err(failed("create a virtual machine"))?;
        let kept: Vec<_> = KEPT
            .iter()
            .filter(|(_, needed)| needed.iter().all(|cap| vm.check_extension(*cap)))
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let mut msrs = kvm.get_msr_index_list().map_err(failed("list the registers to save"))?;
        msrs.as_mut_slice().sort_unstable();
        let xsave_bytes = u32::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        if vm.check_extension(Cap::Irqchip) {
            vm.create_irq_chip().map_err(failed("create the interrupt controllers"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(failed("create a virtual CPU"))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read what cpuid may offer"))?;
        // Some registers are there only for who was told of them.
        vcpu.set_cpuid2(&supported).map_err(failed("set the cpuid of a virtual CPU"))?;
        let tsc_khz = vm
            .check_extension(Cap::GetTscKhz)
            .then(|| vcpu.get_tsc_khz().map_err(failed("read the time stamp counter's frequency")))
            .transpose()?;
        let mut cpuid: Vec<_> = supported.as_slice().iter().map(Leaf::of_any_cpu).collect();
        let mut seen = BTreeSet::new();
        cpuid.retain(|leaf| seen.insert((leaf.function, leaf.index)));
        Ok(Self {
            cpuid,
            msrs: readable(&vcpu, msrs.as_slice()),
            xsave_bytes: xsave_bytes.max(MIN_XSAVE_BYTES),
            tsc_khz,
            tsc_scaling: vm.check_extension(Cap::TscControl),
            kept,
        })
    }

    /// What both have: the most that a guest may be given that is to run on either.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        let mut common = self.clone();
        for bits in names::FEATURES {
            let theirs = other.leaf(bits.function, bits.index).get(bits.register);
            if let Some(leaf) = common.leaf_mut(bits.function, bits.index) {
                *leaf.get_mut(bits.register) &= theirs | !bits.features();
            }
        }
        for number in names::NUMBERS {
            let theirs = number.of(other.leaf(number.function, 0).get(number.register));
            if let Some(leaf) = common.leaf_mut(number.function, 0) {
                let word = leaf.get_mut(number.register);
                number.put(number.of(*word).min(theirs), word);
            }
        }
        common.without_moved_components(other);
        common.xsave_bytes = common.xsave_bytes.min(other.xsave_bytes);
        common.fit_xsave();
        common.msrs.retain(|msr| other.msrs.contains(msr));
        common.kept.retain(|kept| other.kept.contains(kept));
        common
    }

    /// The same without that feature, by the name that Linux has for it in `/proc/cpuinfo`.
    pub fn without(mut self, name: &str) -> Result<Self, CpuError> {
        let features = Feature::named(name);
        if features.is_empty() {
            return Err(CpuError::NoSuchFeature { name: name.to_owned() });
        }
        for Feature { function, index, register, bit } in features {
            if let Some(leaf) = self.leaf_mut(function, index) {
                *leaf.get_mut(register) &= !(1 << bit);
            }
        }
        self.fit_xsave();
        Ok(self)
    }

    /// Whether a guest that was given this can run where `host` is what KVM offers.
    pub fn check_on(&self, host: &Self) -> Result<(), Lacks> {
        Lacks::of(self, host)
    }

    /// For `KVM_SET_CPUID2`, the same for all virtual CPUs: what tells one from the other (APIC ids in leaves 1, 0xb,
    /// 0x1f and 0x8000_001e, and the topology) is the VMM's to set.
    pub fn cpuid(&self) -> Result<CpuId, CpuError> {
        self.check()?;
        let entries: Vec<_> = self.cpuid.iter().map(kvm_cpuid_entry2::from).collect();
        CpuId::from_entries(&entries).map_err(|_| CpuError::TooMany {
            what: "leaves of CPUID",
            found: entries.len(),
            most: KVM_MAX_CPUID_ENTRIES,
        })
    }

    /// Model specific registers that belong to the state, in order.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Length of XSAVE areas.
    pub fn xsave_bytes(&self) -> u32 {
        self.xsave_bytes
    }

    /// Components that the XSAVE area of a virtual CPU may have, a bit each. Besides these there are always
    /// x87 and SSE, bits 0 and 1.
    pub fn xsave_components(&self) -> u64 {
        let leaf = self.leaf(0xd, 0);
        u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
    }

    /// What of that the guest may turn on in XCR0: nothing if it has no XSAVE.
    pub fn xcr0(&self) -> u64 {
        if self.leaf(1, 0).ecx & XSAVE != 0 { self.xsave_components() } else { 0 }
    }

    /// All features.
    pub fn features(&self) -> impl Iterator<Item = Feature> {
        Feature::all().filter(|feature| self.has(*feature))
    }

    fn has(&self, feature: Feature) -> bool {
        let Feature { function, index, register, bit } = feature;
        self.leaf(function, index).get(register) >> bit & 1 != 0
    }

    fn check(&self) -> Result<(), CpuError> {
        for (what, found, most) in [
            ("leaves of CPUID", self.cpuid.len(), KVM_MAX_CPUID_ENTRIES),
            ("model specific registers", self.msrs.len(), MAX_MSRS),
        ] {
            if found > most {
                return Err(CpuError::TooMany { what, found, most });
            }
        }
        let mut seen = BTreeSet::new();
        for Leaf { function, index, flags, .. } in &self.cpuid {
            let has_subleaves = flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            if !seen.insert((function, index)) || (*index != 0 && !has_subleaves) {
                return Err(CpuError::Ambiguous { function: *function, index: *index });
            }
        }
        Ok(())
    }

    /// What `cpuid` says there: zeros if nothing.
    fn leaf(&self, function: u32, index: u32) -> Leaf {
        let found = self.cpuid.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
        found.copied().unwrap_or_default()
    }

    fn leaf_mut(&mut self, function: u32, index: u32) -> Option<&mut Leaf> {
        self.cpuid.iter_mut().find(|leaf| (leaf.function, leaf.index) == (function, index))
    }

    /// Leaves out XSAVE components that are somewhere else on the other host, where one would be read as another.
    fn without_moved_components(&mut self, other: &Self) {
        for component in 2..63 {
            let place = |profile: &Self| {
                let Leaf { eax, ebx, ecx, .. } = profile.leaf(0xd, component);
                (eax, ebx, ecx)
            };
            if place(self) == place(other) {
                continue;
            }
            for (index, [low, high]) in
                [(0, [Register::Eax, Register::Edx]), (1, [Register::Ecx, Register::Edx])]
            {
                if let Some(leaf) = self.leaf_mut(0xd, index) {
                    let register = if component < 32 { low } else { high };
                    *leaf.get_mut(register) &= !(1 << (component % 32));
                }
            }
            // Protection keys without their register are none.
            if component == PKRU
                && let Some(leaf) = self.leaf_mut(7, 0)
            {
                leaf.ecx &= !PKU;
            }
        }
    }

    /// Components that were taken away have no place, and areas need no room for them. How long areas are for
    /// what is turned on (EBX), KVM says itself.
    fn fit_xsave(&mut self) {
        let xss = self.leaf(0xd, 1);
        let components = self.xsave_components() | u64::from(xss.edx) << 32 | u64::from(xss.ecx);
        let mut len_bytes = 576;
        self.cpuid.retain(|leaf| {
            if leaf.function != 0xd || leaf.index < 2 {
                return true;
            }
            let offered = components.checked_shr(leaf.index).unwrap_or(0) & 1 != 0;
            if offered {
                len_bytes = len_bytes.max(leaf.ebx.saturating_add(leaf.eax));
            }
            offered
        });
        if let Some(leaf) = self.leaf_mut(0xd, 0)
            && leaf.ecx != 0
        {
            leaf.ecx = len_bytes;
        }
    }
}

/// Those of the registers that can be read: others are listed for all that KVM might have.
fn readable(vcpu: &VcpuFd, indices: &[u32]) -> Vec<u32> {
    let can_read = |index: &u32| {
        let entry = kvm_msr_entry { index: *index, ..kvm_msr_entry::default() };
        Msrs::from_entries(&[entry]).is_ok_and(|mut one| vcpu.get_msrs(&mut one) == Ok(1))
    };
    indices.iter().copied().filter(can_read).collect()
}

#[cfg(test)]
mod tests;
