//! Whether long runs are sent zero-copy: only where that pays, as a few sends at the beginning of a channel
//! show.

use pageferry::transport::ZeroCopyCounts;
use pageferry_tcp::ZeroCopy;

use crate::features::{Feature, Features};

/// Sends of a trial, and the longest.
const TRIAL_SENDS: usize = 8;
const TRIAL_BYTES: usize = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trial {
    /// So many sends may still be made before the kernel's word on the first ones is known.
    Running(usize),
    Pays,
    DoesNotPay,
}

impl Trial {
    /// Of a channel that has sent nothing; within this host the kernel always copies.
    pub(crate) fn new(wanted: ZeroCopy, features: Features, within_host: bool) -> Self {
        match wanted {
            ZeroCopy::On if features.has(Feature::SendZc) => Self::Pays,
            // Only where it may pay, and can be told whether it does.
            ZeroCopy::Auto if features.has(Feature::ReportUsage) && !within_host => {
                Self::Running(TRIAL_SENDS)
            }
            _ => Self::DoesNotPay,
        }
    }

    /// How long a send may be at most, and how many there may be, where there is `room` for so many.
    pub(crate) fn most(self, room: impl FnOnce() -> usize) -> (usize, usize) {
        match self {
            Self::Running(sends) => (TRIAL_BYTES, sends),
            Self::Pays => (usize::MAX, room()),
            Self::DoesNotPay => (0, 0),
        }
    }

    /// So many sends are made.
    pub(crate) fn spend(&mut self, made: usize) {
        if let Self::Running(sends) = self {
            *sends -= made;
        }
    }

    /// Ends once the kernel has said what it did with the sends; whether that was now.
    pub(crate) fn judge(&mut self, counts: impl FnOnce() -> ZeroCopyCounts) -> bool {
        if !matches!(self, Self::Running(_)) {
            return false;
        }
        let ZeroCopyCounts { sent, copied_by_kernel, .. } = counts();
        if sent < TRIAL_SENDS as u64 {
            return false;
        }
        *self = if copied_by_kernel * 2 < sent { Self::Pays } else { Self::DoesNotPay };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sent: u64, copied_by_kernel: u64) -> ZeroCopyCounts {
        ZeroCopyCounts { sent, copied_by_kernel, ..ZeroCopyCounts::default() }
    }

    #[test]
    fn zero_copy_is_tried_where_it_may_pay_and_can_be_told() {
        let all: Features = Feature::ALL.into_iter().collect();
        let silent = all.without(Features::none().with(Feature::ReportUsage));
        for (wanted, features, within_host, trial) in [
            (ZeroCopy::Auto, all, false, Trial::Running(TRIAL_SENDS)),
            (ZeroCopy::Auto, all, true, Trial::DoesNotPay),
            (ZeroCopy::Auto, silent, false, Trial::DoesNotPay),
            (ZeroCopy::On, silent, true, Trial::Pays),
            (ZeroCopy::On, Features::none(), false, Trial::DoesNotPay),
            (ZeroCopy::Off, all, false, Trial::DoesNotPay),
        ] {
            assert_eq!(Trial::new(wanted, features, within_host), trial);
        }
    }

    #[test]
    fn a_trial_ends_when_the_kernel_has_said_what_it_did() {
        for (copied, end) in [(0, Trial::Pays), (3, Trial::Pays), (4, Trial::DoesNotPay)] {
            let mut trial = Trial::Running(TRIAL_SENDS);
            assert_eq!(trial.most(|| 99), (TRIAL_BYTES, TRIAL_SENDS));
            trial.spend(TRIAL_SENDS);
            assert_eq!(trial.most(|| 99).1, 0, "no more before that");
            assert!(!trial.judge(|| counts(7, copied)));
            assert!(trial.judge(|| counts(8, copied)));
            assert_eq!(trial, end);
            assert!(!trial.judge(|| panic!("it is over")));
        }
        assert_eq!((Trial::Pays.most(|| 99).1, Trial::DoesNotPay.most(|| 99).1), (99, 0));
    }
}
