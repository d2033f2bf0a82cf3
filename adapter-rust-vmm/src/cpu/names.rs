//! Bits of CPUID by which a guest learns what its CPU can do, with the names that Linux gives them in
//! `/proc/cpuinfo` and `arch/x86/include/asm/cpufeatures.h`.
//!
//! What is not in this table is no feature that can be missing: topology, caches, model, what a CPU is called.

use super::Register::{self, Eax, Ebx, Ecx, Edx};

/// A register of CPUID whose bits are features.
#[derive(Debug)]
pub(super) struct Bits {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) register: Register,
    /// Bits of it that say something else, or that a guest's operating system turns on.
    except: u32,
    /// From bit 0 on; `-` has no name here.
    names: &'static str,
}

impl Bits {
    const fn new(function: u32, index: u32, register: Register, names: &'static str) -> Self {
        Self { function, index, register, except: 0, names }
    }

    const fn except(self, except: u32) -> Self {
        Self { except, ..self }
    }

    pub(super) fn features(&self) -> u32 {
        !self.except
    }

    pub(super) fn name(&self, bit: u32) -> Option<&'static str> {
        let name = self.names.split_ascii_whitespace().nth(bit as usize);
        name.filter(|name| *name != "-")
    }
}

/// OSXSAVE.
const ENABLED_BY_CR4: u32 = 1 << 27;
/// OSPKE.
const PKE_ENABLED_BY_CR4: u32 = 1 << 4;

pub(super) const FEATURES: &[Bits] = &[
    Bits::new(
        1,
        0,
        Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
         sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    )
    .except(ENABLED_BY_CR4),
    Bits::new(
        1,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx \
         fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    Bits::new(6, 0, Eax, "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    Bits::new(
        7,
        0,
        Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx \
         rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er \
         avx512cd sha_ni avx512bw avx512vl",
    ),
    // MAWAU, five bits, is a number.
    Bits::new(
        7,
        0,
        Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri \
         movdir64b enqcmd sgx_lc pks",
    )
    .except(PKE_ENABLED_BY_CR4 | 0x1f << 17),
    Bits::new(
        7,
        0,
        Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
         spec_ctrl_ssbd",
    ),
    Bits::new(
        7,
        1,
        Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - \
         fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - invd_disable",
    ),
    Bits::new(
        7,
        1,
        Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr prefetchiti user_msr - - \
         cet_sss avx10 - apx_f",
    ),
    Bits::new(7, 2, Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    Bits::new(0xd, 1, Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    Bits::new(0x14, 0, Ebx, "pt_cr3_filter pt_psb_cyc pt_ip_filter pt_mtc pt_ptwrite pt_power_event"),
    Bits::new(0x4000_0001, 0, Eax, "kvm_clock kvm_nop_io_delay kvm_mmu_op kvm_clock2 kvm_async_pf kvm_steal_time \
         kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - \
         - kvm_clock_stable"),
    Bits::new(
        0x8000_0001,
        0,
        Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
         lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    Bits::new(
        0x8000_0001,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    Bits::new(0x8000_0007, 0, Edx, "- - - - - - - - constant_tsc"),
    Bits::new(
        0x8000_0008,
        0,
        Ebx,
        "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - ibpb - ibrs amd_stibp ibrs_always_on \
         stibp_always_on ibrs_preferred ibrs_same_mode - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd \
         btc_no ibpb_ret",
    ),
    Bits::new(
        0x8000_000a,
        0,
        Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - \
         pfthreshold avic - v_vmsave_vmload vgif gmet x2avic sss_check v_spec_ctrl - - - - vnmi - - svme_addr_chk \
         bus_lock_threshold idle_hlt",
    ),
    Bits::new(
        0x8000_0021,
        0,
        Eax,
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs no_smm_ctl_msr fsrs fsrc - \
         prefetchctl_msr - - - - epsf - prefetchi - - - eraps - - sbpb ibpb_brtype srso_no srso_user_kernel_no srso_msr_fix",
    ),
    Bits::new(7, 1, Ecx, ""),
    Bits::new(0x12, 0, Eax, "sgx1 sgx2"),
    Bits::new(0x14, 0, Ecx, "pt_topa pt_topa_multi pt_single_range pt_trace_transport"),
    // Vector lengths of AVX10; its version is a number.
    Bits::new(0x24, 0, Ebx, "").except(0xff),
    Bits::new(0x8000_0021, 0, Ecx, "- tsa_sq_no tsa_l1_no"),
    Bits::new(0x8000_0022, 0, Eax, "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze"),
    // Components of XCR0 and of IA32_XSS.
    Bits::new(
        0xd,
        0,
        Eax,
        "xsave_x87 xsave_sse xsave_avx xsave_bndregs xsave_bndcsr xsave_opmask xsave_zmm_hi256 xsave_hi16_zmm - \
         xsave_pkru - - - - - - - xsave_amx_config xsave_amx_data xsave_apx",
    ),
    Bits::new(0xd, 0, Edx, ""),
    Bits::new(0xd, 1, Ecx, "- - - - - - - - xsaves_pt - xsaves_pasid xsaves_cet_u xsaves_cet_s xsaves_hdc \
         xsaves_uintr xsaves_lbr xsaves_hwp"),
    Bits::new(0xd, 1, Edx, ""),
];

/// Something of which more is better.
#[derive(Debug)]
pub(super) struct Number {
    pub(super) function: u32,
    pub(super) register: Register,
    shift: u32,
    mask: u32,
    pub(super) what: &'static str,
}

impl Number {
    const fn new(
        function: u32,
        register: Register,
        shift: u32,
        mask: u32,
        what: &'static str,
    ) -> Self {
        Self { function, register, shift, mask, what }
    }

    pub(super) fn of(&self, word: u32) -> u32 {
        word >> self.shift & self.mask
    }

    pub(super) fn put(&self, number: u32, word: &mut u32) {
        *word = *word & !(self.mask << self.shift) | (number & self.mask) << self.shift;
    }
}

pub(super) const NUMBERS: &[Number] = &[
    Number::new(0x8000_0008, Eax, 0, 0xff, "physical address bits"),
    Number::new(0x8000_0008, Eax, 8, 0xff, "linear address bits"),
    Number::new(0xa, Eax, 0, 0xff, "as the version of performance counters"),
    Number::new(0xa, Eax, 8, 0xff, "performance counters"),
    Number::new(0xa, Eax, 16, 0xff, "bits in a performance counter"),
    Number::new(0xa, Edx, 0, 0x1f, "performance counters of one event"),
    Number::new(0x24, Ebx, 0, 0xff, "as the version of AVX10"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_register_has_at_most_as_many_names_as_bits_and_is_listed_once() {
        let mut seen = Vec::new();
        for bits in FEATURES {
            assert!(bits.names.split_ascii_whitespace().count() <= 32, "{bits:?}");
            let place = (bits.function, bits.index, bits.register);
            assert!(!seen.contains(&place), "{bits:?}");
            seen.push(place);
        }
    }

    /// Bits as Intel's and AMD's manuals number them.
    #[test]
    fn names_stand_where_they_belong() {
        for (name, function, index, register, bit) in [
            ("sse4_2", 1, 0, Ecx, 20),
            ("hypervisor", 1, 0, Ecx, 31),
            ("sse2", 1, 0, Edx, 26),
            ("avx2", 7, 0, Ebx, 5),
            ("avx512f", 7, 0, Ebx, 16),
            ("sha_ni", 7, 0, Ebx, 29),
            ("pku", 7, 0, Ecx, 3),
            ("rdpid", 7, 0, Ecx, 22),
            ("amx_tile", 7, 0, Edx, 24),
            ("spec_ctrl_ssbd", 7, 0, Edx, 31),
            ("avx512_bf16", 7, 1, Eax, 5),
            ("xsaves", 0xd, 1, Eax, 3),
            ("kvm_clock_stable", 0x4000_0001, 0, Eax, 24),
            ("svm", 0x8000_0001, 0, Ecx, 2),
            ("topoext", 0x8000_0001, 0, Ecx, 22),
            ("nx", 0x8000_0001, 0, Edx, 20),
            ("pdpe1gb", 0x8000_0001, 0, Edx, 26),
            ("3dnow", 0x8000_0001, 0, Edx, 31),
            ("ibpb", 0x8000_0008, 0, Ebx, 12),
            ("amd_ssbd", 0x8000_0008, 0, Ebx, 24),
            ("lfence_rdtsc", 0x8000_0021, 0, Eax, 2),
            ("srso_no", 0x8000_0021, 0, Eax, 29),
            ("xsave_pkru", 0xd, 0, Eax, 9),
            ("xsave_amx_data", 0xd, 0, Eax, 18),
            ("xsaves_cet_u", 0xd, 1, Ecx, 11),
            ("v_spec_ctrl", 0x8000_000a, 0, Edx, 20),
            ("vnmi", 0x8000_000a, 0, Edx, 25),
            ("idle_hlt", 0x8000_000a, 0, Edx, 30),
            ("verw_clear", 0x8000_0021, 0, Eax, 5),
            ("srso_msr_fix", 0x8000_0021, 0, Eax, 31),
        ] {
            let of = |bits: &&Bits| {
                (bits.function, bits.index, bits.register) == (function, index, register)
            };
            assert_eq!(FEATURES.iter().find(of).unwrap().name(bit), Some(name));
        }
    }
}
