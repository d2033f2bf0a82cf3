//! Names of sections and subsections.

use crate::error::{DecodeError, Problem};

/// Longest name of a section or subsection.
pub const MAX_NAME_BYTES: usize = 64;

/// The bytes as the name of a section or subsection.
pub(crate) fn check_name(bytes: &[u8], at: u64) -> Result<&str, DecodeError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if is_name(name) => Ok(name),
        _ => {
            let head = &bytes[..bytes.len().min(MAX_NAME_BYTES)];
            let found = String::from_utf8_lossy(head).into_owned();
            Err(DecodeError::new(at, Problem::Name { found }))
        }
    }
}

/// Whether that can be the name of a section or subsection: short, and harmless in a terminal.
pub(crate) fn is_name(name: &str) -> bool {
    let fits =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_./".contains(&byte);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits)
}
