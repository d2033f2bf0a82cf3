//! How a migration goes: options of its source, which may also change on the way.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry::convergence::{Bound, Policy, Throttling};
use pageferry::threads::PinnedThreads;
use pageferry::transport::TransportError;
use pageferry::{PageChecks, Source};
use pageferry_tcp::Security;

use crate::transport::{Chosen, LinkArgs, RdmaArgs, Transport, ZeroCopyChoice};
use crate::units::{downtime, options, rate, time, time_text, value_name};

/// What a downtime limit means once the guest is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BoundChoice {
    /// A switchover that would overrun it is called off, and the migration goes on.
    Strict,
    /// A switchover that has begun is finished.
    BestEffort,
}

impl From<BoundChoice> for Bound {
    fn from(choice: BoundChoice) -> Self {
        match choice {
            BoundChoice::Strict => Self::Strict,
            BoundChoice::BestEffort => Self::BestEffort,
        }
    }
}

/// What to do with a guest that does not converge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyChoice {
    /// Go on until the deadline.
    KeepTrying,
    /// Slow it down step by step, and go on until the deadline.
    Throttle,
    /// Switch to post-copy (not there yet, refused).
    PostCopy,
    /// Give up as soon as that is clear.
    GiveUp,
}

impl From<PolicyChoice> for Policy {
    fn from(choice: PolicyChoice) -> Self {
        match choice {
            PolicyChoice::KeepTrying => Self::KeepTrying,
            PolicyChoice::Throttle => Self::Throttle(Throttling::default()),
            PolicyChoice::PostCopy => Self::PostCopy,
            PolicyChoice::GiveUp => Self::GiveUp,
        }
    }
}

/// Whether the pages that landed are compared with those that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PageChecksChoice {
    /// Where nothing else makes sure of it: in plain text, to another host.
    Auto,
    /// Never.
    Off,
    /// Always.
    On,
}

impl From<PageChecksChoice> for PageChecks {
    fn from(choice: PageChecksChoice) -> Self {
        match choice {
            PageChecksChoice::Auto => Self::Auto,
            PageChecksChoice::Off => Self::Off,
            PageChecksChoice::On => Self::On,
        }
    }
}

/// How a source migrates.
#[derive(Debug, Clone, Args)]
pub struct MigrationArgs {
    /// What moves the pages.
    #[arg(long, default_value = "auto")]
    pub transport: Transport,
    /// Data channels, each with a thread on both sides.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub channels: u16,
    /// Send pages without a copy in the kernel (MSG_ZEROCOPY).
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub zero_copy: ZeroCopyChoice,
    /// How long the guest may stand still, which is never no time at all.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = downtime)]
    pub downtime_limit: Duration,
    /// What the limit means once the guest is paused.
    #[arg(long, value_name = "BOUND", default_value = "strict")]
    pub downtime_bound: BoundChoice,
    /// What to do with a guest that writes faster than the downtime limit allows to move.
    #[arg(long, value_name = "POLICY", default_value = "throttle")]
    pub not_converging: PolicyChoice,
    /// How long to go on once all memory was sent once, before giving up on the downtime limit
    /// [default: as long again as that took, and 5 minutes at least].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub deadline: Option<Duration>,
    /// Rounds over dirty pages to try before giving up on the downtime limit [default: as many as
    /// there is time for].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: Option<u32>,
    /// Page bytes a second over all channels, while the guest runs, 4K at least, which is one page
    /// [default: as fast as it goes].
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub bandwidth_limit: Option<NonZeroU64>,
    /// Page bytes a second to expect while the guest stands still, when no bandwidth limit holds,
    /// 4K at least [default: what was seen without one; if there always was one, 10 Gb/s, and more
    /// before the guest is slowed down for it].
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub switchover_bandwidth: Option<NonZeroU64>,
    /// Have both sides keep checksums of pages, and send again what arrived otherwise than it was sent, by a fault of what
    /// is on the way; over RDMA some pages are compared, at random. With --verify, which comes first, a difference ends
    /// the migration.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub page_checks: PageChecksChoice,
    /// CPUs to bind the threads of data channels to, in turn: 0,1 [default: not bound].
    #[arg(long, value_name = "CPUS", value_delimiter = ',')]
    pub pin: Vec<usize>,
    /// Time limits, and what sockets are set to.
    #[command(flatten)]
    pub link: LinkArgs,
    /// Settings of RDMA.
    #[command(flatten)]
    pub rdma: RdmaArgs,
}

impl MigrationArgs {
    /// Whether what was given fits together.
    pub fn check(&self) -> Result<(), String> {
        if self.zero_copy == ZeroCopyChoice::On
            && matches!(self.link.security.security(), Security::Tls(_))
        {
            return Err("--zero-copy on is for plain text: what TLS sends is a copy".to_owned());
        }
        self.rdma.check(self.transport)
    }

    /// A source that does so.
    pub fn source(&self) -> Source {
        let source = Source::new()
            .channels(self.channels)
            .downtime_limit(self.downtime_limit)
            .bound(self.downtime_bound.into())
            .policy(self.not_converging.into())
            .page_checks(self.page_checks.into())
            .timeouts(self.link.timeouts())
            .threads(Arc::new(PinnedThreads::new(self.pin.clone())));
        let source = match self.max_rounds {
            Some(rounds) => source.max_rounds(rounds),
            None => source,
        };
        let handle = source.handle();
        handle.limit_bandwidth(self.bandwidth_limit);
        handle.set_switchover_bandwidth(self.switchover_bandwidth);
        handle.set_deadline(self.deadline);
        source
    }

    /// Decides what moves the pages; if that is up to this kernel and it has no io_uring, says so on stderr.
    pub fn choose(&self) -> Result<Chosen, TransportError> {
        self.transport.choose(self.link.tcp(self.zero_copy.into()), &self.rdma)
    }

    /// As options of a command line.
    pub fn to_command_line(&self) -> Vec<String> {
        let mut list = self.for_both_sides();
        list.extend(options([
            ("channels", Some(self.channels.to_string())),
            ("zero-copy", Some(value_name(&self.zero_copy))),
            ("downtime-limit", Some(time_text(&self.downtime_limit))),
            ("downtime-bound", Some(value_name(&self.downtime_bound))),
            ("not-converging", Some(value_name(&self.not_converging))),
            ("deadline", self.deadline.as_ref().map(time_text)),
            ("max-rounds", self.max_rounds.map(|rounds| rounds.to_string())),
            ("bandwidth-limit", self.bandwidth_limit.map(|limit| limit.to_string())),
            (
                "switchover-bandwidth",
                self.switchover_bandwidth.map(|expected| expected.to_string()),
            ),
            ("page-checks", Some(value_name(&self.page_checks))),
        ]));
        list
    }

    /// Those of them that a destination has as well.
    pub fn for_both_sides(&self) -> Vec<String> {
        let cpus: Vec<_> = self.pin.iter().map(ToString::to_string).collect();
        let mut list = options([
            ("transport", Some(value_name(&self.transport))),
            ("pin", (!cpus.is_empty()).then(|| cpus.join(","))),
        ]);
        list.extend(self.link.to_command_line());
        list.extend(self.rdma.to_command_line());
        list
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        migration: MigrationArgs,
    }

    /// Each option differs from its default, so that one which is not passed on would show. One that is
    /// new does not compile before it is here.
    #[test]
    fn every_option_is_passed_on() {
        let given = "--transport iouring --channels 3 --zero-copy on --downtime-limit 20ms --downtime-bound \
                     best-effort --not-converging give-up --deadline 1m --max-rounds 7 --bandwidth-limit 1M \
                     --switchover-bandwidth 2M --page-checks on --pin 1,0 --stall-timeout 2s --rdma-mtu 1024";
        let parsed = |given: Vec<String>| {
            let command = std::iter::once("program".to_owned()).chain(given);
            Command::try_parse_from(command).expect("a command line").migration
        };
        let given = parsed(given.split_whitespace().map(str::to_owned).collect());
        let MigrationArgs {
            transport,
            channels,
            zero_copy,
            downtime_limit,
            downtime_bound,
            not_converging,
            deadline,
            max_rounds,
            bandwidth_limit,
            switchover_bandwidth,
            page_checks,
            pin,
            link,
            rdma,
        } = parsed(given.to_command_line());
        assert_eq!((transport, channels, zero_copy), (Transport::IoUring, 3, ZeroCopyChoice::On));
        assert_eq!(downtime_limit, Duration::from_millis(20));
        assert_eq!(downtime_bound, BoundChoice::BestEffort);
        assert_eq!(not_converging, PolicyChoice::GiveUp);
        assert_eq!((deadline, max_rounds), (Some(Duration::from_secs(60)), Some(7)));
        assert_eq!(bandwidth_limit, NonZeroU64::new(1 << 20));
        assert_eq!(switchover_bandwidth, NonZeroU64::new(2 << 20));
        assert_eq!(page_checks, PageChecksChoice::On);
        assert_eq!(pin, [1, 0]);
        assert_eq!(link.stall_timeout, Some(Duration::from_secs(2)));
        assert_eq!(rdma.rdma_mtu.as_deref(), Some("1024"));
    }
}
