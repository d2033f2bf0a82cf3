//! What `cpuid` tells a virtual CPU: what all of a guest have, with its place among them.

use kvm_bindings::CpuId;

/// Fits what all have to one virtual CPU. All are cores of one package.
pub(crate) fn for_vcpu(all: &CpuId, vcpu: u8, vcpus: u8) -> CpuId {
    let mut cpuid = all.clone();
    let id = u32::from(vcpu);
    let count = u32::from(vcpus);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = (entry.ebx & 0xffff) | count << 16 | id << 24,
            0xb | 0x1f => {
                entry.edx = id;
                let id_bits = count.next_power_of_two().trailing_zeros();
                match entry.index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => (entry.eax, entry.ebx, entry.ecx) = (id_bits, count, 2 << 8 | 1),
                    index => (entry.eax, entry.ebx, entry.ecx) = (0, 0, index),
                }
            }
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx) = (id, id),
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let leaf = |function| kvm_cpuid_entry2 { function, ..kvm_cpuid_entry2::default() };
        let supported = CpuId::from_entries(&[leaf(1), leaf(0xb), leaf(0x8000_001e)]).unwrap();
        for vcpu in 0..3 {
            let cpuid = for_vcpu(&supported, vcpu, 3);
            let [one, topology, extended] = cpuid.as_slice() else { panic!("three leaves") };
            assert_eq!(one.ebx, 3 << 16 | u32::from(vcpu) << 24);
            assert_eq!(topology.edx, u32::from(vcpu));
            assert_eq!(extended.eax, u32::from(vcpu));
        }
    }
}
