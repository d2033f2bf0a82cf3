//! Data channels that were lost are there again on another link, which takes the place of the one that lacks them.
//!
//! It is dialled while the old one is still there, so that the migration goes on with the channels that are left where the
//! destination cannot be reached just then. All that was sent has landed by then, and nothing is sent twice; nothing is
//! sent meanwhile either.

use std::time::{Duration, Instant};

use super::Drive;
use crate::control::handover::SourceState;
use crate::control::protocol::Agreement;
use crate::error::Error;
use crate::migration::session::{Patience, is_of_the_link};
use crate::progress::Event;
use crate::transport::TransportError;

/// Time between two attempts. It doubles, up to the longest: a channel that is lost again and again is better done
/// without. The first loss is mended at once, and so is one that comes when the last is long ago.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(64);

/// When to try, where links are made anew.
pub(super) struct Reopening {
    agreement: Agreement,
    next: Instant,
    pause: Duration,
}

impl Reopening {
    pub(super) fn new(agreement: Agreement) -> Self {
        Self { agreement, next: Instant::now(), pause: FIRST_PAUSE }
    }

    /// How long to leave it after an attempt that begins now.
    fn pause(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.next) > LONGEST_PAUSE {
            self.pause = FIRST_PAUSE;
        }
        let pause = self.pause;
        self.pause = (2 * pause).min(LONGEST_PAUSE);
        pause
    }
}

impl Drive<'_> {
    /// Whether it is time to make another link for the sake of channels that this one lacks.
    pub(super) fn lacks_channels(&self) -> bool {
        let Some(reopening) = &self.reopening else { return false };
        let wanted = reopening.agreement.channels.min(self.source.shared.channels());
        self.channels.live() < usize::from(wanted)
            && self.handover.state() == SourceState::Running
            && !self.is_loading()
            && Instant::now() >= reopening.next
    }

    /// Makes another link, if one lacks channels and the destination can be reached. Between rounds, or between two
    /// parts of one. Whether there is another link: the destination hears of the round again then.
    pub(super) fn reopen_channels(&mut self) -> Result<bool, Error> {
        if !self.lacks_channels() {
            return Ok(false);
        }
        self.await_landings()?;
        let began = Instant::now();
        let Some(reopening) = &mut self.reopening else { return Ok(false) };
        let (agreement, pause) = (reopening.agreement, reopening.pause(began));
        let dialled = self.dial_again();
        if let Some(reopening) = &mut self.reopening {
            reopening.next = Instant::now() + pause;
        }
        let link = match dialled {
            Ok(link) => link,
            Err(cause) if is_of_the_link(&cause) => {
                let cause = cause.chain();
                tracing::warn!(%cause, "channels that are lost cannot be reopened now");
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let channels = self.channels.missing();
        // In order, so that the destination does not take those that are left for lost ones too.
        self.channels.finish();
        self.await_finish(self.channels.live());
        self.end_epoch()?;
        let patience =
            Patience::now("the destination to answer", self.source.common.timeouts.rejoin);
        match self.go_on_with(link, agreement, patience) {
            Ok(_) => {
                self.statistics.rejoins += 1;
                let (epoch, after) = (self.epoch.number(), began.elapsed());
                self.emit(&Event::ChannelsReopened { channels, epoch, after })?;
                Ok(true)
            }
            // Then that link is lost as well, and the next one is waited for.
            Err(Error::TimedOut { what: operation, after }) => {
                Err(TransportError::TimedOut { operation, after }.into())
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::control::protocol::PROTOCOL_VERSION;

    #[test]
    fn who_loses_channels_all_the_time_tries_less_and_less_often() {
        let agreement = Agreement {
            version: PROTOCOL_VERSION,
            channels: 2,
            verify: false,
            rejoins: true,
            page_sums: false,
        };
        let mut reopening = Reopening::new(agreement);
        let mut now = reopening.next;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let pause = reopening.pause(now);
            pauses.push(pause.as_secs());
            now += pause;
            reopening.next = now;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        assert_eq!(reopening.pause(now + 2 * LONGEST_PAUSE), FIRST_PAUSE, "that was long ago");
    }
}
