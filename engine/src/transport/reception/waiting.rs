//! Sources that have greeted and wait for the place that another one has: how many, and who is next.
//! Fair by address, so that many from one cost a source from another one nothing. Pure: no clock.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::origin::Origin;
use super::{Holder, Turn};

/// The first of those from the address that most are from: who goes where there are too many. They are
/// given in the order in which they came. Hosts of one IPv6 network of 64 bits count as one address.
pub fn first_of_the_most(from: impl Iterator<Item = SocketAddr>) -> Option<usize> {
    let from: Vec<_> = from.map(Origin::from).collect();
    let counts = count(from.iter().copied());
    let most = counts.values().max();
    from.iter().position(|origin| counts.get(origin) == most)
}

fn count(from: impl Iterator<Item = Origin>) -> BTreeMap<Origin, usize> {
    let mut counts = BTreeMap::new();
    for origin in from {
        *counts.entry(origin).or_default() += 1;
    }
    counts
}

/// How a source has greeted.
#[derive(Debug, Clone, Copy)]
pub struct Greeted {
    /// From where.
    pub from: SocketAddr,
    /// Bytes that are kept of its greeting.
    pub bytes: usize,
    /// How long that took once it was let in: a round trip at least.
    pub round_trip: Duration,
}

#[derive(Debug, Clone)]
struct Waits<T> {
    who: T,
    from: SocketAddr,
    greeting_bytes: usize,
    turn: Turn,
}

/// Who waits.
#[derive(Debug, Clone)]
pub struct WaitingRoom<T> {
    /// In the order in which they have come.
    waiting: Vec<Waits<T>>,
    most: usize,
    most_bytes: usize,
}

impl<T> WaitingRoom<T> {
    /// For so many, whose greetings have at most so many bytes together.
    pub fn new(most: usize, most_bytes: usize) -> Self {
        Self { waiting: Vec::new(), most, most_bytes }
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Somebody comes. Gives back who has to go for it: who waits longest of the address that most are
    /// from.
    pub fn enter(&mut self, now: Instant, who: T, greeted: Greeted) -> Vec<T> {
        let Greeted { from, bytes, round_trip } = greeted;
        let turn = Turn::new(now, round_trip);
        self.waiting.push(Waits { who, from, greeting_bytes: bytes, turn });
        let mut gone = Vec::new();
        while (self.waiting.len() > self.most || self.bytes() > self.most_bytes)
            && let Some(at) = first_of_the_most(self.from())
        {
            gone.push(self.waiting.remove(at).who);
        }
        gone
    }

    /// From where they are, in the order in which they have come.
    pub fn from(&self) -> impl Iterator<Item = SocketAddr> {
        self.waiting.iter().map(|waits| waits.from)
    }

    /// One of them goes: who came as that one of [`Self::from`].
    pub fn remove(&mut self, at: usize) -> Option<T> {
        (at < self.waiting.len()).then(|| self.waiting.remove(at).who)
    }

    fn bytes(&self) -> usize {
        self.waiting.iter().map(|waits| waits.greeting_bytes).sum()
    }

    /// Gives back who waits for nothing any more.
    pub fn without(&mut self, mut has_left: impl FnMut(&mut T) -> bool) -> Vec<T> {
        self.waiting
            .extract_if(.., |waits| has_left(&mut waits.who))
            .map(|waits| waits.who)
            .collect()
    }

    /// Offers the place to one after the other, until one does not get it: first to who waits longest of the
    /// address that fewest are from. Who does not get it comes back from `offer`, with who has it. Gives back
    /// who is to come later.
    pub fn serve(
        &mut self,
        now: Instant,
        mut offer: impl FnMut(T) -> Option<(T, Holder)>,
    ) -> Vec<T> {
        let counts = count(self.waiting.iter().map(|waits| waits.from.into()));
        let mut by_rank: Vec<_> =
            std::mem::take(&mut self.waiting).into_iter().enumerate().collect();
        // Stable: of one address they stay as they came.
        by_rank.sort_by_key(|(_, waits)| counts.get(&waits.from.into()).copied());
        let (mut left, mut over) = (Vec::new(), Vec::new());
        // Should it be given up while others are asked, it is for the first of them.
        let mut taken = None;
        for (came, Waits { who, from, greeting_bytes, mut turn }) in by_rank {
            let answer = match taken {
                Some(holder) => Some((who, holder)),
                None => offer(who),
            };
            let Some((who, holder)) = answer else { continue };
            taken = Some(holder);
            if turn.is_over(now, holder) {
                over.push(who);
            } else {
                left.push((came, Waits { who, from, greeting_bytes, turn }));
            }
        }
        left.sort_by_key(|(came, _)| *came);
        self.waiting.extend(left.into_iter().map(|(_, waits)| waits));
        over
    }

    /// All of them: nobody is served any more.
    pub fn empty(self) -> impl Iterator<Item = T> {
        self.waiting.into_iter().map(|waits| waits.who)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::transport::{LinkId, Place};

    fn greeted(last: u8, bytes: usize) -> Greeted {
        Greeted { from: ([10, 0, 0, last], 7400).into(), bytes, round_trip: Duration::ZERO }
    }

    fn holder(place: Place) -> Holder {
        Holder { id: LinkId([1; 16]), place }
    }

    /// In the order in which they get the place.
    fn order(room: &WaitingRoom<u32>) -> Vec<u32> {
        let mut order = Vec::new();
        room.clone().serve(Instant::now(), |who| {
            order.push(who);
            None
        });
        order
    }

    #[test]
    fn who_waits_longest_of_the_address_that_most_are_from_goes() {
        let (now, mut room) = (Instant::now(), WaitingRoom::new(4, usize::MAX));
        assert!(room.enter(now, 1, greeted(1, 0)).is_empty());
        for who in 2..5 {
            assert!(room.enter(now, who, greeted(2, 0)).is_empty());
        }
        for who in 5..100 {
            assert_eq!(room.enter(now, who, greeted(2, 0)), [who - 3]);
        }
        assert_eq!(order(&room), [1, 97, 98, 99]);
    }

    #[test]
    fn the_next_is_of_the_address_that_fewest_are_from_and_else_who_waits_longest() {
        let (now, mut room) = (Instant::now(), WaitingRoom::new(64, usize::MAX));
        for (who, from) in [(1, 1), (2, 1), (3, 2), (4, 1), (5, 2), (6, 3)] {
            assert!(room.enter(now, who, greeted(from, 0)).is_empty());
        }
        let open = |who| Some((who, holder(Place::Open)));
        for _ in 0..2 {
            assert_eq!(order(&room), [6, 3, 5, 1, 2, 4]);
            assert!(room.serve(now, open).is_empty());
        }
        assert!(room.serve(now, |who| (who != 6).then_some((who, holder(Place::Open)))).is_empty());
        // As many from one address as from the other: in the order in which they came, whoever was offered
        // the place before.
        assert_eq!(room.without(|who| *who == 2), [2]);
        assert_eq!(order(&room), [1, 3, 4, 5]);
        assert_eq!(room.without(|who| *who == 3 || *who == 5), [3, 5]);
        assert_eq!(order(&room), [1, 4]);
    }

    /// One that is given up just now is for who is next, and not for whoever is being asked.
    #[test]
    fn once_somebody_has_the_place_nobody_else_is_offered_it() {
        let (now, mut room) = (Instant::now(), WaitingRoom::new(64, usize::MAX));
        for (who, from) in [(1, 1), (2, 1), (3, 2)] {
            assert!(room.enter(now, who, greeted(from, 0)).is_empty());
        }
        let mut offered = Vec::new();
        let over = room.serve(now, |who| {
            offered.push(who);
            (offered.len() == 1).then_some((who, holder(Place::Open)))
        });
        assert_eq!((over, offered), (vec![], vec![3]));
        assert_eq!(order(&room), [3, 1, 2]);
    }

    /// Each of the crowd has an address of its own.
    #[test]
    fn hosts_of_one_network_are_counted_together() {
        let (now, mut room) = (Instant::now(), WaitingRoom::new(4, usize::MAX));
        let from = |network, host| {
            let from = ([0x2001, 0xdb8, 0, network, 0, 0, 0, host], 7400).into();
            Greeted { from, ..greeted(0, 0) }
        };
        assert!(room.enter(now, 1, from(1, 1)).is_empty());
        for who in 2..5 {
            assert!(room.enter(now, who.into(), from(2, who)).is_empty());
        }
        for who in 5..100 {
            assert_eq!(room.enter(now, who.into(), from(2, who)), [u32::from(who) - 3]);
        }
        assert_eq!(order(&room), [1, 97, 98, 99]);
        let crowd = (2..9).map(|host| from(2, host).from);
        assert_eq!(first_of_the_most(std::iter::once(from(1, 1).from).chain(crowd)), Some(1));
    }

    #[test]
    fn greetings_of_those_who_wait_have_a_bounded_share_of_memory() {
        let (now, mut room) = (Instant::now(), WaitingRoom::new(64, 100));
        assert!(room.enter(now, 1, greeted(1, 40)).is_empty());
        assert!(room.enter(now, 2, greeted(2, 40)).is_empty());
        assert!(room.enter(now, 3, greeted(2, 20)).is_empty());
        assert_eq!(room.enter(now, 4, greeted(2, 60)), [2, 3]);
        assert_eq!(room.enter(now, 5, greeted(3, 101)), [1, 4, 5], "whoever it is");
        assert!(room.is_empty());
    }

    #[test]
    fn who_has_waited_for_its_turn_is_given_back() {
        let (now, mut room) = (Instant::now(), WaitingRoom::new(64, 100));
        assert!(room.enter(now, 1, greeted(1, 0)).is_empty());
        let kept = |who| Some((who, holder(Place::Kept)));
        assert!(room.serve(now, kept).is_empty());
        assert_eq!(room.serve(now + Duration::from_secs(2), kept), [1]);
        assert_eq!(room.empty().count(), 0);
        let mut room = WaitingRoom::new(64, 100);
        for who in 1..4 {
            assert!(room.enter(now, who, greeted(1, 0)).is_empty());
        }
        assert_eq!((room.remove(3), room.remove(1), room.from().count()), (None, Some(2), 2));
    }
}
