//! How every connection begins: the source says what the connection is for, the destination
//! answers. Control frames or batches follow only after an answer of [`Status::Ok`]. A source that is
//! turned away after that hears another answer on its control connection, behind a frame of no bytes.
//!
//! All integers are little-endian.
//!
//! # Preamble, source to destination: 32 bytes
//!
//! | offset | bytes | field                                                     |
//! |-------:|------:|-----------------------------------------------------------|
//! |      0 |     8 | magic, `PFTCPREQ`                                         |
//! |      8 |     2 | version, 1                                                |
//! |     10 |     1 | kind: 1 control channel, 2 data channel, 3 lane for reads  |
//! |     11 |     1 | reserved, 0                                               |
//! |     12 |    16 | id of the link: random, made by the source                |
//! |     28 |     2 | index of the data channel or the lane, from 0; else 0      |
//! |     30 |     2 | reserved, 0                                               |
//!
//! # Answer, destination to source: 128 bytes
//!
//! | offset | bytes | field                                                     |
//! |-------:|------:|-----------------------------------------------------------|
//! |      0 |     8 | magic, `PFTCPANS`                                         |
//! |      8 |     2 | version the destination speaks, 1                         |
//! |     10 |     1 | [status](Status): 0 ok, anything else is a refusal        |
//! |     11 |     1 | length of the reason in bytes, 0 to 116                   |
//! |     12 |   116 | reason: UTF-8 without control characters, then zero bytes |
//!
//! Magic, version and status keep their places in every version, and so does the whole answer:
//! a source can always read why it was refused.

use pageferry::transport::LinkId;
use thiserror::Error;

/// Version of the preamble that this side speaks.
pub const VERSION: u16 = 1;
/// Length of the preamble in bytes.
pub const PREAMBLE_BYTES: usize = 32;
/// Length of the answer in bytes.
pub const ANSWER_BYTES: usize = 128;
/// Longest reason in an answer in bytes; longer ones are cut.
pub const MAX_REASON_BYTES: usize = ANSWER_BYTES - REASON_AT;

const PREAMBLE_MAGIC: [u8; 8] = *b"PFTCPREQ";
const ANSWER_MAGIC: [u8; 8] = *b"PFTCPANS";
const VERSION_AT: usize = 8;
const REASON_AT: usize = 12;
const KIND_CONTROL: u8 = 1;
const KIND_DATA: u8 = 2;
const KIND_LANE: u8 = 3;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The control channel; starts a migration.
    Control,
    /// A data channel of a migration that has its control channel.
    Data {
        /// Index of the channel.
        channel: u16,
    },
    /// A lane by which the destination reads, likewise.
    Lane {
        /// Index of the lane.
        lane: u16,
    },
}

/// What a source says first on every connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// The migration the connection belongs to.
    pub id: LinkId,
    /// What it is for.
    pub kind: Kind,
}

/// What is wrong with bytes that should be a preamble or an answer.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PreambleError {
    /// The other side does not speak this protocol at all.
    #[error("connection begins with {0:02x?}, which is no pageferry transport over tcp")]
    Magic([u8; 8]),
    /// It speaks another version.
    #[error("preamble version {0} is not supported, only {VERSION} is")]
    Version(u16),
    /// Unknown kind of connection.
    #[error("unknown kind {0} of connection")]
    Kind(u8),
    /// Bytes that must be zero are not.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// The reason of an answer is too long, not UTF-8 or not printable.
    #[error("answer gives its reason in unreadable bytes")]
    Reason,
}

/// Why a connection was taken or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// 0: go on.
    Ok,
    /// 1: not now: another source is served or waits, too many connect, or nobody is accepted any more.
    Busy,
    /// 2: a data channel names a migration that is not being served.
    UnknownMigration,
    /// 3: the preamble's version is not supported.
    Version,
    /// 4: the preamble, or the first frame behind it, is malformed, or is not there in time.
    Malformed,
    /// 5: the data channel with this index is there already.
    ChannelTaken,
    /// 6: there is no data channel of this index.
    ChannelOutOfRange,
    /// 7: the destination takes no plain text, or none from there.
    Insecure,
    /// A refusal this version does not know.
    Other(u8),
}

impl Status {
    fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Busy => 1,
            Self::UnknownMigration => 2,
            Self::Version => 3,
            Self::Malformed => 4,
            Self::ChannelTaken => 5,
            Self::ChannelOutOfRange => 6,
            Self::Insecure => 7,
            Self::Other(code) => code,
        }
    }

    fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Ok,
            1 => Self::Busy,
            2 => Self::UnknownMigration,
            3 => Self::Version,
            4 => Self::Malformed,
            5 => Self::ChannelTaken,
            6 => Self::ChannelOutOfRange,
            7 => Self::Insecure,
            other => Self::Other(other),
        }
    }
}

/// What a destination answers to a preamble.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Taken or refused.
    pub status: Status,
    /// Why it was refused, for people.
    pub reason: String,
}

impl Preamble {
    /// As bytes.
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (kind, channel) = match self.kind {
            Kind::Control => (KIND_CONTROL, 0),
            Kind::Data { channel } => (KIND_DATA, channel),
            Kind::Lane { lane } => (KIND_LANE, lane),
        };
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&PREAMBLE_MAGIC);
        bytes[VERSION_AT..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = kind;
        bytes[12..28].copy_from_slice(&self.id.0);
        bytes[28..30].copy_from_slice(&channel.to_le_bytes());
        bytes
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, PreambleError> {
        check_start(bytes)?;
        let channel = u16::from_le_bytes([bytes[28], bytes[29]]);
        let kind = match bytes[10] {
            KIND_CONTROL => Kind::Control,
            KIND_DATA => Kind::Data { channel },
            KIND_LANE => Kind::Lane { lane: channel },
            other => return Err(PreambleError::Kind(other)),
        };
        let reserved_are_zero = bytes[11] == 0 && bytes[30..] == [0, 0];
        if !reserved_are_zero || (kind == Kind::Control && channel != 0) {
            return Err(PreambleError::Reserved);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[12..28]);
        Ok(Self { id: LinkId(id), kind })
    }
}

/// Checks magic and version of a preamble as far as it has come, so that a stranger is turned
/// away at once and another version is told so, however long its preamble is.
pub fn check_start(bytes: &[u8]) -> Result<(), PreambleError> {
    let have = bytes.len().min(PREAMBLE_MAGIC.len());
    if bytes[..have] != PREAMBLE_MAGIC[..have] {
        return Err(PreambleError::Magic(first_eight(bytes)));
    }
    if let Some(&[low, high]) = bytes.get(VERSION_AT..VERSION_AT + 2) {
        let version = u16::from_le_bytes([low, high]);
        if version != VERSION {
            return Err(PreambleError::Version(version));
        }
    }
    Ok(())
}

impl Answer {
    /// As bytes. A long reason is cut, control characters become `?`.
    pub fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..8].copy_from_slice(&ANSWER_MAGIC);
        bytes[VERSION_AT..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = self.status.code();
        let mut end = REASON_AT;
        for mut character in self.reason.chars() {
            if character.is_control() {
                character = '?';
            }
            let next = end + character.len_utf8();
            let Some(room) = bytes.get_mut(end..next) else { break };
            character.encode_utf8(room);
            end = next;
        }
        // At most MAX_REASON_BYTES, which fits.
        bytes[11] = u8::try_from(end - REASON_AT).unwrap_or(u8::MAX);
        bytes
    }

    /// From bytes. A refusal of another version is read, an ok of another version is an error.
    pub fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, PreambleError> {
        if bytes[..8] != ANSWER_MAGIC {
            return Err(PreambleError::Magic(first_eight(bytes)));
        }
        let status = Status::from_code(bytes[10]);
        let version = u16::from_le_bytes([bytes[VERSION_AT], bytes[VERSION_AT + 1]]);
        if status == Status::Ok && version != VERSION {
            return Err(PreambleError::Version(version));
        }
        let end = REASON_AT + usize::from(bytes[11]);
        let reason = bytes.get(REASON_AT..end).ok_or(PreambleError::Reason)?;
        let reason = std::str::from_utf8(reason).map_err(|_| PreambleError::Reason)?;
        if reason.chars().any(char::is_control) {
            return Err(PreambleError::Reason);
        }
        if bytes[end..].iter().any(|&byte| byte != 0) {
            return Err(PreambleError::Reserved);
        }
        Ok(Self { status, reason: reason.to_owned() })
    }
}

/// The first eight bytes, filled up with zeroes.
fn first_eight(bytes: &[u8]) -> [u8; 8] {
    let mut first = [0; 8];
    let have = bytes.len().min(first.len());
    first[..have].copy_from_slice(&bytes[..have]);
    first
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn a_kind() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Control),
            any::<u16>().prop_map(|channel| Kind::Data { channel }),
            any::<u16>().prop_map(|lane| Kind::Lane { lane })
        ]
    }

    /// Any bytes, often with a good beginning so that the checks behind it are reached.
    fn bytes_with<const N: usize>(magic: [u8; 8]) -> impl Strategy<Value = [u8; N]> {
        (prop::collection::vec(any::<u8>(), N), 0..5_u8).prop_map(move |(bytes, lead)| {
            let mut array = [0; N];
            array.copy_from_slice(&bytes);
            if lead > 0 {
                array[..8].copy_from_slice(&magic);
            }
            if lead > 1 {
                array[VERSION_AT..10].copy_from_slice(&VERSION.to_le_bytes());
            }
            if lead > 2 {
                array[10] %= 4;
                array[11] %= 120;
            }
            if lead > 3 {
                array[11] = 0;
                array[12..].fill(0);
            }
            array
        })
    }

    proptest! {
        #[test]
        fn a_preamble_survives(id: [u8; 16], kind in a_kind()) {
            let preamble = Preamble { id: LinkId(id), kind };
            prop_assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
        }

        #[test]
        fn an_answer_survives_with_its_reason_cut(code: u8, reason: String) {
            let answer = Answer { status: Status::from_code(code), reason };
            let decoded = Answer::decode(&answer.encode()).unwrap();
            prop_assert_eq!(decoded.status, answer.status);
            let clean: String =
                answer.reason.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            prop_assert!(clean.starts_with(&decoded.reason));
            prop_assert!(decoded.reason == clean || decoded.reason.len() + 4 > MAX_REASON_BYTES);
        }

        #[test]
        fn any_bytes_are_a_preamble_or_a_typed_error(
            bytes in bytes_with::<PREAMBLE_BYTES>(PREAMBLE_MAGIC),
        ) {
            // Whatever is accepted says the same when it is encoded again.
            if let Ok(preamble) = Preamble::decode(&bytes) {
                prop_assert_eq!(preamble.encode(), bytes);
            }
        }

        #[test]
        fn any_bytes_are_an_answer_or_a_typed_error(
            bytes in bytes_with::<ANSWER_BYTES>(ANSWER_MAGIC),
        ) {
            if let Ok(answer) = Answer::decode(&bytes) {
                let again = answer.encode();
                prop_assert_eq!(&again[10..], &bytes[10..]);
            }
        }

        #[test]
        fn a_bad_start_is_seen_at_its_first_bad_byte(at in 0..8_usize, flip in 1..=255_u8) {
            let preamble = Preamble { id: LinkId([7; 16]), kind: Kind::Control };
            let mut bytes = preamble.encode();
            bytes[at] ^= flip;
            prop_assert!(check_start(&bytes[..at]).is_ok());
            prop_assert!(check_start(&bytes[..=at]).is_err());
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = Preamble { id: LinkId([7; 16]), kind: Kind::Control }.encode();
        bytes[VERSION_AT] = 9;
        assert_eq!(check_start(&bytes[..9]), Ok(()));
        assert_eq!(check_start(&bytes[..10]), Err(PreambleError::Version(9)));
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version(9)));
    }
}
