//! Ctrl-C, at any moment.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crossbeam_channel::unbounded;
use pageferry_cli::outcome::Failure;
use pageferry_cli::signals;
use rustix::process::{Pid, Signal, kill_process};

/// Whether somebody wants this to end, and what is ended then.
#[derive(Debug, Clone, Default)]
pub(super) struct Interrupt(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    came: bool,
    /// A process that has not been waited for.
    ends: Option<Pid>,
}

impl Interrupt {
    /// By the signals that end a program.
    pub(super) fn listen() -> Result<Self, Failure> {
        let interrupt = Self::default();
        let (tell, told) = unbounded();
        signals::listen(&signals::ending(), tell, |_| ())?;
        let heard = interrupt.clone();
        thread::Builder::new().name("interrupt".into()).spawn(move || {
            for () in told {
                let mut state = heard.lock();
                state.came = true;
                state.end();
            }
        })?;
        Ok(interrupt)
    }

    pub(super) fn came(&self) -> bool {
        self.lock().came
    }

    /// From now on, until what is returned is dropped, that process is killed. It has to be waited for after that.
    pub(super) fn ends(&self, process: u32) -> Watch {
        let mut state = self.lock();
        state.ends = Pid::from_raw(process.cast_signed());
        if state.came {
            state.end();
        }
        Watch(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two changes of what it holds.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn end(&self) {
        if let Some(process) = self.ends {
            // It may have ended by itself.
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

/// While a process is to be killed.
#[derive(Debug)]
pub(super) struct Watch(Interrupt);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.lock().ends = None;
    }
}
