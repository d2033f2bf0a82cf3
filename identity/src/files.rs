//! A destination's files, read again where they have changed.

use std::time::{Duration, SystemTime};

use crate::config::ServerTls;
use crate::security::{Material, Stamp, Tls};

/// What a destination shows and asks for, as its files say it now.
#[derive(Debug)]
pub struct ServerFiles {
    tls: Tls,
    kept: Option<Kept>,
}

impl ServerFiles {
    /// Of these settings. Reads nothing yet.
    pub fn new(tls: Tls) -> Self {
        Self { tls, kept: None }
    }

    /// What they say. Reads them if they have changed, or could not be read before; what fails is for who has set it up
    /// so.
    pub fn current(&mut self) -> Result<ServerTls, String> {
        let stamps: Vec<_> = self.tls.identity.materials().map(Material::stamp).collect();
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.holds(&stamps)) {
            return kept.loaded.clone();
        }
        let (read, loaded) = (SystemTime::now(), ServerTls::load(&self.tls));
        self.kept.insert(Kept { loaded, stamps, read }).loaded.clone()
    }
}

#[derive(Debug)]
struct Kept {
    loaded: Result<ServerTls, String>,
    /// What the files were like.
    stamps: Vec<Option<Stamp>>,
    /// When they were read.
    read: SystemTime,
}

impl Kept {
    /// Whether it is what would be read now. A file that was written just before may have been written again since, with
    /// the same time.
    fn holds(&self, stamps: &[Option<Stamp>]) -> bool {
        const TICK: Duration = Duration::from_secs(1);
        let settled = |stamp: &Stamp| stamp.changed + TICK < self.read;
        // What failed may do so no longer, whatever the files are like.
        self.loaded.is_ok() && self.stamps == stamps && stamps.iter().flatten().all(settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::{Identity, Material};

    /// Read then, of files that were changed so long before.
    fn kept(before: &[Duration]) -> (Kept, Vec<Option<Stamp>>) {
        let read = SystemTime::now();
        let stamps: Vec<_> =
            before.iter().map(|before| Some(Stamp::of((1, 2, 3), read - *before))).collect();
        let tls = Tls::new(Identity::SharedKey(Material::bytes([7; 32])));
        (Kept { loaded: ServerTls::load(&tls), stamps: stamps.clone(), read }, stamps)
    }

    #[test]
    fn what_was_read_holds_until_a_file_has_changed() {
        let (long, moment) = (Duration::from_secs(60), Duration::from_millis(10));
        let (old, stamps) = kept(&[long, long]);
        assert!(old.holds(&stamps));
        let other = |file| vec![stamps[0].clone(), Some(Stamp::of(file, old.read - long))];
        for file in [(9, 2, 3), (1, 9, 3), (1, 2, 9)] {
            assert!(!old.holds(&other(file)), "{file:?}");
        }
        let later = vec![stamps[0].clone(), Some(Stamp::of((1, 2, 3), old.read - moment))];
        assert!(!old.holds(&later), "written again");
        assert!(!old.holds(&[stamps[0].clone(), None]), "gone");
        let (fresh, stamps) = kept(&[long, moment]);
        assert!(!fresh.holds(&stamps), "it may have been written again within a tick");
        let (failed, stamps) = kept(&[long]);
        assert!(!Kept { loaded: Err("no descriptor".to_owned()), ..failed }.holds(&stamps));
    }
}
