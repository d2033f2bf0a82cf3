//! The guest that runs on this side: does it live, and is it right?

use std::time::{Duration, Instant};

use pageferry_cli::report::Report;
use pageferry_vmm::error::GuestError;
use pageferry_vmm::guest::Guest;

/// Waits until the guest has beaten so often.
pub(crate) fn await_beats(guest: &Guest, beats: u64) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest.heartbeat().beats < beats {
        if Instant::now() > deadline || guest.failure().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Pauses the guest for good and looks whether its memory is what it wrote.
pub(crate) fn check(guest: &mut Guest, report: &mut Report) -> Result<(), GuestError> {
    guest.pause()?;
    let oracle = guest.check_oracle();
    if !oracle.ok {
        report.fail(format!("the guest's memory is wrong: {}", oracle.detail));
    }
    report.oracle(oracle.ok, oracle.detail);
    if let Some(failure) = guest.failure() {
        report.fail(format!("the guest ended: {failure}"));
    }
    Ok(())
}
