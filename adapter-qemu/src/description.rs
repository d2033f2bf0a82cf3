//! What the two sides tell each other of their QEMUs before anything moves.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::qmp::{Qmp, QmpError, Version};
use crate::ram::Backend;

/// A QEMU and its machine: the description that a source sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Its version.
    pub qemu: Version,
    /// Type of the machine, with its version: "pc-q35-7.2".
    pub machine: String,
    /// vCPUs.
    pub vcpus: usize,
    /// RAM.
    pub ram: Vec<Backend>,
}

/// Why a guest cannot come to a QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// Another machine.
    #[error(
        "the source's machine is {source_machine}, the destination's {here}: start it with -machine \
         {source_machine}"
    )]
    Machine {
        /// The source's.
        source_machine: String,
        /// The destination's.
        here: String,
    },
    /// An older QEMU.
    #[error("the source's QEMU is {source_version}, the destination's is older: {here}")]
    Version {
        /// The source's.
        source_version: String,
        /// The destination's.
        here: String,
    },
    /// Another number of vCPUs.
    #[error("the source's guest has {source_vcpus} vCPUs, the destination's machine {here}")]
    Vcpus {
        /// The source's.
        source_vcpus: usize,
        /// The destination's.
        here: usize,
    },
    /// Other RAM.
    #[error("the source's RAM is {source_ram}, the destination's {here}")]
    Ram {
        /// The source's.
        source_ram: String,
        /// The destination's.
        here: String,
    },
}

impl Vm {
    /// Of a QEMU with that RAM.
    pub fn of(qmp: &Qmp, ram: Vec<Backend>) -> Result<Self, QmpError> {
        Ok(Self {
            qemu: qmp.version().clone(),
            machine: qmp.machine_type()?,
            vcpus: qmp.vcpu_threads()?.len(),
            ram,
        })
    }

    /// Whether the guest of a source can come here.
    pub fn check_takes(&self, source: &Self) -> Result<(), Mismatch> {
        if self.machine != source.machine {
            let (source_machine, here) = (source.machine.clone(), self.machine.clone());
            return Err(Mismatch::Machine { source_machine, here });
        }
        if !self.qemu.is_at_least(&source.qemu) {
            let (source_version, here) = (source.qemu.to_string(), self.qemu.to_string());
            return Err(Mismatch::Version { source_version, here });
        }
        if self.vcpus != source.vcpus {
            return Err(Mismatch::Vcpus { source_vcpus: source.vcpus, here: self.vcpus });
        }
        if self.ram != source.ram {
            return Err(Mismatch::Ram { source_ram: list(&source.ram), here: list(&self.ram) });
        }
        Ok(())
    }
}

fn list(ram: &[Backend]) -> String {
    let list: Vec<_> =
        ram.iter().map(|backend| format!("{} ({} bytes)", backend.id, backend.len_bytes)).collect();
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::VersionNumbers;

    fn vm() -> Vm {
        Vm {
            qemu: Version {
                qemu: VersionNumbers { major: 7, minor: 2, micro: 22 },
                package: "Debian".into(),
            },
            machine: "pc-q35-7.2".into(),
            vcpus: 2,
            ram: vec![Backend { id: "ram".into(), len_bytes: 1 << 30 }],
        }
    }

    #[test]
    fn what_differs_is_told_by_name() {
        let told = |change: fn(&mut Vm)| {
            let mut here = vm();
            change(&mut here);
            here.check_takes(&vm()).map_err(|mismatch| mismatch.to_string())
        };
        assert_eq!(told(|_| {}), Ok(()));
        assert_eq!(told(|here| here.qemu.qemu.micro = 0), Ok(()));
        assert_eq!(told(|here| (here.qemu.qemu.major, here.qemu.qemu.minor) = (10, 0)), Ok(()));
        for (change, word) in [
            ((|here| here.machine = "pc-q35-8.0".into()) as fn(&mut Vm), "pc-q35-8.0"),
            (|here| here.qemu.qemu.minor = 1, "7.1.22 (Debian)"),
            (|here| here.vcpus = 1, "1"),
            (|here| here.ram[0].len_bytes = 1 << 20, "ram (1048576 bytes)"),
            (|here| here.ram[0].id = "pc.ram".into(), "pc.ram (1073741824 bytes)"),
        ] {
            let told = told(change).unwrap_err();
            assert!(told.contains(word), "{told}");
        }
    }

    #[test]
    fn a_description_goes_there_and_comes_out_the_same() {
        let bytes = serde_json::to_vec(&vm()).unwrap();
        assert_eq!(serde_json::from_slice::<Vm>(&bytes).unwrap(), vm());
    }
}
