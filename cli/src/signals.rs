//! Signals.

use std::io;
use std::thread;

use crossbeam_channel::Sender;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
pub use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

/// Those that somebody sends who wants a program to end. The end of its terminal is one, unless whoever started the
/// program has it ignored (nohup).
pub fn ending() -> Vec<i32> {
    let mut ending = vec![SIGINT, SIGTERM];
    if !ignores(SIGHUP) {
        ending.push(SIGHUP);
    }
    ending
}

/// Whether this process was started so that it does not hear that signal.
fn ignores(signal: i32) -> bool {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.is_ok_and(|status| status.sigign >> (signal - 1) & 1 != 0)
}

/// Says what each signal means, from a thread of its own that lives as long as the process or somebody
/// hears it.
pub fn listen<T: Send + 'static>(
    signals: &[i32],
    to: Sender<T>,
    meaning: impl Fn(i32) -> T + Send + 'static,
) -> io::Result<()> {
    let mut signals = undisturbed(signals, || Signals::new(signals))?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if to.send(meaning(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// Lets signals wait meanwhile, which this thread would take, before there are others. What signal-hook has a
/// handler for and does not know yet reaches nobody.
fn undisturbed<T>(signals: &[i32], set_up: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let signals: SigSet =
        signals.iter().map(|&signal| Signal::try_from(signal)).collect::<Result<_, _>>()?;
    let before = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let done = set_up();
    before.thread_set_mask()?;
    done
}
