//! The saved state of a guest: everything of it that is not memory, as bytes.
//!
//! ```text
//! 8 bytes  magic
//! 2 bytes  version, little endian
//! rest     postcard of GuestState
//! ```
//!
//! It is meant for the same version of this VMM at the other end. Whatever the bytes are, decoding
//! them ends in a state or in an error.

use serde::{Deserialize, Serialize};

use crate::heartbeat::HeartbeatSnapshot;
use crate::kvm::state::KvmState;
use crate::process::ProcessState;
use crate::serial::SerialRegisters;

const MAGIC: [u8; 8] = *b"PFVMSTAT";
const VERSION: u16 = 1;

/// Why a saved state can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes are something else.
    #[error("failed to load the guest's state: {len_bytes} bytes that are no state of this VMM")]
    NotAState {
        /// How many.
        len_bytes: usize,
    },
    /// The state is of another version.
    #[error("failed to load the guest's state: version {found}, this VMM reads {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// The bytes are damaged.
    #[error("failed to load the guest's state: {0}")]
    Decode(postcard::Error),
    /// The bytes decode to something they are not the encoding of.
    #[error("failed to load the guest's state: malformed fields")]
    Malformed,
    /// The state could not be encoded.
    #[error("failed to save the guest's state: {0}")]
    Encode(postcard::Error),
    /// The state is of a guest unlike this one.
    #[error("failed to load the guest's state: {what} is {found}, this guest's is {expected}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// As saved.
        found: String,
        /// As configured here.
        expected: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GuestState {
    pub(crate) heartbeat: HeartbeatSnapshot,
    pub(crate) serial: SerialRegisters,
    pub(crate) machine: MachineState,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum MachineState {
    Kvm(Box<KvmState>),
    Process(ProcessState),
}

impl GuestState {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StateError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        postcard::to_extend(self, bytes).map_err(StateError::Encode)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let not_a_state = StateError::NotAState { len_bytes: bytes.len() };
        let Some(rest) = bytes.strip_prefix(&MAGIC) else { return Err(not_a_state) };
        let Some((version, body)) = rest.split_first_chunk() else { return Err(not_a_state) };
        let found = u16::from_le_bytes(*version);
        if found != VERSION {
            return Err(StateError::Version { found });
        }
        let state: Self = postcard::from_bytes(body).map_err(StateError::Decode)?;
        // KVM's structures take short and long encodings alike, and trailing bytes go unnoticed:
        // only the bytes this state would be saved as are taken.
        if state.encode()? == bytes { Ok(state) } else { Err(StateError::Malformed) }
    }
}
