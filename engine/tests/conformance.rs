//! The in-memory transport passes the suite, as it is and with trouble that the port allows.

use std::time::Duration;

use pageferry::testing::conformance::Pair;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::memory_transport;

fn plain() -> Pair {
    let (source, destination) = memory_transport::pair();
    (Box::new(source), Box::new(destination))
}

fn faulty() -> Pair {
    let (source, destination) = plain();
    let faults = Faults {
        delay_at_most: Duration::from_micros(50),
        pieces_of_pages: Some(3),
        reorder_depth: 0,
        ..Faults::default()
    };
    (Box::new(FaultySource::new(source, faults, 1)), destination)
}

mod in_memory {
    use super::*;
    pageferry::conformance_suite!(plain);
}

mod with_faults {
    use super::*;
    pageferry::conformance_suite!(faulty);
}
