//! Requests for connections of a migration that is served, which wait for its link.

use std::collections::BTreeSet;

use pageferry::MAX_CHANNELS;
use pageferry::transport::reception::TurnedAway;

use crate::dial::Request;
use crate::preamble::{Purpose, SAID_BYTES};
use crate::proof::{Ends, LinkKey, is_proven};

/// Connections for reads that may wait.
const MAX_READERS: usize = 64;

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
        (Purpose::Table | Purpose::Pages { .. } | Purpose::Reads, Some(requests)) => {
            requests.judge(purpose).map(|()| Part::Waits)
        }
        _ => Err(TurnedAway::Unknown.to_string()),
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
            Purpose::Pages { channel } if channel >= self.channels => {
                Err(format!("data channel {channel} of only {} channels", self.channels))
            }
            Purpose::Reads => {
                let readers = self.waiting.iter().filter(|(purpose, _)| *purpose == Purpose::Reads);
                if readers.count() < MAX_READERS {
                    return Ok(());
                }
                Err("too many connections for reads are waiting".to_owned())
            }
            purpose if self.seen.contains(&purpose) => {
                Err(format!("{purpose} is connected already"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn keep(&mut self, purpose: Purpose, request: R) {
        self.seen.insert(purpose);
        self.waiting.push((purpose, request));
    }

    pub(crate) fn set_key(&mut self, key: Option<LinkKey>) {
        self.key = key;
    }

    /// From here on there are so many data channels; gives back those beyond.
    pub(crate) fn set_channels(&mut self, channels: u16) -> Vec<R> {
        self.channels = channels;
        let beyond = |purpose: &Purpose| matches!(purpose, Purpose::Pages { channel } if *channel >= channels);
        self.waiting.extract_if(.., |(purpose, _)| beyond(purpose)).map(|(_, r)| r).collect()
    }

    pub(crate) fn take(&mut self, wanted: Purpose) -> Option<R> {
        let at = self.waiting.iter().position(|(purpose, _)| *purpose == wanted)?;
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
        for purpose in [Purpose::Table, Purpose::Pages { channel: 0 }, Purpose::Reads] {
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
        let pages = |channel| Purpose::Pages { channel };
        for (purpose, request) in [(Purpose::Table, 7), (pages(0), 8), (pages(3), 9)] {
            assert_eq!(judge(&requests, purpose), Ok(Part::Waits));
            requests.keep(purpose, request);
            judge(&requests, purpose).unwrap_err();
        }
        judge(&requests, pages(MAX_CHANNELS)).unwrap_err();
        assert_eq!(requests.set_channels(2), [9]);
        assert_eq!((requests.take(pages(0)), requests.take(pages(1))), (Some(8), None));
        let refused = judge(&requests, pages(0)).unwrap_err();
        assert_eq!(refused, "data channel 0 is connected already", "though it was taken");
        let refused = judge(&requests, pages(2)).unwrap_err();
        assert_eq!(refused, "data channel 2 of only 2 channels");
    }

    #[test]
    fn connections_for_reads_are_many_and_not_without_bound() {
        let mut requests = Requests::default();
        for reader in 0..64 {
            assert_eq!(judge(Purpose::Reads, false, Some(&requests)), Ok(Part::Waits));
            requests.keep(Purpose::Reads, reader);
        }
        judge(Purpose::Reads, false, Some(&requests)).unwrap_err();
        assert_eq!(requests.take(Purpose::Reads), Some(0), "the first that came");
        assert_eq!(judge(Purpose::Reads, false, Some(&requests)), Ok(Part::Waits));
    }
}
