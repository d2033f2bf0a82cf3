//! Ways between two hosts of which either may have several addresses, by networks of their own, say.

use std::io;
use std::net::{IpAddr, SocketAddr};

use super::addresses;

/// A way to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Its address.
    pub to: SocketAddr,
    /// An address here, if that is not left to the kernel.
    pub from: Option<IpAddr>,
}

impl Way {
    /// To an address, from one of those here after the other. Those of the other family are left out, unless there are
    /// no others: then it is a way that does not work, and the error names it.
    pub fn by_turns(to: SocketAddr, here: &[IpAddr], turn: usize) -> Self {
        let alike = |from: &&IpAddr| from.is_ipv4() == to.is_ipv4();
        let from = match here.iter().filter(alike).count() {
            0 => here.first(),
            count => here.iter().filter(alike).nth(turn % count),
        };
        Self { to, from: from.copied() }
    }

    /// This way, which has been gone, and then all others: to each of the places in `there`, which may be one address of
    /// several, and from each address here, in turn.
    pub fn and_others(self, there: &[Vec<SocketAddr>], here: &[IpAddr]) -> Vec<Self> {
        // Of a name with addresses of both kinds that which is known to work here.
        let alike = |to: &&SocketAddr| to.is_ipv4() == self.to.is_ipv4();
        let best = |to: &Vec<SocketAddr>| {
            let reached = to.contains(&self.to).then_some(&self.to);
            reached.or_else(|| to.iter().find(alike)).or(to.first()).copied()
        };
        let ends: Vec<_> = there.iter().filter_map(best).collect();
        let turns = if ends.is_empty() { 0 } else { ends.len().max(here.len()) };
        let all = (0..turns).map(|turn| Self::by_turns(ends[turn % ends.len()], here, turn));
        let mut ways = vec![self];
        ways.extend(all.filter(|way| *way != self));
        ways
    }
}

/// Addresses as people write them, of which at least one has to be there: the addresses of each that is.
pub fn resolve_any(written: &[String]) -> io::Result<Vec<Vec<SocketAddr>>> {
    let (mut found, mut last) = (Vec::new(), io::Error::from(io::ErrorKind::NotFound));
    for written in written {
        match addresses::resolve(&written.as_str()) {
            Ok(more) => found.push(more),
            Err(cause) => last = cause,
        }
    }
    if found.is_empty() { Err(last) } else { Ok(found) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn way(to: &str, from: Option<&str>) -> Way {
        Way { to: to.parse().unwrap(), from: from.map(|from| from.parse().unwrap()) }
    }

    fn here(addresses: &[&str]) -> Vec<IpAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn a_source_has_its_addresses_in_turn_those_of_the_same_kind() {
        let here = here(&["10.0.0.1", "fe80::1", "10.0.0.2"]);
        let to = |to: &str, turn| Way::by_turns(to.parse().unwrap(), &here, turn);
        assert_eq!(to("10.0.0.9:1", 0), way("10.0.0.9:1", Some("10.0.0.1")));
        assert_eq!(to("10.0.0.9:1", 1), way("10.0.0.9:1", Some("10.0.0.2")));
        assert_eq!(to("10.0.0.9:1", 2), way("10.0.0.9:1", Some("10.0.0.1")));
        assert_eq!(to("[fe80::9]:1", 1), way("[fe80::9]:1", Some("fe80::1")));
        let other = Way::by_turns("10.0.0.9:1".parse().unwrap(), &here[1..2], 0);
        assert_eq!(other, way("10.0.0.9:1", Some("fe80::1")), "an error that names it");
        assert_eq!(Way::by_turns("10.0.0.9:1".parse().unwrap(), &[], 3).from, None);
    }

    #[test]
    fn the_way_that_was_gone_comes_first_and_each_once() {
        let there: Vec<Vec<SocketAddr>> = [&["10.0.0.1:7"][..], &["[fe80::2]:7", "10.0.0.2:7"]]
            .iter()
            .map(|place| place.iter().map(|address| address.parse().unwrap()).collect())
            .collect();
        let first = way("10.0.0.2:7", None);
        assert_eq!(first.and_others(&there, &[]), [first, way("10.0.0.1:7", None)]);
        let one = &there[..1];
        let first = way("10.0.0.1:7", Some("10.0.0.8"));
        assert_eq!(
            first.and_others(one, &here(&["10.0.0.8", "10.0.0.9"])),
            [first, way("10.0.0.1:7", Some("10.0.0.9"))]
        );
        assert_eq!(first.and_others(&[], &[]), [first]);
    }

    #[test]
    fn a_place_that_cannot_be_looked_up_is_done_without() {
        let written = |addresses: &[&str]| {
            resolve_any(&addresses.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>())
        };
        let found = written(&["127.0.0.1:7", "no address"]).unwrap();
        assert_eq!(found, [vec!["127.0.0.1:7".parse().unwrap()]]);
        written(&["no address"]).unwrap_err();
        written(&[]).unwrap_err();
    }
}
