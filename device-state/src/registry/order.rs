//! The order in which devices are saved and loaded.

use std::cmp::Reverse;

use super::Entry;

/// Why there is no order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OrderError {
    /// Sections come after each other.
    #[error("sections come after each other: {}", names.join(", "))]
    Cycle {
        /// Which.
        names: Vec<&'static str>,
    },
}

/// Positions of the entries, in order.
pub(super) fn order(entries: &[Entry<'_>]) -> Result<Vec<usize>, OrderError> {
    let mut waiting: Vec<usize> = (0..entries.len()).collect();
    waiting.sort_by_key(|at| {
        let about = entries[*at].device.about();
        (Reverse(about.priority), about.name, entries[*at].instance)
    });
    let mut order = Vec::with_capacity(entries.len());
    while !waiting.is_empty() {
        let name = |at: usize| entries[at].device.about().name;
        let is_free = |at: usize| {
            let after = entries[at].device.about().after;
            !waiting.iter().any(|other| after.contains(&name(*other)))
        };
        let Some(next) = waiting.iter().position(|at| is_free(*at)) else {
            let mut names: Vec<_> = waiting.iter().map(|at| name(*at)).collect();
            names.dedup();
            return Err(OrderError::Cycle { names });
        };
        // All of that name: sections do not wait for others of their own.
        let name = name(waiting[next]);
        waiting.retain(|at| {
            let chosen = entries[*at].device.about().name == name;
            if chosen {
                order.push(*at);
            }
            !chosen
        });
    }
    Ok(order)
}
