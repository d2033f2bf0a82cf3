//! Signals.

use std::io;
use std::thread;

use crossbeam_channel::Sender;
pub use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

/// Those that somebody sends who wants a program to end.
pub const ENDING: [i32; 2] = [SIGINT, SIGTERM];

/// Says what each signal means, from a thread of its own that lives as long as the process or somebody
/// hears it.
pub fn listen<T: Send + 'static>(
    signals: &[i32],
    to: Sender<T>,
    meaning: impl Fn(i32) -> T + Send + 'static,
) -> io::Result<()> {
    let mut signals = Signals::new(signals)?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if to.send(meaning(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
