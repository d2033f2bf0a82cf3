//! What a connection says when it asks to be accepted.
//!
//! ```text
//! 0        4  5  6       8                 24  25  26   28        44
//! +--------+--+--+-------+-----------------+---+---+----+---------+
//! | "PFRD" |v |k |channel| id of the link  |mtu|tls|rail|  proof  |
//! +--------+--+--+-------+-----------------+---+---+----+---------+
//! ```
//!
//! v: version, 4. k: what the connection is for. The channel counts from 0, little-endian; 0
//! where it is not for pages, or a lane. The rail, by which pages go, or whose table it is, likewise. mtu: the largest path MTU that the source's port can do, as verbs encode
//! it. tls: 1 where control frames are in a session of TLS, else 0. With TLS all but the control connections
//! have a proof that the source is that session's ([`proof`](crate::proof)), over the bytes before it; else it is zero.
//!
//! What it says that accepts:
//!
//! ```text
//! 0        4  5   6    8       24
//! +--------+--+---+----+-------+
//! | "PFRD" |v |mtu|zero| proof |
//! +--------+--+---+----+-------+
//! ```
//!
//! mtu: the path MTU of the connection, at most what was asked for. The proof is the destination's, over the bytes before
//! it and the proof that it was asked with. rdma_cm may pad what it delivers
//! with zeros.

use std::fmt;

use pageferry::transport::LinkId;

use crate::cm::MAX_REQUEST_BYTES;
use crate::proof::{PROOF_BYTES, Proof};

const MAGIC: [u8; 4] = *b"PFRD";
const VERSION: u8 = 4;

/// What a proof is over.
pub(crate) const SAID_BYTES: usize = 28;
pub(crate) const PREAMBLE_BYTES: usize = SAID_BYTES + PROOF_BYTES;

const _: () = assert!(PREAMBLE_BYTES <= MAX_REQUEST_BYTES);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    /// Control frames from the source.
    Control,
    /// Control frames from the destination.
    ControlBack,
    /// Where guest memory is for the devices of one rail, from the destination.
    Table { rail: u16 },
    /// Pages, by one rail.
    Pages { channel: u16, rail: u16 },
    /// Pages that the destination reads.
    Lane { lane: u16 },
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("the control channel"),
            Self::ControlBack => f.write_str("the control channel's other half"),
            Self::Table { rail } => write!(f, "the table of memory of rail {rail}"),
            Self::Pages { channel, .. } => write!(f, "data channel {channel}"),
            Self::Lane { lane } => write!(f, "lane {lane}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub(crate) purpose: Purpose,
    pub(crate) migration: LinkId,
    /// As verbs encode it.
    pub(crate) mtu: u8,
    /// Whether there is TLS.
    pub(crate) sealed: bool,
    pub(crate) proof: Proof,
}

impl Preamble {
    pub(crate) fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (kind, channel, rail) = match self.purpose {
            Purpose::Control => (0, 0, 0),
            Purpose::ControlBack => (1, 0, 0),
            Purpose::Table { rail } => (2, 0, rail),
            Purpose::Pages { channel, rail } => (3, channel, rail),
            Purpose::Lane { lane } => (4, lane, 0),
        };
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = kind;
        bytes[6..8].copy_from_slice(&channel.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.migration.0);
        bytes[24] = self.mtu;
        bytes[25] = self.sealed.into();
        bytes[26..SAID_BYTES].copy_from_slice(&rail.to_le_bytes());
        bytes[SAID_BYTES..].copy_from_slice(&self.proof);
        bytes
    }

    /// Any bytes: a preamble, or why they are none, in words for the other side.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (bytes, padding) =
            bytes.split_first_chunk::<PREAMBLE_BYTES>().ok_or("a request that is too short")?;
        if bytes[..4] != MAGIC {
            return Err("a request that is not pageferry's");
        }
        if bytes[4] != VERSION {
            return Err("a version that is not spoken here");
        }
        if bytes[25] > 1 || padding.iter().any(|byte| *byte != 0) {
            return Err("a request with reserved bytes set");
        }
        let channel = u16::from_le_bytes([bytes[6], bytes[7]]);
        let rail = u16::from_le_bytes([bytes[26], bytes[27]]);
        let purpose = match (bytes[5], channel, rail) {
            (0, 0, 0) => Purpose::Control,
            (1, 0, 0) => Purpose::ControlBack,
            (2, 0, rail) => Purpose::Table { rail },
            (3, channel, rail) => Purpose::Pages { channel, rail },
            (4, lane, 0) => Purpose::Lane { lane },
            _ => return Err("a request for nothing that is known"),
        };
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[8..24]);
        let mut proof = Proof::default();
        proof.copy_from_slice(&bytes[SAID_BYTES..]);
        Ok(Self { purpose, migration: LinkId(id), mtu: bytes[24], sealed: bytes[25] == 1, proof })
    }
}

/// What an acceptance's proof is over.
pub(crate) const ACCEPTANCE_SAID_BYTES: usize = 8;
const ACCEPTANCE_BYTES: usize = ACCEPTANCE_SAID_BYTES + PROOF_BYTES;

/// What is said with an acceptance: the path MTU, as verbs encode it; and nothing yet where its proof goes, behind
/// [`ACCEPTANCE_SAID_BYTES`].
pub(crate) fn encode_acceptance(mtu: u32) -> [u8; ACCEPTANCE_BYTES] {
    let mut bytes = [0; ACCEPTANCE_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = VERSION;
    bytes[5] = u8::try_from(mtu).unwrap_or(0);
    bytes
}

/// Any bytes: the path MTU and the proof, if they are an acceptance of one that is at most what was asked for.
pub(crate) fn decode_acceptance(bytes: &[u8], asked_for: u32) -> Option<(u32, Proof)> {
    let (bytes, padding) = bytes.split_first_chunk::<ACCEPTANCE_BYTES>()?;
    let mtu = u32::from(bytes[5]);
    let zeros = bytes[6..8].iter().chain(padding).all(|byte| *byte == 0);
    let fits = bytes[..4] == MAGIC && bytes[4] == VERSION && zeros;
    let mut proof = Proof::default();
    proof.copy_from_slice(&bytes[8..]);
    (fits && mtu >= 1 && mtu <= asked_for).then_some((mtu, proof))
}

/// The path MTU of a connection: the smallest of what the source asks for, what this side can do, and
/// what the connection manager says of the way (0 where it does not). `None` if the source asks for what
/// there is not.
pub(crate) fn agree_on_mtu(asked_for: u8, here: u32, way: u32) -> Option<u32> {
    let asked_for = u32::from(asked_for);
    if !(1..=5).contains(&asked_for) {
        return None;
    }
    let way = if (1..=5).contains(&way) { way } else { asked_for };
    Some(asked_for.min(here).min(way))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROOF: Proof = [9; PROOF_BYTES];

    fn proven(mtu: u32) -> [u8; ACCEPTANCE_BYTES] {
        let mut said = encode_acceptance(mtu);
        said[ACCEPTANCE_SAID_BYTES..].copy_from_slice(&PROOF);
        said
    }

    #[test]
    fn what_is_encoded_is_decoded_padded_or_not() {
        for purpose in [
            Purpose::Control,
            Purpose::ControlBack,
            Purpose::Table { rail: 0 },
            Purpose::Table { rail: 0x1234 },
            Purpose::Pages { channel: 0, rail: 0 },
            Purpose::Pages { channel: 0x1234, rail: 0x4321 },
            Purpose::Lane { lane: 0 },
            Purpose::Lane { lane: 0x1234 },
        ] {
            let migration = LinkId([7; 16]);
            let preamble = Preamble { purpose, migration, mtu: 5, sealed: true, proof: PROOF };
            let mut bytes = preamble.encode().to_vec();
            assert_eq!(Preamble::decode(&bytes), Ok(preamble));
            bytes.resize(MAX_REQUEST_BYTES, 0);
            assert_eq!(Preamble::decode(&bytes), Ok(preamble));
            // Every byte counts: one that is changed is refused or means something else.
            for index in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[index] ^= 0x40;
                assert_ne!(Preamble::decode(&changed), Ok(preamble), "byte {index}");
            }
        }
        assert!(Preamble::decode(&[0; PREAMBLE_BYTES - 1]).is_err());
    }

    #[test]
    fn the_smallest_path_mtu_is_agreed_on_and_none_is_refused() {
        for (asked_for, here, way, agreed) in [
            (5, 5, 5, 5),
            (3, 5, 5, 3),
            (5, 3, 5, 3),
            // Both ports can do more than the network between them.
            (5, 5, 3, 3),
            (5, 5, 0, 5),
            (1, 5, 5, 1),
        ] {
            assert_eq!(agree_on_mtu(asked_for, here, way), Some(agreed));
            let said = proven(agreed);
            assert_eq!(decode_acceptance(&said, asked_for.into()), Some((agreed, PROOF)));
        }
        assert_eq!((agree_on_mtu(0, 5, 5), agree_on_mtu(6, 5, 5)), (None, None));
    }

    #[test]
    fn an_acceptance_is_checked() {
        let mut said = proven(4).to_vec();
        said.resize(196, 0);
        assert_eq!(decode_acceptance(&said, 5), Some((4, PROOF)), "padded");
        assert_eq!(decode_acceptance(&said, 3), None, "more than was asked for");
        for index in 0..said.len() {
            let mut changed = said.clone();
            changed[index] ^= 0x40;
            assert_ne!(decode_acceptance(&changed, 5), Some((4, PROOF)), "byte {index}");
        }
        assert_eq!(decode_acceptance(&proven(0), 5), None);
        assert_eq!(decode_acceptance(&[], 5), None);
    }
}
