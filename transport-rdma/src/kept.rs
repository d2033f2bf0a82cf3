//! Guest memory that stays registered from one link of a migration to the next: to pin it anew takes as long as it is
//! large, and its link may be lost often.
//!
//! Memory regions belong to a protection domain, and only queue pairs of that one reach them. So each link's data
//! channels are made in the domain of the memory. The control connections are not: a destination has those of anybody who
//! connects, each in a domain of its own. When a link is lost its queue pairs are destroyed, and with them every way to
//! use a remote key; the next link's are made once its source has shown who it is.

use std::sync::{Arc, Mutex, PoisonError};

use pageferry::memory::GuestMemory;

use crate::memory::Registered;
use crate::verbs::{Access, Context};

/// Held by what makes the links of one migration, and by each link: what was registered, on each device.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<Arc<Registered>>>>);

impl Kept {
    /// What was registered before, by this link or another, if it is this memory on this device, for this.
    pub(crate) fn find(
        &self,
        context: Context,
        memory: &Arc<GuestMemory>,
        access: Access,
    ) -> Option<Arc<Registered>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|kept| kept.is_of(context, memory, access)).cloned()
    }

    pub(crate) fn keep(&self, registered: &Arc<Registered>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(registered));
    }
}
