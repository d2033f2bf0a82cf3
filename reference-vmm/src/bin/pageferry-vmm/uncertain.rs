//! A copy of a guest whose owner is unknown: it stands still until the operator has looked at the other side.

use crossbeam_channel::Receiver;
use pageferry_cli::outcome::Failure;
use pageferry_cli::say;
use pageferry_cli::wishes::Wish;
use pageferry_vmm::guest::Guest;

/// Waits for what the operator decides. Whether the copy is the guest from now on, and runs here; else it is to be
/// destroyed.
pub(crate) fn decide(guest: &mut Guest, wishes: &Receiver<Wish>) -> Result<bool, Failure> {
    // What was said before does not count: nobody had been asked.
    while let Ok(wish) = wishes.try_recv() {
        if matches!(wish, Wish::Interrupt | Wish::Quit) {
            return Ok(false);
        }
    }
    say!(
        "the copy is kept here, paused. Look at the other side: if it has the guest, or you do not know, let this one \
         stand or destroy it (Ctrl-C); if its copy is destroyed, or its host is fenced off for good, \"resume\" lets \
         this one run"
    );
    loop {
        match wishes.recv()? {
            Wish::Interrupt | Wish::Quit => return Ok(false),
            Wish::Resume => match guest.resume() {
                Ok(()) => return Ok(true),
                Err(error) => say!("{}", pageferry::Chain::of(&error)),
            },
            _ => {
                say!("the copy is paused, and it is open who has the guest: \"resume\", or Ctrl-C");
            }
        }
    }
}
