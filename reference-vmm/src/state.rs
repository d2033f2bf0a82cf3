//! The saved state of a guest: everything of it that is not memory, as sections of
//! [`pageferry_device_state`].

use pageferry_device_state::Schema;

pub use crate::error::StateError;
use crate::heartbeat::HeartbeatSnapshot;
use crate::kvm::state::{ClockState, InterruptControllersState, PitState, VcpuState};
use crate::process::Registers;
use crate::serial::SerialRegisters;

/// Everything that guests of this program save and load, whatever they are made of.
pub fn schema() -> Schema {
    Schema::new()
        .with::<InterruptControllersState>()
        .with::<PitState>()
        .with::<VcpuState>()
        .with::<ClockState>()
        .with::<Registers>()
        .with::<SerialRegisters>()
        .with::<HeartbeatSnapshot>()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use pageferry_device_state::schema::Verdict;
    use pageferry_device_state::{Section, inspect, sections};

    use super::*;
    use crate::guest::{Guest, GuestConfig, GuestKind, kvm_available};
    use crate::ram::{Backing, Ram};
    use crate::workload::{WorkloadConfig, WorkloadKind};

    /// Schemas and streams that were kept, the newest last. They are never changed: whoever changes
    /// what is saved adds a number, and `PAGEFERRY_BLESS=1` writes its files.
    const KEPT: [u32; 2] = [1, 2];

    fn path(name: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "golden", name].iter().collect()
    }

    /// What was kept under that name; where nothing was and that is wanted, it is made.
    fn kept(name: &str, make: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
        let path = path(name);
        if !path.exists() && std::env::var_os("PAGEFERRY_BLESS").is_some() {
            std::fs::write(&path, make()).unwrap();
        }
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn kept_schema(number: u32) -> Schema {
        let now = || format!("{}\n", schema().to_pretty_json()).into_bytes();
        Schema::from_json(&kept(&format!("{number}.json"), now)).unwrap()
    }

    fn guest(kind: GuestKind) -> Guest {
        let config = GuestConfig {
            kind,
            regions: Ram::pc_regions(4 << 20),
            backing: Backing::Anonymous,
            vcpus: 2,
            cpu: None,
            workload: WorkloadConfig {
                kind: WorkloadKind::Idle,
                working_set_bytes: 1 << 20,
                dirty_rate_pages_per_second: None,
                seed: 3,
            },
        };
        Guest::create(config).unwrap()
    }

    fn kept_stream(number: u32, kind: GuestKind) -> Vec<u8> {
        kept(&format!("{number}-{kind}.state"), || {
            let mut guest = guest(kind);
            guest.boot().unwrap();
            guest.save().unwrap()
        })
    }

    #[test]
    fn nothing_broke_undeclared() {
        for number in KEPT {
            let then = kept_schema(number);
            for (which, compatibility) in
                [("reads", schema().reads(&then)), ("is read by", then.reads(&schema()))]
            {
                let undeclared = compatibility.undeclared().count();
                assert_eq!(undeclared, 0, "this {which} {number}: {compatibility}");
            }
        }
    }

    #[test]
    fn the_newest_schema_that_was_kept_is_this_one() {
        assert_eq!(kept_schema(KEPT[KEPT.len() - 1]), schema());
    }

    /// Decodes a section as what it is.
    fn decode(section: &pageferry_device_state::RawSection<'_>) {
        fn decoded<S: Section>(section: &pageferry_device_state::RawSection<'_>) {
            section.state::<S>().unwrap();
        }
        match section.name {
            InterruptControllersState::NAME => decoded::<InterruptControllersState>(section),
            PitState::NAME => decoded::<PitState>(section),
            VcpuState::NAME => decoded::<VcpuState>(section),
            ClockState::NAME => decoded::<ClockState>(section),
            Registers::NAME => decoded::<Registers>(section),
            SerialRegisters::NAME => decoded::<SerialRegisters>(section),
            HeartbeatSnapshot::NAME => decoded::<HeartbeatSnapshot>(section),
            other => panic!("section {other}"),
        }
    }

    #[test]
    fn streams_that_were_kept_are_read() {
        for number in KEPT {
            let then = kept_schema(number);
            let works = schema().reads(&then).verdict() == Verdict::Works;
            for kind in [GuestKind::Kvm, GuestKind::Process] {
                let stream = kept_stream(number, kind);
                let text = inspect(&stream, &then).unwrap().to_string();
                // Everything has a name.
                assert!(!text.contains('#'), "{text}");
                if works {
                    sections(&stream).unwrap().iter().for_each(decode);
                }
            }
        }
    }

    #[test]
    fn a_guest_has_nothing_that_the_program_does_not_name() {
        let kinds = match kvm_available() {
            Ok(()) => vec![GuestKind::Kvm, GuestKind::Process],
            Err(reason) => {
                eprintln!("the schema of a KVM guest skipped, because {reason}");
                vec![GuestKind::Process]
            }
        };
        for kind in kinds {
            for mut section in guest(kind).schema().unwrap().sections {
                section.instances.clear();
                assert_eq!(schema().section(&section.name), Some(&section));
            }
        }
    }
}
