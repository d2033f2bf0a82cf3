//! What this kernel's io_uring can do, and why it may do nothing at all.

use std::fmt;
use std::fs;
use std::io;

use pageferry::transport::TransportError;
use thiserror::Error;

use crate::limits::no_ring;

/// Something newer than the oldest io_uring this crate works with. Each is used where the kernel
/// has it, and done without where it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// `IORING_SETUP_SUBMIT_ALL`, Linux 5.18: one bad request does not hold up those after it.
    SubmitAll,
    /// `IORING_SETUP_COOP_TASKRUN`, Linux 5.19: completions wait until the thread is in the
    /// kernel anyway.
    CoopTaskrun,
    /// `IORING_SETUP_SINGLE_ISSUER`, Linux 6.0: one thread uses a ring.
    SingleIssuer,
    /// `IORING_SETUP_DEFER_TASKRUN`, Linux 6.1: completions are worked on when the thread waits
    /// for them. Needs [`Feature::SingleIssuer`].
    DeferTaskrun,
    /// `IORING_OP_SEND_ZC`, Linux 6.0: the NIC reads guest memory itself.
    SendZc,
    /// `IORING_SEND_ZC_REPORT_USAGE`, Linux 6.2: the kernel says whether it copied after all.
    ReportUsage,
    /// `IORING_REGISTER_CLONE_BUFFERS`, Linux 6.12: guest memory is registered once for all rings.
    CloneBuffers,
}

impl Feature {
    /// All of them, oldest first.
    pub const ALL: [Self; 7] = [
        Self::SubmitAll,
        Self::CoopTaskrun,
        Self::SingleIssuer,
        Self::DeferTaskrun,
        Self::SendZc,
        Self::ReportUsage,
        Self::CloneBuffers,
    ];

    fn bit(self) -> u8 {
        1 << self as u8
    }

    fn words(self) -> &'static str {
        match self {
            Self::SubmitAll => "requests submitted past a bad one",
            Self::CoopTaskrun => "completions without interrupts",
            Self::SingleIssuer => "rings of one thread",
            Self::DeferTaskrun => "completions worked on when waited for",
            Self::SendZc => "zero-copy sends",
            Self::ReportUsage => "word of what the kernel copied after all",
            Self::CloneBuffers => "guest memory registered once for all rings",
        }
    }
}

/// A set of features.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Features(u8);

impl Features {
    /// None of them.
    pub const fn none() -> Self {
        Self(0)
    }

    /// Those, and this one.
    #[must_use]
    pub fn with(self, feature: Feature) -> Self {
        Self(self.0 | feature.bit())
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether it is one of them.
    pub fn has(self, feature: Feature) -> bool {
        self.0 & feature.bit() != 0
    }

    /// What there is when some need others: without one thread a ring there is no work deferred
    /// to that thread, and without zero-copy sends nothing to say of them.
    pub(crate) fn consistent(mut self) -> Self {
        for (feature, needed) in [
            (Feature::DeferTaskrun, Feature::SingleIssuer),
            (Feature::ReportUsage, Feature::SendZc),
        ] {
            if !self.has(needed) {
                self = self.without(Self::none().with(feature));
            }
        }
        self
    }
}

impl FromIterator<Feature> for Features {
    fn from_iter<T: IntoIterator<Item = Feature>>(features: T) -> Self {
        features.into_iter().fold(Self::none(), Self::with)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(Feature::ALL.into_iter().filter(|feature| self.has(*feature)))
            .finish()
    }
}

/// In words, one after the other.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = Feature::ALL.into_iter().filter(|feature| self.has(*feature));
        let words: Vec<_> = all.map(Feature::words).collect();
        f.write_str(&words.join(", "))
    }
}

/// Why there is no io_uring for this process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The administrator has switched it off.
    #[error(
        "the sysctl kernel.io_uring_disabled is {setting}, which forbids io_uring to this process: \
         {advice}, or use another transport"
    )]
    Disabled {
        /// The sysctl's value.
        setting: u8,
        /// What to set.
        advice: String,
    },
    /// Something in the kernel refuses the system calls.
    #[error(
        "the kernel refuses io_uring to this process ({cause}): a seccomp filter (a container's, \
         or this program's own) or a security module must allow io_uring_setup, io_uring_enter \
         and io_uring_register, or use another transport"
    )]
    Refused {
        /// What it said.
        cause: io::Error,
    },
    /// The kernel is built without it, or hides it.
    #[error(
        "the kernel knows no io_uring ({cause}): it is built without CONFIG_IO_URING, or a seccomp \
         filter hides it; allow io_uring_setup, or use another transport"
    )]
    Unknown {
        /// What it said.
        cause: io::Error,
    },
    /// The kernel is too old.
    #[error(
        "this kernel's io_uring has no {missing}: Linux 6.1 or newer has, or use another transport"
    )]
    TooOld {
        /// What is missing.
        missing: &'static str,
    },
    /// The machine has no room for a ring.
    #[error("failed to {operation}: {cause}")]
    Failed {
        /// What was being done.
        operation: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
}

impl Unavailable {
    /// What a failed `io_uring_setup` means.
    pub(crate) fn of_setup(cause: io::Error) -> Self {
        match cause.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => match disabled_setting() {
                Some(setting @ 1..) => Self::Disabled { setting, advice: advice(setting) },
                _ => Self::Refused { cause },
            },
            Some(libc::ENOSYS) => Self::Unknown { cause },
            _ => Self::Failed { operation: "set up a ring", cause: no_ring(cause) },
        }
    }
}

impl From<Unavailable> for TransportError {
    fn from(unavailable: Unavailable) -> Self {
        let kind = match unavailable {
            Unavailable::Disabled { .. } | Unavailable::Refused { .. } => {
                io::ErrorKind::PermissionDenied
            }
            Unavailable::Unknown { .. } | Unavailable::TooOld { .. } => io::ErrorKind::Unsupported,
            Unavailable::Failed { .. } => io::ErrorKind::Other,
        };
        Self::Io { operation: "use io_uring", cause: io::Error::new(kind, unavailable) }
    }
}

/// The sysctl's value; `None` where the kernel has no such sysctl (before 6.6).
fn disabled_setting() -> Option<u8> {
    fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?.trim().parse().ok()
}

fn advice(setting: u8) -> String {
    match setting {
        1 => "set it to 0, run with CAP_SYS_ADMIN, or put the user into the group of the sysctl \
              kernel.io_uring_group"
            .to_owned(),
        _ => "set it to 0 (sysctl -w kernel.io_uring_disabled=0)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_need_others_go_with_them() {
        let all: Features = Feature::ALL.into_iter().collect();
        assert_eq!(all.consistent(), all);
        let bare = all.without(Features::none().with(Feature::SingleIssuer)).consistent();
        assert!(!bare.has(Feature::DeferTaskrun) && bare.has(Feature::SendZc));
        let plain = all.without(Features::none().with(Feature::SendZc)).consistent();
        assert!(!plain.has(Feature::ReportUsage) && plain.has(Feature::CloneBuffers));
    }

    #[test]
    fn features_are_said_in_words() {
        let features = Features::none().with(Feature::CloneBuffers).with(Feature::SendZc);
        let words = "zero-copy sends, guest memory registered once for all rings";
        assert_eq!(features.to_string(), words);
        assert_eq!(Features::none().to_string(), "");
    }

    #[test]
    fn refusals_name_what_to_set() {
        let refused = Unavailable::of_setup(io::Error::from_raw_os_error(libc::EPERM));
        let text = refused.to_string();
        assert!(text.contains("io_uring_setup") || text.contains("io_uring_disabled"), "{text}");
        let text = TransportError::from(Unavailable::Disabled { setting: 2, advice: advice(2) });
        let text = pageferry::Chain::of(&text).to_string();
        assert!(text.starts_with("failed to use io_uring: the sysctl"), "{text}");
        assert!(text.contains("kernel.io_uring_disabled=0"), "{text}");
    }
}
