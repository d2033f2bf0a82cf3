//! What a source shows to come back to its migration.

use std::fmt;
use std::io;

use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::DecodeError;
use super::codec::{Reader, Writer};

/// Bytes of a migration's secret.
const SECRET_BYTES: usize = 32;

/// Names one migration: random, made by the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

/// The name of a migration, and a secret by which its source is known again: it is in the greeting, and in what
/// the source says on each later link. Who reads the first link in plain text has it.
///
/// The secret is in no log, and overwritten when it is dropped.
#[derive(Clone)]
pub struct MigrationKey {
    /// Which migration.
    pub id: MigrationId,
    secret: Zeroizing<[u8; SECRET_BYTES]>,
}

impl MigrationKey {
    /// A fresh one, from the operating system's randomness.
    pub fn random() -> io::Result<Self> {
        let (mut id, mut secret) = ([0; 16], Zeroizing::new([0; SECRET_BYTES]));
        getrandom::fill(&mut id)
            .and_then(|()| getrandom::fill(&mut *secret))
            .map_err(io::Error::other)?;
        Ok(Self { id: MigrationId(id), secret })
    }

    /// One that everybody knows.
    #[cfg(any(test, feature = "test-support"))]
    pub fn of_a_test() -> Self {
        Self { id: MigrationId([7; 16]), secret: Zeroizing::new([9; SECRET_BYTES]) }
    }

    pub(super) fn encode(&self, w: &mut Writer) {
        w.array(&self.id.0);
        w.array(&*self.secret);
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            id: MigrationId(r.array("migration")?),
            secret: Zeroizing::new(r.array("secret")?),
        })
    }
}

/// Takes as long whichever bytes of the secret differ.
impl PartialEq for MigrationKey {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && bool::from(self.secret.ct_eq(&*other.secret))
    }
}

impl Eq for MigrationKey {}

impl fmt::Debug for MigrationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MigrationKey").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_secret_and_does_not_tell_it() {
        let (key, other) = (MigrationKey::random().unwrap(), MigrationKey::random().unwrap());
        assert_eq!(key, key.clone());
        assert_ne!(key, other);
        let namesake = MigrationKey { id: key.id, ..other };
        assert_ne!(key, namesake);
        let told = format!("{key:?}");
        assert_eq!(told, format!("{namesake:?}"));
        assert!(told.contains(&key.id.to_string()), "{told}");
    }
}
