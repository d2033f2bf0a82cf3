//! One section, without a machine around it.

use crate::declare::Section;
use crate::error::{DecodeError, EncodeError, Problem};
use crate::stream::{StreamWriter, sections};

/// A stream with one section, instance 0: the state, encoded. Its hooks may change it.
pub fn to_bytes<S: Section>(state: &mut S) -> Result<Vec<u8>, EncodeError> {
    let mut writer = StreamWriter::new();
    writer.state(0, state)?;
    Ok(writer.finish())
}

/// The state back. The stream must have that section and no other.
pub fn from_bytes<S: Section>(stream: &[u8]) -> Result<S, DecodeError> {
    let sections = sections(stream)?;
    let [section] = sections.as_slice() else {
        let found = sections.len() as u64;
        return Err(DecodeError::new(0, Problem::SectionCount { found }));
    };
    section.state()
}
