//! The greeting: what the two sides say of themselves, and what a source says that comes back. Whether they fit is
//! decided by [`negotiate`](super::negotiate).

use super::codec::{Reader, Writer};
use super::{DecodeError, MigrationKey, speaks_ours};
use crate::pages::digest::Digest;
use crate::pages::memory::{Layout, MAX_REGIONS, PageRange, RegionLayout};

/// Most bytes of the description a host may send along with the greeting.
pub const MAX_DESCRIPTION_BYTES: usize = 64 << 10;
/// Most bytes of a machine's description of its device state.
pub const MAX_STATE_SCHEMA_BYTES: usize = 256 << 10;

const MAGIC: [u8; 8] = *b"PGFERRY\n";

/// Type, magic and version range, which every hello begins with.
pub(super) const START_BYTES: usize = 2 + MAGIC.len() + 2 + 2;
/// Page size, channels, flags, key and the number of regions.
const FIXED_BYTES: usize = 4 + 2 + 1 + 16 + 32 + 4;
const REGION_BYTES: usize = 3 * 8;

/// Most bytes of a hello, as a message.
pub const MAX_HELLO_BYTES: usize = START_BYTES
    + FIXED_BYTES
    + MAX_REGIONS * REGION_BYTES
    + 4
    + MAX_DESCRIPTION_BYTES
    + 4
    + MAX_STATE_SCHEMA_BYTES;

const FLAG_VERIFY: u8 = 1;
const FLAG_TRIAL: u8 = 2;
const FLAG_REJOINS: u8 = 4;
const FLAG_PAGE_SUMS: u8 = 8;

/// The source's greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent wishes")]
pub struct Hello {
    /// Oldest protocol version it speaks.
    pub oldest_version: u16,
    /// Newest protocol version it speaks.
    pub newest_version: u16,
    /// Page size of dirty tracking and transfer, in bytes.
    pub page_bytes: u32,
    /// Data channels wanted.
    pub channels: u16,
    /// Whether memory is to be compared by digest before the commit.
    pub verify: bool,
    /// Whether the guest stays at the source: it is only asked whether it could come, and what that would be
    /// like. What is sent is of no use.
    pub trial: bool,
    /// Whether the source comes back when the link is lost.
    pub rejoins: bool,
    /// Whether both sides keep checksums of pages, which are compared before the commit.
    pub page_sums: bool,
    /// By which it is known then.
    pub key: MigrationKey,
    /// The guest's memory map.
    pub layout: Layout,
    /// What the source's VMM tells the destination's: how to build the machine. Opaque here.
    pub description: Vec<u8>,
    /// What the source's machine says of the device state it will save. Opaque here.
    pub state_schema: Vec<u8>,
}

/// The destination's answer to the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// The protocol version both will speak from now on.
    pub version: u16,
    /// Data channels agreed on: as wanted.
    pub channels: u16,
    /// Whether destination memory is all zero, so that zero pages need not be sent.
    pub memory_zeroed: bool,
    /// Whether the source is to say where there may be data ([`Message::DataRanges`](super::Message::DataRanges)).
    pub wants_data_ranges: bool,
    /// Whether the destination waits for a source whose link is lost.
    pub rejoins: bool,
    /// The digest of the greeting as the destination knows it: of the hello it heard, and of this
    /// answer, in which this digest itself is zero ([`Welcome::to`]).
    pub greeting: Digest,
}

/// The source's first word on each link after the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejoin {
    /// Oldest protocol version it speaks.
    pub oldest_version: u16,
    /// Newest protocol version it speaks.
    pub newest_version: u16,
    /// Of the greeting.
    pub key: MigrationKey,
    /// Number of the link, from 1; the first one of the migration is 0. It only grows.
    pub epoch: u32,
    /// Rounds that came to their end.
    pub rounds: u32,
    /// Switchovers so far. All of them are called off, unless the source has committed: then all but the last.
    pub switchovers: u32,
    /// Whether the source has committed: what became of the guest?
    pub committed: bool,
}

/// The destination's answer: nothing that came on an earlier link lands any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejoined {
    /// As asked.
    pub epoch: u32,
    /// Pages that a load of device state may have written, of a switchover that is called off by the source's return.
    /// At most [`MAX_DATA_RANGES`](super::MAX_DATA_RANGES).
    pub written: Vec<PageRange>,
}

/// What every first word of a source begins with. Magic and version range stay where they are in every version to
/// come.
fn encode_start(oldest_version: u16, newest_version: u16, w: &mut Writer) {
    w.array(&MAGIC);
    w.u16(oldest_version);
    w.u16(newest_version);
}

/// The version range.
fn decode_start(r: &mut Reader<'_>) -> Result<(u16, u16), DecodeError> {
    let magic = r.array("magic")?;
    if magic != MAGIC {
        return Err(DecodeError::BadMagic(magic));
    }
    let (oldest, newest) = (r.u16("oldest_version")?, r.u16("newest_version")?);
    if !speaks_ours(oldest, newest) {
        // What follows is laid out in a way we do not know.
        return Err(DecodeError::Version { oldest, newest });
    }
    Ok((oldest, newest))
}

impl Hello {
    pub(super) fn encode(&self, w: &mut Writer) {
        encode_start(self.oldest_version, self.newest_version, w);
        w.u32(self.page_bytes);
        w.u16(self.channels);
        w.u8((u8::from(self.verify) * FLAG_VERIFY)
            | (u8::from(self.trial) * FLAG_TRIAL)
            | (u8::from(self.rejoins) * FLAG_REJOINS)
            | (u8::from(self.page_sums) * FLAG_PAGE_SUMS));
        self.key.encode(w);
        let regions = self.layout.regions();
        w.u32(u32::try_from(regions.len()).unwrap_or(u32::MAX));
        for region in regions {
            w.u64(region.guest_addr);
            w.u64(region.len_bytes);
            w.u64(region.backing_page_bytes);
        }
        w.bytes(&self.description, MAX_DESCRIPTION_BYTES);
        w.bytes(&self.state_schema, MAX_STATE_SCHEMA_BYTES);
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (oldest_version, newest_version) = decode_start(r)?;
        let page_bytes = r.u32("page_bytes")?;
        let channels = r.u16("channels")?;
        let flags = r.u8("flags")?;
        if flags & !(FLAG_VERIFY | FLAG_TRIAL | FLAG_REJOINS | FLAG_PAGE_SUMS) != 0 {
            return Err(DecodeError::UnknownValue { field: "flags", value: u64::from(flags) });
        }
        let key = MigrationKey::decode(r)?;
        let regions = (0..r.count(MAX_REGIONS, "regions")?)
            .map(|_| {
                Ok(RegionLayout {
                    guest_addr: r.u64("guest_addr")?,
                    len_bytes: r.u64("len_bytes")?,
                    backing_page_bytes: r.u64("backing_page_bytes")?,
                })
            })
            .collect::<Result<Vec<_>, DecodeError>>()?;
        let description = r.bytes(MAX_DESCRIPTION_BYTES, "description")?.to_vec();
        let state_schema = r.bytes(MAX_STATE_SCHEMA_BYTES, "state_schema")?.to_vec();
        Ok(Self {
            oldest_version,
            newest_version,
            page_bytes,
            channels,
            verify: flags & FLAG_VERIFY != 0,
            trial: flags & FLAG_TRIAL != 0,
            rejoins: flags & FLAG_REJOINS != 0,
            page_sums: flags & FLAG_PAGE_SUMS != 0,
            key,
            layout: Layout::new(regions)?,
            description,
            state_schema,
        })
    }
}

impl Rejoin {
    pub(super) fn encode(&self, w: &mut Writer) {
        encode_start(self.oldest_version, self.newest_version, w);
        self.key.encode(w);
        w.u32(self.epoch);
        w.u32(self.rounds);
        w.u32(self.switchovers);
        w.u8(u8::from(self.committed));
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (oldest_version, newest_version) = decode_start(r)?;
        Ok(Self {
            oldest_version,
            newest_version,
            key: MigrationKey::decode(r)?,
            epoch: r.u32("epoch")?,
            rounds: r.u32("rounds")?,
            switchovers: r.u32("switchovers")?,
            committed: r.bool("committed")?,
        })
    }
}

impl Welcome {
    pub(super) fn encode(&self, w: &mut Writer) {
        w.u16(self.version);
        w.u16(self.channels);
        w.u8(u8::from(self.memory_zeroed));
        w.u8(u8::from(self.wants_data_ranges));
        w.u8(u8::from(self.rejoins));
        w.array(&self.greeting.0);
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            version: r.u16("version")?,
            channels: r.u16("channels")?,
            memory_zeroed: r.bool("memory_zeroed")?,
            wants_data_ranges: r.bool("wants_data_ranges")?,
            rejoins: r.bool("rejoins")?,
            greeting: Digest(r.array("greeting")?),
        })
    }
}
