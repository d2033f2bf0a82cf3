//! All devices of a machine, saved and loaded together.

mod device;
mod load;
mod order;
mod save;

use std::fmt;

use crate::declare::Section;
use crate::schema::Schema;
use crate::wire::is_name;

pub use device::Component;
pub use load::LoadError;
pub use order::OrderError;
pub use save::SaveError;

use device::{Device, InPlace, Managed};

/// The devices of a machine.
///
/// A device is known by the name of its section and its instance. Saving and loading go in one
/// order: what another section is loaded after comes before it, and among those that could come
/// next the one with the highest priority, then by name and instance.
///
/// # Thread safety
///
/// A registry borrows its devices mutably: nobody else uses them meanwhile, but through locks and
/// atomics that they share. It can be sent to another thread.
#[derive(Default)]
pub struct Registry<'a> {
    entries: Vec<Entry<'a>>,
}

struct Entry<'a> {
    instance: u32,
    device: Box<dyn Device + 'a>,
}

impl Entry<'_> {
    fn id(&self) -> (&'static str, u32) {
        (self.device.about().name, self.instance)
    }
}

/// Why a device could not be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// There is one with that name and instance.
    #[error("failed to register {name} {instance}: it is registered already")]
    Duplicate {
        /// Name of its section.
        name: &'static str,
        /// Its instance.
        instance: u32,
    },
    /// A section cannot be called that.
    #[error("failed to register {name:?}: it is no name of a section")]
    Name {
        /// The name.
        name: &'static str,
    },
}

impl fmt::Debug for Registry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(Entry::id)).finish()
    }
}

impl<'a> Registry<'a> {
    /// Of no devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device that is its own state: it is saved from and loaded into where it stands.
    pub fn add<S: Section + Send>(
        &mut self,
        instance: u32,
        device: &'a mut S,
    ) -> Result<(), RegisterError> {
        self.register(instance, Box::new(InPlace(device)))
    }

    /// Adds a device whose state is elsewhere, in the kernel say.
    pub fn add_component<C: Component + 'a>(
        &mut self,
        instance: u32,
        component: C,
    ) -> Result<(), RegisterError> {
        self.register(instance, Box::new(Managed::new(component)))
    }

    fn register(
        &mut self,
        instance: u32,
        device: Box<dyn Device + 'a>,
    ) -> Result<(), RegisterError> {
        let entry = Entry { instance, device };
        let (name, instance) = entry.id();
        if !is_name(name) {
            return Err(RegisterError::Name { name });
        }
        if self.entries.iter().any(|other| other.id() == (name, instance)) {
            return Err(RegisterError::Duplicate { name, instance });
        }
        self.entries.push(entry);
        Ok(())
    }

    /// What the machine saves and loads, with all instances.
    pub fn schema(&self) -> Schema {
        let mut schema = Schema::new();
        for entry in &self.entries {
            schema.add(entry.device.about().name, entry.device.schema(), Some(entry.instance));
        }
        schema
    }
}
