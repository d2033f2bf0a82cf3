//! Loading: all devices or none.

use super::device::StageError;
use super::order::{OrderError, order};
use super::{Entry, Registry};
use crate::error::{DecodeError, HookError};
use crate::stream::{RawSection, sections};

/// Why a machine could not be loaded. Unless [`is_half_loaded`](Self::is_half_loaded), it is as it
/// was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The stream is damaged, or holds what cannot be read here.
    #[error("failed to read device state")]
    Decode(#[from] DecodeError),
    /// There is a device that the stream does not have.
    #[error("failed to load device state: {name} {instance} is not in it")]
    Missing {
        /// Name of its section.
        name: &'static str,
        /// Its instance.
        instance: u32,
    },
    /// The stream has a section for a device that is not there.
    #[error("failed to load device state: there is no {name} {instance} here")]
    Unknown {
        /// Name of the section.
        name: String,
        /// The instance.
        instance: u32,
        /// Offset of the section in the stream.
        offset_bytes: u64,
    },
    /// A device refused its state. No device was loaded.
    #[error("failed to load device state: {name} {instance} cannot take it")]
    Refused {
        /// Name of its section.
        name: &'static str,
        /// Its instance.
        instance: u32,
        /// Why.
        #[source]
        cause: HookError,
    },
    /// There is no order. No device was loaded.
    #[error("failed to load device state")]
    Order(#[from] OrderError),
    /// A device failed while it was loaded: the machine is a mix of two and must not run. It can
    /// be loaded again.
    #[error(
        "failed to load device state: {name} {instance} failed after {loaded} others were loaded, \
         and the machine is a mix of both"
    )]
    HalfLoaded {
        /// Name of its section.
        name: &'static str,
        /// Its instance.
        instance: u32,
        /// How many devices were loaded before.
        loaded: usize,
        /// Why.
        #[source]
        cause: HookError,
    },
}

impl LoadError {
    /// Whether some devices were loaded and others were not.
    pub fn is_half_loaded(&self) -> bool {
        matches!(self, Self::HalfLoaded { .. })
    }
}

impl Registry<'_> {
    /// Loads all devices from a stream: everything is decoded and checked before the first device
    /// is changed. The stream must have a section for each device, and no other.
    pub fn load(&mut self, stream: &[u8]) -> Result<(), LoadError> {
        let order = order(&self.entries)?;
        let sections = sections(stream)?;
        let staged = order
            .iter()
            .map(|at| stage(&mut self.entries[*at], &sections))
            .collect::<Result<Vec<_>, _>>()
            .and_then(|staged| match self.unconsumed(&sections) {
                Some(section) => Err(LoadError::Unknown {
                    name: section.name.to_owned(),
                    instance: section.instance,
                    offset_bytes: section.offset_bytes,
                }),
                None => Ok(staged),
            });
        if staged.is_err() {
            for entry in &mut self.entries {
                entry.device.unstage();
            }
        }
        for (loaded, (at, section)) in order.into_iter().zip(staged?).enumerate() {
            let entry = &mut self.entries[at];
            let (name, instance) = entry.id();
            if let Err(cause) = entry.device.commit(section) {
                for entry in &mut self.entries {
                    entry.device.unstage();
                }
                return Err(LoadError::HalfLoaded { name, instance, loaded, cause });
            }
        }
        Ok(())
    }

    fn unconsumed<'s, 'b>(&self, sections: &'s [RawSection<'b>]) -> Option<&'s RawSection<'b>> {
        let is_known = |section: &RawSection<'_>| {
            self.entries.iter().any(|entry| entry.id() == (section.name, section.instance))
        };
        sections.iter().find(|section| !is_known(section))
    }
}

/// Finds a device's section and decodes it.
fn stage<'s, 'b>(
    entry: &mut Entry<'_>,
    sections: &'s [RawSection<'b>],
) -> Result<&'s RawSection<'b>, LoadError> {
    let (name, instance) = entry.id();
    let section = sections
        .iter()
        .find(|section| (section.name, section.instance) == (name, instance))
        .ok_or(LoadError::Missing { name, instance })?;
    entry.device.stage(section).map_err(|error| match error {
        StageError::Decode(error) => LoadError::Decode(error.in_section(name, instance)),
        StageError::Refused(cause) => LoadError::Refused { name, instance, cause },
    })?;
    Ok(section)
}
