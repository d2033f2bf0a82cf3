//! What who runs a program wants of it, by signals and lines on stdin, while it does something else.

mod jobs;
mod links;
mod steering;

use std::io::{BufRead, stdin};
use std::num::{NonZeroU16, NonZeroU64};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use crossbeam_channel::Sender;
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;

use crate::migration::{BoundChoice, PolicyChoice};
use crate::signals::{self, SIGUSR1};
use crate::units;

pub(crate) use jobs::{hearing, until_interrupted};
pub use jobs::{unless_given_up, unless_interrupted, wait_or_quit};
pub(crate) use links::{accept, connect};
pub(crate) use steering::{cancels, steer};

/// What the operator wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
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
    /// Ask whether the guest could go to this address.
    Check(String),
    /// Have the guest stand still, also where it goes.
    Pause,
    /// Let it run again.
    Resume,
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
pub fn listen_to_signals(wishes: Sender<Wish>) -> std::io::Result<()> {
    let heard = [signals::ending(), vec![SIGUSR1]].concat();
    signals::listen(&heard, wishes, |signal| match signal {
        SIGUSR1 => Wish::Migrate(None),
        _ => Wish::Interrupt,
    })
}

/// Turns lines on stdin into wishes. The end of stdin means nothing: the guest runs on.
pub fn listen_to_stdin(wishes: Sender<Wish>) -> std::io::Result<()> {
    // Who reads the terminal from the background is stopped.
    if tcgetpgrp(stdin()).is_ok_and(|front| front != getpgrp()) {
        return Ok(());
    }
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

fn parse(line: &str) -> Result<Option<Wish>, String> {
    let mut words = line.split_whitespace();
    let wish = match (words.next(), words.next()) {
        (None, _) => return Ok(None),
        (Some("migrate"), address) => Wish::Migrate(address.map(str::to_owned)),
        (Some("cancel"), None) => Wish::Cancel,
        (Some("status"), None) => Wish::Status,
        (Some("check"), Some(address)) => Wish::Check(address.to_owned()),
        (Some("pause"), None) => Wish::Pause,
        (Some("resume"), None) => Wish::Resume,
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
                 channels N, check ADDR, pause, resume, status, quit"
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
    use super::*;

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
