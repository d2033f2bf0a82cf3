//! Signals and lines on stdin as commands.

use std::io::{BufRead, stdin};
use std::num::{NonZeroU16, NonZeroU64};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use crossbeam_channel::{Receiver, RecvError, Sender, after, bounded, never, select_biased};
use pageferry_cli::say;
use pageferry_cli::signals::{self, SIGUSR1};
use pageferry_cli::units;
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::args::{BoundChoice, PolicyChoice};

/// What the operator wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Migrate, to this address if one is given.
    Migrate(Option<String>),
    /// Ctrl-C: cancel what is under way; if nothing is, quit.
    Interrupt,
    /// Cancel the migration under way.
    Cancel,
    /// End the guest.
    Quit,
    /// Say how the guest is.
    Status,
    /// Limit the bandwidth of the migration under way, or lift the limit.
    Limit(Option<NonZeroU64>),
    /// To expect so many page bytes a second while the guest stands still.
    SwitchoverBandwidth(Option<NonZeroU64>),
    /// Limit its downtime.
    DowntimeLimit(Duration),
    /// Say what that means once the guest is paused.
    DowntimeBound(BoundChoice),
    /// Say what to do if it does not converge.
    NotConverging(PolicyChoice),
    /// Use so many of its data channels.
    Channels(NonZeroU16),
}

/// Turns signals into wishes.
pub(crate) fn listen_to_signals(wishes: Sender<Wish>) -> std::io::Result<()> {
    let [interrupt, terminate] = signals::ENDING;
    signals::listen(&[interrupt, terminate, SIGUSR1], wishes, |signal| match signal {
        SIGUSR1 => Wish::Migrate(None),
        _ => Wish::Interrupt,
    })
}

/// Turns lines on stdin into wishes. The end of stdin means nothing: the guest runs on.
pub(crate) fn listen_to_stdin(wishes: Sender<Wish>) -> std::io::Result<()> {
    thread::Builder::new().name("stdin".into()).spawn(move || {
        for line in stdin().lock().split(b'\n') {
            let Ok(line) = line else { return };
            match parse(&String::from_utf8_lossy(&line)) {
                Ok(Some(wish)) => {
                    if wishes.send(wish).is_err() {
                        return;
                    }
                }
                Ok(None) => {}
                Err(complaint) => say!("{complaint}"),
            }
        }
    })?;
    Ok(())
}

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
pub(crate) fn unless_given_up<T: Send + 'static>(
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
pub(crate) fn unless_interrupted<T: Send + 'static>(
    wishes: &Receiver<Wish>,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, RecvError> {
    let given_up = unless_given_up(wishes, Duration::ZERO, job, |wish| wish == Wish::Interrupt)?;
    Ok(if let (result, false) = given_up { result } else { None })
}

/// Waits for the time to pass, or for someone to quit.
pub(crate) fn wait_or_quit(wishes: &Receiver<Wish>, time: Option<Duration>) {
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

/// Has the kernel end this process when its parent ends.
pub(crate) fn end_with_parent() -> std::io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::TERM))?)
}

fn parse(line: &str) -> Result<Option<Wish>, String> {
    let mut words = line.split_whitespace();
    let wish = match (words.next(), words.next()) {
        (None, _) => return Ok(None),
        (Some("migrate"), address) => Wish::Migrate(address.map(str::to_owned)),
        (Some("cancel"), None) => Wish::Cancel,
        (Some("status"), None) => Wish::Status,
        (Some("limit"), Some("off")) => Wish::Limit(None),
        (Some("limit"), Some(rate)) => Wish::Limit(Some(units::rate(rate)?)),
        (Some("switchover-bandwidth"), Some("off")) => Wish::SwitchoverBandwidth(None),
        (Some("switchover-bandwidth"), Some(rate)) => {
            Wish::SwitchoverBandwidth(Some(units::rate(rate)?))
        }
        (Some("downtime-limit"), Some(limit)) => Wish::DowntimeLimit(units::downtime(limit)?),
        (Some("downtime-bound"), Some(bound)) => {
            Wish::DowntimeBound(BoundChoice::from_str(bound, false)?)
        }
        (Some("not-converging"), Some(policy)) => {
            Wish::NotConverging(PolicyChoice::from_str(policy, false)?)
        }
        (Some("channels"), Some(channels)) => Wish::Channels(
            channels.parse().map_err(|error| format!("\"{channels}\" channels: {error}"))?,
        ),
        (Some("quit"), None) => Wish::Quit,
        _ => {
            return Err(format!(
                "\"{line}\" is not known here; try migrate [ADDR], cancel, limit SIZE|off, \
                 switchover-bandwidth SIZE|off, downtime-limit TIME, \
                 downtime-bound strict|best-effort, not-converging POLICY, \
                 channels N, status, quit"
            ));
        }
    };
    match words.next() {
        None => Ok(Some(wish)),
        Some(extra) => Err(format!("nothing more was expected here: \"{extra}\"")),
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

    #[test]
    fn lines_are_wishes_or_complaints() {
        assert_eq!(parse("  "), Ok(None));
        assert_eq!(parse("migrate"), Ok(Some(Wish::Migrate(None))));
        assert_eq!(parse("migrate h:1"), Ok(Some(Wish::Migrate(Some("h:1".into())))));
        assert_eq!(parse("quit"), Ok(Some(Wish::Quit)));
        assert_eq!(parse("limit off"), Ok(Some(Wish::Limit(None))));
        assert_eq!(parse("limit 1M"), Ok(Some(Wish::Limit(NonZeroU64::new(1 << 20)))));
        for rate in ["fast", "0", "1", "4095"] {
            assert!(parse(&format!("limit {rate}")).is_err(), "{rate}");
            assert!(parse(&format!("switchover-bandwidth {rate}")).is_err(), "{rate}");
        }
        assert_eq!(parse("limit 4096"), Ok(Some(Wish::Limit(NonZeroU64::new(4096)))));
        let expected = Wish::SwitchoverBandwidth(NonZeroU64::new(1 << 30));
        assert_eq!(parse("switchover-bandwidth 1G"), Ok(Some(expected)));
        let limit = Wish::DowntimeLimit(Duration::from_millis(20));
        assert_eq!(parse("downtime-limit 20ms"), Ok(Some(limit)));
        for limit in ["20", "", "0s"] {
            assert!(parse(&format!("downtime-limit {limit}")).is_err(), "{limit}");
        }
        let bound = Wish::DowntimeBound(BoundChoice::BestEffort);
        assert_eq!(parse("downtime-bound best-effort"), Ok(Some(bound)));
        let policy = Wish::NotConverging(PolicyChoice::KeepTrying);
        assert_eq!(parse("not-converging keep-trying"), Ok(Some(policy)));
        assert!(parse("not-converging pray").is_err());
        let one = NonZeroU16::MIN;
        assert_eq!(parse("channels 1"), Ok(Some(Wish::Channels(one))));
        assert!(parse("channels 0").is_err() && parse("channels 70000").is_err());
        assert!(parse("quit now").is_err());
        assert!(parse("migrate a b").is_err());
        assert!(parse("dance").is_err());
    }
}
