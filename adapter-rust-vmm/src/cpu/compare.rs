//! What a guest has and a host lacks.

use std::fmt;

use super::{CpuProfile, Feature, Register, names};

/// Frequencies of time stamp counters this close are the same, as for KVM.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Bytes of text, about, that name what is lacking: it has to fit into a message of the protocol.
const MAX_WORDS_BYTES: usize = 800;

/// Of a name that the other side made.
const MAX_NAME_CHARS: usize = 64;

/// One thing that a guest has and a host lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lack {
    /// A feature.
    Feature(Feature),
    /// A word of `cpuid` that must be the same is another.
    Name {
        /// Of what.
        what: &'static str,
        /// As the guest has it.
        guest: String,
        /// As it is here.
        host: String,
    },
    /// Less than the guest has.
    Number {
        /// Of what.
        what: &'static str,
        /// As the guest has it.
        guest: u32,
        /// As it is here.
        host: u32,
    },
    /// A component of XSAVE areas is somewhere else.
    XsaveComponent {
        /// Its number.
        component: u32,
        /// Offset and length in bytes, as the guest has it.
        guest: (u32, u32),
        /// As it is here.
        host: (u32, u32),
    },
    /// The time stamp counter runs at another frequency, and KVM cannot scale it.
    TscFrequency {
        /// As the guest has it.
        guest_khz: u32,
        /// As it is here.
        host_khz: u32,
    },
    /// A model specific register.
    Msr(u32),
    /// Something that KVM keeps.
    Kept(String),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Feature(feature) => feature.fmt(f),
            Self::Name { what, guest, host } => {
                write!(
                    f,
                    "{what} {} (it is {} here)",
                    guest.escape_default(),
                    host.escape_default()
                )
            }
            Self::Number { what, guest, host } => write!(f, "{guest} {what} ({host} here)"),
            Self::XsaveComponent { component, guest, host } => {
                let ([at, len], [host_at, host_len]) = ([guest.0, guest.1], [host.0, host.1]);
                write!(
                    f,
                    "XSAVE component {component} of {len} bytes at {at} ({host_len} bytes at {host_at} here)"
                )
            }
            Self::TscFrequency { guest_khz, host_khz } => write!(
                f,
                "a time stamp counter of {guest_khz} kHz ({host_khz} kHz here, and KVM cannot scale it)"
            ),
            Self::Msr(index) => write!(f, "model specific register {index:#x}"),
            Self::Kept(what) => {
                let what: String = what.chars().take(MAX_NAME_CHARS).collect();
                write!(f, "KVM's {}", what.escape_default())
            }
        }
    }
}

/// All that a guest has and a host lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Lacks(Vec<Lack>);

impl Lacks {
    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Lack> {
        self.0.iter()
    }

    pub(super) fn of(guest: &CpuProfile, host: &CpuProfile) -> Result<(), Self> {
        let mut lacks = Vec::new();
        lacks.extend(names(guest, host));
        lacks.extend(features(guest, host));
        lacks.extend(numbers(guest, host));
        lacks.extend(xsave_components(guest, host));
        lacks.extend(tsc_frequency(guest, host));
        let missing = |msr: &&u32| !host.msrs.contains(msr);
        lacks.extend(guest.msrs.iter().filter(missing).map(|msr| Lack::Msr(*msr)));
        let missing = |kept: &&String| !host.kept.contains(kept);
        lacks.extend(guest.kept.iter().filter(missing).cloned().map(Lack::Kept));
        if lacks.is_empty() { Ok(()) } else { Err(Self(lacks)) }
    }
}

/// All of them, as far as there is room.
impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = String::new();
        let mut told = 0;
        for lack in &self.0 {
            let next = lack.to_string();
            if words.len() + next.len() > MAX_WORDS_BYTES {
                break;
            }
            if told > 0 {
                words += ", ";
            }
            words += &next;
            told += 1;
        }
        write!(f, "this host's KVM lacks what the guest has: {words}")?;
        match self.0.len() - told {
            0 => Ok(()),
            more => write!(f, ", and {more} more"),
        }
    }
}

/// Words that must be the same: what a guest calls its CPU decides which of its code it runs.
fn names(guest: &CpuProfile, host: &CpuProfile) -> impl Iterator<Item = Lack> {
    let vendor = [Register::Ebx, Register::Edx, Register::Ecx];
    let signature = [Register::Ebx, Register::Ecx, Register::Edx];
    let words = [("the vendor", 0, vendor), ("the hypervisor's signature", 0x4000_0000, signature)];
    words.into_iter().filter_map(move |(what, function, registers)| {
        let [guest, host] = [guest, host].map(|profile| {
            let leaf = profile.leaf(function, 0);
            let bytes: Vec<_> =
                registers.iter().flat_map(|register| leaf.get(*register).to_le_bytes()).collect();
            String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
        });
        (guest != host).then_some(Lack::Name { what, guest, host })
    })
}

fn features(guest: &CpuProfile, host: &CpuProfile) -> impl Iterator<Item = Lack> {
    guest.features().filter(|feature| !host.has(*feature)).map(Lack::Feature)
}

fn numbers(guest: &CpuProfile, host: &CpuProfile) -> impl Iterator<Item = Lack> {
    let areas = ("bytes in an XSAVE area", guest.xsave_bytes, host.xsave_bytes);
    let words = names::NUMBERS.iter().map(move |number| {
        let [guest, host] = [guest, host]
            .map(|profile| number.of(profile.leaf(number.function, 0).get(number.register)));
        (number.what, guest, host)
    });
    let less = [areas].into_iter().chain(words).filter(|(_, guest, host)| guest > host);
    less.map(|(what, guest, host)| Lack::Number { what, guest, host })
}

/// Those that both have: one that is missing is a feature that is.
fn xsave_components(guest: &CpuProfile, host: &CpuProfile) -> impl Iterator<Item = Lack> {
    let both = guest.xsave_components() & host.xsave_components();
    // x87 and SSE are where they always were.
    let components = (2..63).filter(move |component| both & 1 << component != 0);
    components.filter_map(move |component| {
        let [guest, host] = [guest, host].map(|profile| profile.leaf(0xd, component));
        let place = |leaf: super::Leaf| (leaf.ebx, leaf.eax);
        (place(guest) != place(host) || guest.ecx != host.ecx).then_some(Lack::XsaveComponent {
            component,
            guest: place(guest),
            host: place(host),
        })
    })
}

fn tsc_frequency(guest: &CpuProfile, host: &CpuProfile) -> Option<Lack> {
    let (guest_khz, host_khz) = guest.tsc_khz.zip(host.tsc_khz)?;
    let difference = u64::from(guest_khz.abs_diff(host_khz));
    let same = difference * 1_000_000 <= u64::from(host_khz) * TSC_TOLERANCE_PPM;
    (!same && !host.tsc_scaling).then_some(Lack::TscFrequency { guest_khz, host_khz })
}
