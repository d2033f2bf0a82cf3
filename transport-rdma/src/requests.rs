//! Requests for connections of a migration that is served, which wait for its link.

use std::collections::BTreeSet;

use pageferry::MAX_CHANNELS;
use pageferry::transport::MAX_LANES;
use pageferry::transport::reception::TurnedAway;

use crate::dial::Request;
use crate::preamble::{Purpose, SAID_BYTES};
use crate::proof::{Ends, LinkKey, is_proven};

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// It is the first of a migration.
    Begins,
    /// It belongs to one that has begun, and is not there yet.
    Completes,
    /// It belongs to the migration that is being served.
    Waits,
}

/// Where a request belongs, given whether its migration has begun and is not there yet, and what waits for the
/// link of it if it is served; or why it is refused, in words for the other side.
pub(crate) fn judge<R>(
    purpose: Purpose,
    begun: bool,
    served: Option<&Requests<R>>,
) -> Result<Part, String> {
    match (purpose, served) {
        (Purpose::Control, _) if begun => {
            Err("the migration with this id has begun already".to_owned())
        }
        (Purpose::Control, _) => Ok(Part::Begins),
        (Purpose::ControlBack, _) if begun => Ok(Part::Completes),
        (Purpose::Table { .. } | Purpose::Pages { .. } | Purpose::Lane { .. }, Some(requests)) => {
            requests.judge(purpose).map(|()| Part::Waits)
        }
        _ => Err(TurnedAway::Unknown.to_string()),
    }
}

/// What there is one connection for at a time: a data channel goes by one rail.
fn place(purpose: Purpose) -> Purpose {
    match purpose {
        Purpose::Pages { channel, .. } => Purpose::Pages { channel, rail: 0 },
        purpose => purpose,
    }
}

/// Of one migration, each an `R`.
#[derive(Debug)]
pub(crate) struct Requests<R> {
    /// How many data channels there will be; [`MAX_CHANNELS`] until it is known.
    channels: u16,
    /// Connections that came, whether they were taken or not; each comes once.
    seen: BTreeSet<Purpose>,
    waiting: Vec<(Purpose, R)>,
    /// By which they show whose they are, where there is TLS; once the link is there.
    key: Option<LinkKey>,
}

impl<R> Default for Requests<R> {
    fn default() -> Self {
        let (seen, waiting) = (BTreeSet::new(), Vec::new());
        Self { channels: MAX_CHANNELS, seen, waiting, key: None }
    }
}

impl<R> Requests<R> {
    fn judge(&self, purpose: Purpose) -> Result<(), String> {
        match purpose {
            Purpose::Pages { channel, .. } if channel >= self.channels => {
                Err(format!("data channel {channel} of only {} channels", self.channels))
            }
            Purpose::Table { rail } | Purpose::Pages { rail, .. } if rail >= self.channels => {
                Err(format!("rail {rail} of only {} channels", self.channels))
            }
            Purpose::Lane { lane } if lane >= MAX_LANES => {
                Err(format!("lane {lane} of at most {MAX_LANES}"))
            }
            purpose if self.seen.contains(&place(purpose)) => {
                Err(format!("{purpose} is connected already"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn keep(&mut self, purpose: Purpose, request: R) {
        self.seen.insert(place(purpose));
        self.waiting.push((purpose, request));
    }

    /// What was taken for this came to nothing, and may come again by another rail.
    pub(crate) fn forget(&mut self, purpose: Purpose) {
        self.seen.remove(&place(purpose));
    }

    pub(crate) fn set_key(&mut self, key: Option<LinkKey>) {
        self.key = key;
    }

    /// From here on there are so many data channels; gives back those beyond.
    pub(crate) fn set_channels(&mut self, channels: u16) -> Vec<R> {
        self.channels = channels;
        let is_beyond = |purpose: &Purpose| match purpose {
            Purpose::Pages { channel: number, .. } | Purpose::Table { rail: number } => {
                *number >= channels
            }
            _ => false,
        };
        self.waiting.extract_if(.., |(purpose, _)| is_beyond(purpose)).map(|(_, r)| r).collect()
    }

    /// The first that came of those for this.
    pub(crate) fn take(&mut self, is_wanted: impl Fn(Purpose) -> bool) -> Option<R> {
        let at = self.waiting.iter().position(|(purpose, _)| is_wanted(*purpose))?;
        Some(self.waiting.remove(at).1)
    }
}

impl Requests<Request> {
    /// Whether a request is one of this migration's own, also where others know its id.
    pub(crate) fn is_of(&self, request: &Request) -> bool {
        let Request { id, preamble, queue_pair } = request;
        match &self.key {
            None => !preamble.sealed,
            Some(key) => {
                let said = &preamble.encode()[..SAID_BYTES];
                let asks = key.asks(said, Ends::at_destination(id, *queue_pair));
                preamble.sealed && is_proven(&asks, &preamble.proof)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_begins_once_and_is_completed_once_it_has_begun() {
        let nobody = None::<&Requests<u32>>;
        assert_eq!(judge(Purpose::Control, false, nobody), Ok(Part::Begins));
        judge(Purpose::Control, true, nobody).unwrap_err();
        assert_eq!(judge(Purpose::ControlBack, true, nobody), Ok(Part::Completes));
        judge(Purpose::ControlBack, false, nobody).unwrap_err();
        // Also while another one is served.
        let served = &Requests::<u32>::default();
        assert_eq!(judge(Purpose::Control, false, Some(served)), Ok(Part::Begins));
        judge(Purpose::ControlBack, false, Some(served)).unwrap_err();
    }

    #[test]
    fn connections_of_a_migration_that_is_not_served_are_refused() {
        for purpose in [
            Purpose::Table { rail: 0 },
            Purpose::Pages { channel: 0, rail: 0 },
            Purpose::Lane { lane: 0 },
        ] {
            for begun in [false, true] {
                let refused = judge(purpose, begun, None::<&Requests<u32>>).unwrap_err();
                assert_eq!(refused, "no migration with this id is being served");
            }
        }
    }

    #[test]
    fn data_connections_must_name_a_free_channel() {
        let mut requests = Requests::default();
        let judge = |requests: &Requests<u32>, purpose| judge(purpose, false, Some(requests));
        let pages = |channel| Purpose::Pages { channel, rail: 0 };
        let table = |rail| Purpose::Table { rail };
        for (purpose, request) in
            [(table(0), 7), (pages(0), 8), (pages(3), 9), (table(1), 5), (table(2), 6)]
        {
            assert_eq!(judge(&requests, purpose), Ok(Part::Waits));
            requests.keep(purpose, request);
            judge(&requests, purpose).unwrap_err();
        }
        judge(&requests, pages(MAX_CHANNELS)).unwrap_err();
        judge(&requests, table(MAX_CHANNELS)).unwrap_err();
        assert_eq!(requests.set_channels(2), [9, 6]);
        let mut take = |wanted| requests.take(|purpose| purpose == wanted);
        assert_eq!((take(pages(0)), take(pages(1)), take(table(1))), (Some(8), None, Some(5)));
        let refused = judge(&requests, pages(0)).unwrap_err();
        assert_eq!(refused, "data channel 0 is connected already", "though it was taken");
        let refused = judge(&requests, pages(2)).unwrap_err();
        assert_eq!(refused, "data channel 2 of only 2 channels");
        let by_another_rail = Purpose::Pages { channel: 0, rail: 1 };
        let refused = judge(&requests, by_another_rail).unwrap_err();
        assert_eq!(refused, "data channel 0 is connected already", "by another rail");
        requests.forget(pages(0));
        assert_eq!(judge(&requests, by_another_rail), Ok(Part::Waits));
        let refused = judge(&requests, table(2)).unwrap_err();
        assert_eq!(refused, "rail 2 of only 2 channels");
    }

    #[test]
    fn lanes_are_many_and_not_without_bound() {
        let mut requests = Requests::default();
        for lane in 0..MAX_LANES {
            let purpose = Purpose::Lane { lane };
            assert_eq!(judge(purpose, false, Some(&requests)), Ok(Part::Waits));
            requests.keep(purpose, lane);
            judge(purpose, false, Some(&requests)).unwrap_err();
        }
        judge(Purpose::Lane { lane: MAX_LANES }, false, Some(&requests)).unwrap_err();
        assert_eq!(requests.take(|purpose| purpose == Purpose::Lane { lane: 7 }), Some(7));
    }
}
