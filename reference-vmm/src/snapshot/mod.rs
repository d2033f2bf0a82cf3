//! A paused guest in a file: what it is made of, its device state and its memory.
//!
//! ```text
//!  0          8          10    12       16       20       28
//! ┌──────────┬──────────┬─────┬────────┬────────┬────────┬────────┬────────┬────────┬─────────┐
//! │ magic    │ format=2 │ 0   │ config │ schema │ state  │ config │ schema │ state  │ digest  │
//! │ 8 bytes  │ u16      │ u16 │ u32 len│ u32 len│ u64 len│ JSON   │ JSON   │ stream │ 16 bytes│
//! ├──────────┴──────────┴─────┴────────┴──┬─────┴────────┴────────┴──┬─────┴────────┴─────────┘
//! │ records                               │ digest, 16 bytes         │
//! └───────────────────────────────────────┴──────────────────────────┘
//! magic "PFVMSNAP"; records: guest address u64, length u64, so many bytes of memory; memory in no
//! record is zero. A record of length 0 ends them. Digests: 128 bits of XXH3 over all bytes of the
//! file before them.
//! ```
//!
//! Integers are little-endian. The schema is that of the program that saved, so that the state can
//! be printed with names by any other. Nothing before the first digest is believed until that has
//! been compared, and no guest is given out until the last has. Digests find damage; against
//! someone who forges a file they are no help.

mod access;
mod new_file;
mod summed;

use std::io::{self, Read, Write};

use pageferry_device_state::Schema;
use pageferry_device_state::schema::{Compatibility, MAX_SCHEMA_BYTES, SchemaError, Verdict};
use pageferry_rust_vmm::time::Meanwhile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::GuestError;
use crate::guest::{Guest, GuestConfig};
use crate::ram::{Backing, GuestRam};

pub use new_file::{Fate, NewFile};

use summed::Summed;

/// First bytes of a file.
pub const MAGIC: [u8; 8] = *b"PFVMSNAP";

const FORMAT: u16 = 2;
const DIGEST_BYTES: usize = 16;
const MAX_CONFIG_BYTES: u32 = 64 << 10;
const MAX_STATE_BYTES: u64 = 256 << 20;
/// Memory is read and written in pieces of this length.
const PIECE_BYTES: u64 = 64 << 10;

/// Why a guest could not be saved to a file or restored from one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The file could not be read or written. "No space left on device" is one of these.
    #[error("failed to {operation} the file")]
    Io {
        /// "read", "create" or "write".
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Somebody called the writing off ([`Fate`]).
    #[error("failed to write the file: interrupted")]
    CalledOff,
    /// The file is something else, or damaged.
    #[error("failed to read the file: {0}")]
    Malformed(&'static str),
    /// The file was written by a program of another age.
    #[error("failed to read the file: it has format {found}, this program reads format {FORMAT}")]
    Format {
        /// What the file says.
        found: u16,
    },
    /// A digest is not that of the bytes before it.
    #[error("failed to read the file: its {part} is damaged, the checksum does not fit")]
    Damaged {
        /// Which.
        part: &'static str,
    },
    /// A part of the file is longer than any that was written.
    #[error("failed to read the file: its {part} has {found} bytes, at most {max} are read")]
    TooLong {
        /// Which.
        part: &'static str,
        /// What the file says.
        found: u64,
        /// What is possible.
        max: u64,
    },
    /// The description of the guest makes no sense.
    #[error("failed to read what the guest is made of")]
    Config(#[from] serde_json::Error),
    /// The schema makes no sense.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The state is of a program that this one does not understand.
    #[error("failed to restore the guest: its device state {0}")]
    Incompatible(Compatibility),
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// How much was written or read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Device state.
    pub state_bytes: u64,
    /// Memory that is not zero, and so is in the file.
    pub memory_bytes: u64,
}

/// A file without its memory.
#[derive(Debug)]
pub struct Header {
    /// What the guest is made of.
    pub config: GuestConfig,
    /// What the program that saved it could save.
    pub schema: Schema,
    /// Its device state.
    pub state: Vec<u8>,
}

fn reading(source: io::Error) -> SnapshotError {
    if source.kind() == io::ErrorKind::UnexpectedEof {
        SnapshotError::Malformed("it ends too early")
    } else {
        SnapshotError::Io { operation: "read", source }
    }
}

fn writing(source: io::Error) -> SnapshotError {
    SnapshotError::Io { operation: "write", source }
}

/// A paused guest, as a file will have it. It shares the guest's memory and not the guest: who has to
/// leave the writing of it to itself has the guest all the same.
#[derive(Debug)]
pub struct Snapshot {
    config: Vec<u8>,
    schema: String,
    state: Vec<u8>,
    ram: GuestRam,
}

impl Snapshot {
    /// Takes it. The guest stays as it is: whatever happens here, it can be resumed, and what is written
    /// after that is no guest.
    pub fn of(guest: &mut Guest) -> Result<Self, SnapshotError> {
        Ok(Self {
            config: serde_json::to_vec(guest.config())?,
            schema: guest.schema()?.to_json(),
            state: guest.save()?,
            ram: guest.ram().clone(),
        })
    }

    /// Writes it, unless that is called off meanwhile.
    pub fn write(&self, out: &mut impl Write, fate: &Fate) -> Result<Written, SnapshotError> {
        let Self { config, schema, state, ram } = self;
        let mut written = Written { state_bytes: state.len() as u64, memory_bytes: 0 };
        let mut out = Summed::new(out);
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(writing);
        put(&MAGIC)?;
        put(&FORMAT.to_le_bytes())?;
        put(&[0; 2])?;
        for part in [config, schema.as_bytes()] {
            put(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes())?;
        }
        put(&written.state_bytes.to_le_bytes())?;
        for part in [config, schema.as_bytes(), state] {
            put(part)?;
        }
        let digest = out.digest();
        out.write_all(&digest).map_err(writing)?;
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(writing);
        let mut piece = vec![0; usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX)];
        for region in ram.memory().iter() {
            let (begin, len_bytes) = (region.start_addr().0, region.len());
            for address in (begin..begin + len_bytes).step_by(piece.len()) {
                if fate.is_decided() {
                    return Err(SnapshotError::CalledOff);
                }
                let len_bytes = PIECE_BYTES.min(begin + len_bytes - address);
                let piece = &mut piece[..usize::try_from(len_bytes).unwrap_or(usize::MAX)];
                ram.memory()
                    .read_slice(piece, GuestAddress(address))
                    .map_err(GuestError::Memory)?;
                if piece.iter().any(|byte| *byte != 0) {
                    put(&address.to_le_bytes())?;
                    put(&len_bytes.to_le_bytes())?;
                    put(piece)?;
                    written.memory_bytes += len_bytes;
                }
            }
        }
        put(&[0; 16])?;
        let digest = out.digest();
        out.write_all(&digest).and_then(|()| out.flush()).map_err(writing)?;
        Ok(written)
    }
}

/// Reads everything before the memory. The bytes may be anything.
pub fn read_header(input: &mut impl Read) -> Result<Header, SnapshotError> {
    header(&mut Summed::new(input))
}

fn header(input: &mut Summed<impl Read>) -> Result<Header, SnapshotError> {
    if array(input)? != MAGIC {
        return Err(SnapshotError::Malformed("it holds no guest"));
    }
    let found = u16::from_le_bytes(array(input)?);
    if found != FORMAT {
        return Err(SnapshotError::Format { found });
    }
    if array::<2>(input)? != [0; 2] {
        return Err(SnapshotError::Damaged { part: "beginning" });
    }
    let config = u32::from_le_bytes(array(input)?);
    let schema = u32::from_le_bytes(array(input)?);
    let state = u64::from_le_bytes(array(input)?);
    let config = part(input, "description", config.into(), MAX_CONFIG_BYTES.into())?;
    let schema = part(input, "schema", schema.into(), MAX_SCHEMA_BYTES as u64)?;
    let state = part(input, "device state", state, MAX_STATE_BYTES)?;
    compare(input, "description or device state")?;
    let (config, schema) = (serde_json::from_slice(&config)?, Schema::from_json(&schema)?);
    Ok(Header { config, schema, state })
}

/// Makes the guest that a file holds. It is paused, and every byte of the file has been checked.
/// Its memory is backed as told.
pub fn restore(
    input: &mut impl Read,
    backing: Backing,
    meanwhile: Meanwhile,
) -> Result<(Guest, Written), SnapshotError> {
    let mut input = Summed::new(input);
    let Header { mut config, schema, state } = header(&mut input)?;
    config.backing = backing;
    let mut guest = Guest::create(config)?;
    guest.set_meanwhile(meanwhile);
    let compatibility = guest.schema()?.reads(&schema);
    if compatibility.verdict() == Verdict::Fails {
        return Err(SnapshotError::Incompatible(compatibility));
    }
    let memory_bytes = read_memory(&guest, &mut input)?;
    guest.load(&state)?;
    Ok((guest, Written { state_bytes: state.len() as u64, memory_bytes }))
}

fn read_memory(guest: &Guest, input: &mut Summed<impl Read>) -> Result<u64, SnapshotError> {
    let memory = guest.ram().memory();
    let mut total_bytes = 0;
    let mut piece = Vec::new();
    loop {
        let address = u64::from_le_bytes(array(input)?);
        let len_bytes = u64::from_le_bytes(array(input)?);
        if len_bytes == 0 {
            break;
        }
        if len_bytes > PIECE_BYTES {
            let (part, found, max) = ("piece of memory", len_bytes, PIECE_BYTES);
            return Err(SnapshotError::TooLong { part, found, max });
        }
        piece.resize(usize::try_from(len_bytes).unwrap_or(usize::MAX), 0);
        input.read_exact(&mut piece).map_err(reading)?;
        memory
            .write_slice(&piece, GuestAddress(address))
            .map_err(|_| SnapshotError::Malformed("it has memory that its guest does not have"))?;
        total_bytes += len_bytes;
    }
    compare(input, "memory")?;
    match input.read(&mut [0]).map_err(reading)? {
        0 => Ok(total_bytes),
        _ => Err(SnapshotError::Malformed("it goes on after its end")),
    }
}

/// Reads a digest, which must be that of all before it.
fn compare(input: &mut Summed<impl Read>, part: &'static str) -> Result<(), SnapshotError> {
    let digest = input.digest();
    if array::<DIGEST_BYTES>(input)? == digest {
        Ok(())
    } else {
        Err(SnapshotError::Damaged { part })
    }
}

fn array<const N: usize>(input: &mut impl Read) -> Result<[u8; N], SnapshotError> {
    let mut array = [0; N];
    input.read_exact(&mut array).map_err(reading)?;
    Ok(array)
}

/// So many bytes. Memory is taken as they come.
fn part(
    input: &mut impl Read,
    part: &'static str,
    found: u64,
    max: u64,
) -> Result<Vec<u8>, SnapshotError> {
    if found > max {
        return Err(SnapshotError::TooLong { part, found, max });
    }
    let mut bytes = Vec::new();
    input.take(found).read_to_end(&mut bytes).map_err(reading)?;
    if bytes.len() as u64 == found {
        Ok(bytes)
    } else {
        Err(SnapshotError::Malformed("it ends too early"))
    }
}
