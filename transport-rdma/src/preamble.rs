//! What a connection says when it asks to be accepted.
//!
//! ```text
//! 0        4  5  6       8                 24  25        28
//! +--------+--+--+-------+-----------------+---+---------+
//! | "PFRD" |v |k |channel| migration id    |mtu| zero    |
//! +--------+--+--+-------+-----------------+---+---------+
//! ```
//!
//! v: version, 1. k: what the connection is for. The channel counts from 0, little-endian; 0
//! where it is not for pages. mtu: the path MTU as verbs encode it. A request that rdma_cm
//! delivers may be padded with zeros.

use pageferry::transport::MigrationId;

use crate::cm::MAX_REQUEST_BYTES;

const MAGIC: [u8; 4] = *b"PFRD";
const VERSION: u8 = 1;

pub(crate) const PREAMBLE_BYTES: usize = 28;

const _: () = assert!(PREAMBLE_BYTES <= MAX_REQUEST_BYTES);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Control frames from the source.
    Control,
    /// Control frames from the destination.
    ControlBack,
    /// Where guest memory is, from the destination.
    Table,
    /// Pages.
    Pages { channel: u16 },
    /// Pages that the destination reads.
    Reads,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub(crate) purpose: Purpose,
    pub(crate) migration: MigrationId,
    /// As verbs encode it.
    pub(crate) mtu: u8,
}

impl Preamble {
    pub(crate) fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (kind, channel) = match self.purpose {
            Purpose::Control => (0, 0),
            Purpose::ControlBack => (1, 0),
            Purpose::Table => (2, 0),
            Purpose::Pages { channel } => (3, channel),
            Purpose::Reads => (4, 0),
        };
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = kind;
        bytes[6..8].copy_from_slice(&channel.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.migration.0);
        bytes[24] = self.mtu;
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
        if bytes[25..].iter().chain(padding).any(|byte| *byte != 0) {
            return Err("a request with reserved bytes set");
        }
        let channel = u16::from_le_bytes([bytes[6], bytes[7]]);
        let purpose = match (bytes[5], channel) {
            (0, 0) => Purpose::Control,
            (1, 0) => Purpose::ControlBack,
            (2, 0) => Purpose::Table,
            (3, channel) => Purpose::Pages { channel },
            (4, 0) => Purpose::Reads,
            _ => return Err("a request for nothing that is known"),
        };
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[8..24]);
        Ok(Self { purpose, migration: MigrationId(id), mtu: bytes[24] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_padded_or_not() {
        for purpose in [
            Purpose::Control,
            Purpose::ControlBack,
            Purpose::Table,
            Purpose::Pages { channel: 0 },
            Purpose::Pages { channel: 0x1234 },
            Purpose::Reads,
        ] {
            let preamble = Preamble { purpose, migration: MigrationId([7; 16]), mtu: 5 };
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
}
