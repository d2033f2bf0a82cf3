//! Jobs that are done while wishes are heard.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvError, after, bounded, never, select_biased};

use super::Wish;

/// Does a job on a thread of its own, and meanwhile tells `hear` every wish. One that is there when
/// the job ends is heard as well, and is not left to what comes next.
pub(crate) fn hearing<T: Send>(
    wishes: &Receiver<Wish>,
    job: impl FnOnce() -> T + Send,
    mut hear: impl FnMut(Wish),
) -> Result<T, RecvError> {
    let (done, ended) = bounded(1);
    thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver waits below for just this.
            let _ = done.send(job());
        });
        loop {
            select_biased! {
                recv(wishes) -> wish => hear(wish?),
                recv(ended) -> result => return result,
            }
        }
    })
}

/// Does a job, which `end` is to end on a Ctrl-C. What came of it, and whether there was a Ctrl-C:
/// the job may have ended by something else at that moment, and that somebody wants to end stays.
pub(crate) fn until_interrupted<T: Send>(
    wishes: &Receiver<Wish>,
    job: impl FnOnce() -> T + Send,
    end: impl Fn(),
) -> Result<(T, bool), RecvError> {
    let mut interrupted = false;
    let result = hearing(wishes, job, |wish| {
        if wish == Wish::Interrupt {
            interrupted = true;
            end();
        }
    })?;
    Ok((result, interrupted))
}

/// Does a job that nothing here can end, on a thread of its own. Once a wish has it given up, it is
/// waited for so much longer and then left to itself, and `None` came of it; further wishes are for what
/// comes next. Whether it was given up is told besides: it may have ended at that moment.
pub fn unless_given_up<T: Send + 'static>(
    wishes: &Receiver<Wish>,
    patience: Duration,
    job: impl FnOnce() -> T + Send + 'static,
    mut gives_up: impl FnMut(Wish) -> bool,
) -> Result<(Option<T>, bool), RecvError> {
    let (done, ended) = bounded(1);
    thread::spawn(move || {
        // Nobody may be waiting any more.
        let _ = done.send(job());
    });
    loop {
        select_biased! {
            recv(wishes) -> wish => if gives_up(wish?) {
                break;
            },
            recv(ended) -> result => return Ok((Some(result?), false)),
        }
    }
    select_biased! {
        recv(ended) -> result => Ok((Some(result?), true)),
        recv(after(patience)) -> _ => Ok((None, true)),
    }
}

/// As [`unless_given_up`], by a Ctrl-C and at once. `None` after one, whatever came of the job.
pub fn unless_interrupted<T: Send + 'static>(
    wishes: &Receiver<Wish>,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, RecvError> {
    let given_up = unless_given_up(wishes, Duration::ZERO, job, |wish| wish == Wish::Interrupt)?;
    Ok(if let (result, false) = given_up { result } else { None })
}

/// Waits for the time to pass, or for someone to quit.
pub fn wait_or_quit(wishes: &Receiver<Wish>, time: Option<Duration>) {
    let timer = time.map_or_else(never, after);
    loop {
        select_biased! {
            recv(wishes) -> wish => match wish {
                Ok(Wish::Interrupt | Wish::Quit) | Err(_) => return,
                Ok(_) => {}
            },
            recv(timer) -> _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::*;

    #[test]
    fn who_wants_to_end_is_heard_whatever_the_job_ends_by() {
        let (wishes_in, wishes) = unbounded();
        let (go_in, go) = unbounded();
        let end = || go_in.send(()).expect("the job waits");
        wishes_in.send(Wish::Interrupt).unwrap();
        let ended = until_interrupted(&wishes, || go.recv().map(|()| "another error"), end);
        assert_eq!(ended, Ok((Ok("another error"), true)));
        // The job is over already.
        wishes_in.send(Wish::Interrupt).unwrap();
        assert_eq!(until_interrupted(&wishes, || 7, || {}), Ok((7, true)));
        assert_eq!(until_interrupted(&wishes, || 7, || {}), Ok((7, false)));
        // Other wishes end nothing.
        wishes_in.send(Wish::Status).unwrap();
        assert_eq!(until_interrupted(&wishes, || 7, || panic!("ended")), Ok((7, false)));
    }

    #[test]
    fn a_job_that_nothing_ends_is_left_to_itself() {
        let (wishes_in, wishes) = unbounded();
        let interrupts = |wish| wish == Wish::Interrupt;
        let (_go_in, go) = unbounded::<()>();
        for wish in [Wish::Status, Wish::Interrupt, Wish::Interrupt] {
            wishes_in.send(wish).unwrap();
        }
        let waits = move || go.recv().is_ok();
        let given_up = unless_given_up(&wishes, Duration::ZERO, waits, interrupts);
        assert_eq!(given_up, Ok((None, true)));
        // The second is for what comes next: here a job that ends all the same.
        let given_up = unless_given_up(&wishes, Duration::MAX, || 7, interrupts);
        assert_eq!(given_up, Ok((Some(7), true)));
        assert_eq!(unless_interrupted(&wishes, || 7), Ok(Some(7)));
        wishes_in.send(Wish::Interrupt).unwrap();
        assert_eq!(unless_interrupted(&wishes, || 7), Ok(None));
    }
}
