use proptest::prelude::*;

use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
    Leaf { function, index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, eax, ebx, ecx, edx }
}

/// A server with AVX-512, PKRU and AMX, as Intel's manual lays their XSAVE areas out.
fn server() -> CpuProfile {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    CpuProfile {
        cpuid: vec![
            leaf(0, 0, [0x20, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
            leaf(1, 0, [0x806f8, 0x800, 1 << 26 | 1 << 20, 1 << 26]),
            leaf(7, 0, [2, 1 << 5 | 1 << 16, 1 << 3, 1 << 24]),
            leaf(0xa, 0, [u32::from_le_bytes([2, 8, 48, 0]), 0, 0, 0]),
            leaf(0xd, 0, [0x602e7, 0, 11008, 0]),
            leaf(0xd, 1, [0xf, 0, 0, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 5, [64, 1088, 0, 0]),
            leaf(0xd, 6, [512, 1152, 0, 0]),
            leaf(0xd, 7, [1024, 1664, 0, 0]),
            leaf(0xd, 9, [8, 2688, 0, 0]),
            leaf(0xd, 17, [64, 2752, 2, 0]),
            leaf(0xd, 18, [8192, 2816, 6, 0]),
            leaf(0x4000_0000, 0, [0x4000_0001, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
            leaf(0x8000_0008, 0, [u32::from_le_bytes([52, 57, 0, 0]), 0, 0, 0]),
        ],
        msrs: vec![0x10, 0x174, 0xc000_0080],
        xsave_bytes: 11008,
        tsc_khz: Some(2_000_000),
        tsc_scaling: false,
        kept: vec!["clock".to_owned(), "interrupt controllers".to_owned()],
    }
}

fn lacks(guest: &CpuProfile, host: &CpuProfile) -> Vec<String> {
    match guest.check_on(host) {
        Ok(()) => Vec::new(),
        Err(lacks) => lacks.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn a_guest_goes_where_there_is_all_that_it_has_or_more() {
    let server = server();
    assert_eq!(server.check_on(&server), Ok(()));
    let less = server.clone().without("avx512f").unwrap().without("xsave_hi16_zmm").unwrap();
    assert_eq!(less.check_on(&server), Ok(()));
    assert_eq!(lacks(&server, &less), ["avx512f", "xsave_hi16_zmm"]);
}

#[test]
fn each_feature_that_is_hidden_is_named_and_no_other() {
    // By a table of the test's own that has each leaf once with all bits.
    let mut all = server();
    for feature in Feature::all() {
        if all.leaf_mut(feature.function, feature.index).is_none() {
            all.cpuid.push(leaf(feature.function, feature.index, [0; 4]));
        }
        let found = all.leaf_mut(feature.function, feature.index).unwrap();
        *found.get_mut(feature.register) |= 1 << feature.bit;
    }
    let features: Vec<_> = all.features().collect();
    assert!(features.len() > 600, "{}", features.len());
    for feature in features {
        let mut host = all.clone();
        let hidden = host.leaf_mut(feature.function, feature.index).unwrap();
        *hidden.get_mut(feature.register) &= !(1 << feature.bit);
        let lacks = all.check_on(&host).unwrap_err();
        assert_eq!(lacks.iter().collect::<Vec<_>>(), [&Lack::Feature(feature)]);
        let words = lacks.to_string();
        assert!(words.ends_with(&feature.to_string()), "{words}");
        assert_eq!(host.check_on(&all), Ok(()), "what it does not have it does not need");
    }
}

/// What the operating system of a guest turns on is not what it has.
#[test]
fn what_a_guest_turned_on_is_no_feature() {
    let mut guest = server();
    guest.leaf_mut(1, 0).unwrap().ecx |= 1 << 27;
    guest.leaf_mut(7, 0).unwrap().ecx |= 1 << 4;
    assert_eq!(guest.check_on(&server()), Ok(()));
}

#[test]
fn a_model_and_caches_may_differ_and_a_vendor_may_not() {
    let guest = server();
    let mut host = server();
    *host.leaf_mut(1, 0).unwrap() = Leaf { eax: 0x606a6, ebx: 0xf00, ..host.leaf(1, 0) };
    host.leaf_mut(0, 0).unwrap().eax = 0x1b;
    host.cpuid.push(leaf(4, 0, [0x121, 1, 2, 3]));
    assert_eq!(guest.check_on(&host), Ok(()));
    host.leaf_mut(0, 0).unwrap().ecx = u32::from_le_bytes(*b"cAMD");
    host.leaf_mut(0x4000_0000, 0).unwrap().ebx = 0;
    assert_eq!(
        lacks(&guest, &host),
        [
            "the vendor GenuineIntel (it is GenuineIcAMD here)",
            "the hypervisor's signature KVMKVMKVM (it is \\u{0}\\u{0}\\u{0}\\u{0}VMKVM here)",
        ]
    );
}

#[test]
fn address_bits_and_counters_are_enough_if_there_are_more() {
    let mut host = server();
    host.leaf_mut(0x8000_0008, 0).unwrap().eax = u32::from_le_bytes([46, 57, 0, 0]);
    host.leaf_mut(0xa, 0).unwrap().eax = u32::from_le_bytes([2, 4, 48, 0]);
    assert_eq!(
        lacks(&server(), &host),
        ["52 physical address bits (46 here)", "8 performance counters (4 here)"]
    );
    assert_eq!(host.check_on(&server()), Ok(()));
}

/// KVM hands areas over as CPUs lay them out, so that a component somewhere else would be read as another.
#[test]
fn xsave_components_are_where_they_were() {
    let mut host = server();
    // PKRU as AMD has it.
    host.leaf_mut(0xd, 9).unwrap().ebx = 832;
    // A larger tile.
    host.leaf_mut(0xd, 18).unwrap().eax = 16384;
    // Not aligned.
    host.leaf_mut(0xd, 17).unwrap().ecx = 0;
    assert_eq!(
        lacks(&server(), &host),
        [
            "XSAVE component 9 of 8 bytes at 2688 (8 bytes at 832 here)",
            "XSAVE component 17 of 64 bytes at 2752 (64 bytes at 2752 here)",
            "XSAVE component 18 of 8192 bytes at 2816 (16384 bytes at 2816 here)",
        ]
    );
    host.xsave_bytes = 4096;
    assert!(
        lacks(&server(), &host).contains(&"11008 bytes in an XSAVE area (4096 here)".to_owned())
    );
}

/// Who may not use AMX has an area without it, of which nothing else moves.
#[test]
fn without_amx_areas_are_shorter() {
    let mut small = server();
    for name in ["amx_tile", "xsave_amx_config", "xsave_amx_data"] {
        small = small.without(name).unwrap();
    }
    assert_eq!(small.leaf(0xd, 0).ecx, 2696);
    assert_eq!(small.leaf(0xd, 18), Leaf::default());
    assert_eq!(small.xcr0(), 0x2e7);
    assert_eq!(small.check_on(&server()), Ok(()));
    assert_eq!(lacks(&server(), &small), ["amx_tile", "xsave_amx_config", "xsave_amx_data"]);
    assert_eq!(small.without("xsave").unwrap().xcr0(), 0);
}

#[test]
fn a_time_stamp_counter_runs_as_it_did() {
    let guest = server();
    let mut host = server();
    host.tsc_khz = Some(2_000_500);
    assert_eq!(guest.check_on(&host), Ok(()), "250 ppm");
    host.tsc_khz = Some(2_400_000);
    assert_eq!(
        lacks(&guest, &host),
        ["a time stamp counter of 2000000 kHz (2400000 kHz here, and KVM cannot scale it)"]
    );
    host.tsc_scaling = true;
    assert_eq!(guest.check_on(&host), Ok(()));
}

#[test]
fn what_kvm_keeps_is_there() {
    let mut host = server();
    host.msrs.retain(|msr| *msr != 0x174);
    host.kept.retain(|kept| kept != "clock");
    assert_eq!(lacks(&server(), &host), ["model specific register 0x174", "KVM's clock"]);
}

/// A message of the protocol has room for it, whatever a peer claims to have.
#[test]
fn what_is_lacking_is_told_as_far_as_there_is_room() {
    let mut guest = server();
    guest.msrs = (0..500).collect();
    guest.kept = vec!["\n".repeat(10_000)];
    let words = guest.check_on(&server()).unwrap_err().to_string();
    assert!(words.len() < 1000, "{}", words.len());
    assert!(words.contains(", and "), "{words}");
    assert!(!words.contains('\n'));
}

#[test]
fn nonsense_is_an_error() {
    let mut nonsense = server();
    let twice = leaf(7, 0, [0; 4]);
    nonsense.cpuid.push(twice);
    assert!(matches!(nonsense.cpuid(), Err(CpuError::Ambiguous { function: 7, index: 0 })));
    nonsense.cpuid = vec![Leaf { index: 9, flags: 0, ..twice }];
    assert!(matches!(nonsense.cpuid(), Err(CpuError::Ambiguous { function: 7, index: 9 })));
    nonsense.cpuid = vec![Leaf::default(); KVM_MAX_CPUID_ENTRIES + 1];
    assert!(matches!(nonsense.cpuid(), Err(CpuError::TooMany { found: 257, most: 256, .. })));
    assert!(matches!(server().without("no such"), Err(CpuError::NoSuchFeature { .. })));
    for json in ["{}", "[]", r#"{"cpuid":[{"function":-1}]}"#, "{\"cpuid\":7}"] {
        assert!(serde_json::from_str::<CpuProfile>(json).is_err(), "{json}");
    }
    let json = serde_json::to_string(&server()).unwrap();
    assert_eq!(serde_json::from_str::<CpuProfile>(&json).unwrap(), server());
}

/// Some host like the server, with other features and fewer things.
fn a_host() -> impl Strategy<Value = CpuProfile> {
    let words = proptest::collection::vec(any::<[u32; 4]>(), 6);
    let keep = proptest::collection::vec(any::<bool>(), 3);
    let moved = proptest::collection::vec(any::<bool>(), 10);
    (words, 40..53_u8, keep, moved).prop_map(|(words, physical, keep, moved)| {
        let mut host = server();
        for (component, _) in (0..).zip(moved).filter(|(_, moved)| *moved) {
            if let Some(place) = host.leaf_mut(0xd, component).filter(|_| component > 1) {
                place.ebx += 64;
            }
        }
        host.fit_xsave();
        let leaves = [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0), (0x8000_0008, 0), (0xd, 1)];
        for ((function, index), registers) in leaves.into_iter().zip(words) {
            let kept = host.leaf(function, index);
            host.cpuid.retain(|leaf| (leaf.function, leaf.index) != (function, index));
            host.cpuid.push(Leaf { eax: kept.eax, ..leaf(function, index, registers) });
        }
        host.leaf_mut(0x8000_0008, 0).unwrap().eax = u32::from_le_bytes([physical, 57, 0, 0]);
        host.msrs.retain(|msr| keep[usize::try_from(msr % 3).unwrap()]);
        host
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_two_hosts_have_in_common_runs_on_both(one in a_host(), other in a_host()) {
        let common = one.common(&other);
        prop_assert_eq!(common.check_on(&one), Ok(()));
        prop_assert_eq!(common.check_on(&other), Ok(()));
        prop_assert_eq!(one.common(&one), one.clone());
        let places = |profile: &CpuProfile| (2..19).map(|n| profile.leaf(0xd, n)).collect::<Vec<_>>();
        if places(&one) == places(&other) {
            let all: Vec<_> = one.features().filter(|feature| other.has(*feature)).collect();
            prop_assert_eq!(common.features().collect::<Vec<_>>(), all, "and nothing is left out");
        }
    }

    #[test]
    fn whatever_a_peer_says_is_compared(one in a_host(), leaves in proptest::collection::vec(any::<[u32; 7]>(), 0..40)) {
        let mut odd = one.clone();
        odd.cpuid.extend(leaves.into_iter().map(|[function, index, flags, eax, ebx, ecx, edx]| {
            Leaf { function: function % 32, index: index % 64, flags, eax, ebx, ecx, edx }
        }));
        let _ = (odd.check_on(&one), one.check_on(&odd), odd.common(&one), odd.cpuid());
    }
}
