//! Where a peer comes from, as far as it costs somebody something to have more of that. Pure.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// What counts as one address where peers are counted by it.
///
/// Of IPv6 that is a network of 64 bits: whoever has one host in it usually has them all. A link-local
/// address counts by itself, with its scope, for all hosts of a link have the same 64 bits. An IPv4 address
/// is what it is, also written as IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Origin {
    address: IpAddr,
    scope: u32,
}

impl From<SocketAddr> for Origin {
    fn from(peer: SocketAddr) -> Self {
        /// Bits that tell the hosts of a network apart.
        const HOST: u128 = u64::MAX as u128;
        match (peer, peer.ip().to_canonical()) {
            (SocketAddr::V6(peer), IpAddr::V6(address)) if address.is_unicast_link_local() => {
                Self { address: address.into(), scope: peer.scope_id() }
            }
            (_, IpAddr::V6(address)) => {
                let network = Ipv6Addr::from_bits(address.to_bits() & !HOST);
                Self { address: network.into(), scope: 0 }
            }
            (_, address) => Self { address, scope: 0 },
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn origin(peer: &str) -> Origin {
        peer.parse::<SocketAddr>().expect(peer).into()
    }

    #[test]
    fn hosts_of_one_network_count_as_one_address() {
        for (one, other, same) in [
            ("10.0.0.1:1", "10.0.0.1:2", true),
            ("10.0.0.1:1", "10.0.0.2:1", false),
            ("[2001:db8:0:1::1]:1", "[2001:db8:0:1:ffff:ffff:ffff:ffff]:2", true),
            ("[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1", false),
            ("[fd00::1]:1", "[fd00::2]:1", true),
            // All of these are of fe80::/64.
            ("[fe80::1%1]:1", "[fe80::1%1]:2", true),
            ("[fe80::1%1]:1", "[fe80::2%1]:1", false),
            ("[fe80::1%1]:1", "[fe80::1%2]:1", false),
            ("[febf::1%1]:1", "[febf::2%1]:1", false),
            // And these of ::/64.
            ("[::ffff:10.0.0.1]:1", "10.0.0.1:1", true),
            ("[::ffff:10.0.0.1]:1", "[::ffff:10.0.0.2]:1", false),
            ("[::ffff:10.0.0.1]:1", "[::1]:1", false),
            ("[::1]:1", "[::1]:2", true),
        ] {
            assert_eq!(origin(one) == origin(other), same, "{one} and {other}");
        }
    }
}
