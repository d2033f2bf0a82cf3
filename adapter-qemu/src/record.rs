//! Who has a guest, in a file that outlives the program.
//!
//! A program that is killed tells nobody how far it has come, and QEMU does not know: it stands still, at one side
//! or at both. So each side writes how it stands before it changes: the source before it says *commit*, the
//! destination before it lets the guest run.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pageferry::machine::{GuestAlarm, Machine, MachineError, Rehearsal};
use pageferry::memory::PageRange;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::quota::Before;

/// Of the file's contents; it changes when a reader of before would misunderstand.
const SCHEMA: u32 = 1;
/// More than any record has.
const MOST_BYTES: usize = 64 << 10;

/// How a side stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// At the source: no commit has gone out. The guest is here.
    Here,
    /// At the source: the commit may have gone out. Whether it came is known at the destination.
    GivingUp,
    /// At the source: the destination has said that the guest runs there.
    Gone,
    /// At the destination: no commit has come. The guest is at the source.
    Awaited,
    /// At the destination: the commit has come. The guest is here.
    Taken,
}

impl fmt::Display for Standing {
    /// As it is in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Here => "here",
            Self::GivingUp => "giving-up",
            Self::Gone => "gone",
            Self::Awaited => "awaited",
            Self::Taken => "taken",
        })
    }
}

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    schema: u32,
    /// How this side stands.
    pub standing: Standing,
    /// The other side's address, as far as it is known.
    pub peer: Option<String>,
    /// Files that this side made for the guest's RAM.
    pub made: Vec<PathBuf>,
    /// What a guest that was slowed down is to be given back.
    #[serde(default)]
    pub slowed: Vec<Before>,
}

impl Record {
    /// As it stands at the beginning.
    pub fn new(standing: Standing, peer: Option<String>, made: Vec<PathBuf>) -> Self {
        Self { schema: SCHEMA, standing, peer, made, slowed: Vec::new() }
    }
}

/// Why there is no record.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The file could not be used.
    #[error("failed to {operation} the record of the migration, {}", .path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A program of ours has it.
    #[error("{} is in use: another pageferry-qemu is at work on this guest", .path.display())]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// A migration that came before has left it.
    #[error(
        "a migration of this guest was broken off ({standing} in {}): see `pageferry-qemu recover --qmp {}`",
        .path.display(), .monitor.display()
    )]
    LeftOver {
        /// Its path.
        path: PathBuf,
        /// The monitor that it is beside.
        monitor: PathBuf,
        /// How that side stood.
        standing: Standing,
    },
    /// It is no record.
    #[error("{} is no record of a migration: {why}", .path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// The file of a record, beside the monitor of a QEMU. It is locked: two programs do not move one guest.
///
/// # Thread safety
///
/// `Send` and `Sync`; changes are written one after the other.
///
/// # Resource cleanup
///
/// Whoever has it to its end knows where the guest is: dropping it removes the file, unless it was to be
/// [left](Self::leave).
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    file: File,
    record: Mutex<Record>,
    stays: bool,
}

impl RecordFile {
    /// Of a migration that begins. What an earlier one has left is refused, unless nothing was under way in it.
    pub fn create(monitor: &Path, record: Record) -> Result<Self, RecordError> {
        let path = beside(monitor);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(failed("make", &path))?;
        lock(&file, &path)?;
        match read(&file, &path)? {
            // Who was killed before the guest was given up, or before there was one, has left nothing to decide.
            None | Some(Record { standing: Standing::Here | Standing::Awaited, .. }) => {}
            Some(Record { standing, .. }) => {
                let monitor = monitor.to_owned();
                return Err(RecordError::LeftOver { path, monitor, standing });
            }
        }
        let begun = Self { path, file, record: Mutex::new(record), stays: false };
        begun.change(|_| {})?;
        Ok(begun)
    }

    /// What a migration has left, if any has; it stays.
    pub fn left(monitor: &Path) -> Result<Option<Self>, RecordError> {
        let path = beside(monitor);
        let file = match File::options().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(failed("open", &path))?,
        };
        lock(&file, &path)?;
        let record = read(&file, &path)?;
        Ok(record.map(|record| Self { path, file, record: Mutex::new(record), stays: true }))
    }

    /// The error for who wants to begin a migration nevertheless.
    pub fn left_over(&self, monitor: &Path) -> RecordError {
        let (path, monitor) = (self.path.clone(), monitor.to_owned());
        RecordError::LeftOver { path, monitor, standing: self.record().standing }
    }

    /// What it says.
    pub fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes down how this side stands. It is on the disk when this returns.
    pub fn stand(&self, standing: Standing) -> Result<(), RecordError> {
        self.change(|record| record.standing = standing)
    }

    /// Something is left to decide.
    pub fn leave(mut self) {
        self.stays = true;
    }

    /// Nothing is. Somebody may have removed it already.
    pub fn remove(mut self) -> Result<(), RecordError> {
        self.stays = true;
        unlink(&self.path).map_err(failed("remove", &self.path))
    }

    fn change(&self, change: impl FnOnce(&mut Record)) -> Result<(), RecordError> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = record.clone();
        change(&mut changed);
        let mut line = serde_json::to_vec(&changed).map_err(|why| RecordError::Malformed {
            path: self.path.clone(),
            why: why.to_string(),
        })?;
        line.push(b'\n');
        // With one call; what follows the line, of one that was longer, is not read.
        let written = self.file.write_all_at(&line, 0).and_then(|()| self.file.sync_data());
        written.map_err(failed("write", &self.path))?;
        *record = changed;
        Ok(())
    }
}

impl Drop for RecordFile {
    fn drop(&mut self) {
        if !self.stays
            && let Err(error) = unlink(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "a record of a migration is left");
        }
    }
}

/// Removes a file that may be gone already.
pub fn unlink(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Where the record is of a QEMU with that monitor.
fn beside(monitor: &Path) -> PathBuf {
    let mut path = OsString::from(monitor);
    path.push(".migration");
    path.into()
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |cause| RecordError::File { operation, path, cause }
}

fn lock(file: &File, path: &Path) -> Result<(), RecordError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(RecordError::InUse { path: path.to_owned() }),
        Err(error) => Err(failed("lock", path)(error.into())),
    }
}

/// `None` if it is empty: whoever made it was killed before it wrote.
fn read(file: &File, path: &Path) -> Result<Option<Record>, RecordError> {
    let mut bytes = vec![0; MOST_BYTES];
    let read = file.read_at(&mut bytes, 0).map_err(failed("read", path))?;
    if read == 0 {
        return Ok(None);
    }
    let malformed = |why: String| RecordError::Malformed { path: path.to_owned(), why };
    let line = bytes[..read].split(|byte| *byte == b'\n').next().unwrap_or_default();
    let record: Record =
        serde_json::from_slice(line).map_err(|error| malformed(error.to_string()))?;
    if record.schema != SCHEMA {
        return Err(malformed(format!("its schema is {}, and not {SCHEMA}", record.schema)));
    }
    Ok(Some(record))
}

/// A machine whose standing is written down as it changes.
#[derive(Debug)]
pub struct Recorded<M> {
    /// The machine.
    pub machine: M,
    /// Where it is written down.
    pub file: RecordFile,
    is_source: bool,
}

impl<M> Recorded<M> {
    /// At the source.
    pub fn source(machine: M, file: RecordFile) -> Self {
        Self { machine, file, is_source: true }
    }

    /// At the destination.
    pub fn destination(machine: M, file: RecordFile) -> Self {
        Self { machine, file, is_source: false }
    }
}

impl<M: Machine> Machine for Recorded<M> {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.machine.pause()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.machine.save(state)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.machine.load(state)
    }

    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        self.machine.written_by_load()
    }

    fn unload(&mut self) -> Result<(), MachineError> {
        self.machine.unload()
    }

    /// Called before the commit, and by a destination that gives the guest back.
    fn release_resources(&mut self) -> Result<(), MachineError> {
        if self.is_source {
            self.file.stand(Standing::GivingUp)?;
            return self.machine.release_resources();
        }
        self.machine.release_resources()?;
        Ok(self.file.stand(Standing::Awaited)?)
    }

    /// Called once the commit has come, and by a source that has the guest back.
    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        if !self.is_source {
            self.file.stand(Standing::Taken)?;
        } else if let Err(error) = self.file.stand(Standing::Here) {
            // It has the guest, whether that can be written down or not.
            tracing::warn!(%error, "the record of the migration does not say that the guest is here");
        }
        self.machine.reacquire_resources()
    }

    fn set_alarm(&mut self, alarm: GuestAlarm) {
        self.machine.set_alarm(alarm);
    }

    fn rehearse(&mut self) -> Result<Option<Rehearsal>, MachineError> {
        self.machine.rehearse()
    }

    fn throttle(&mut self, percent: u8) -> bool {
        self.machine.throttle(percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let monitor = folder.path().join("vm.qmp");
        (folder, monitor)
    }

    #[test]
    fn what_was_written_last_is_what_is_left() {
        let (_folder, monitor) = monitor();
        assert!(RecordFile::left(&monitor).unwrap().is_none());
        let long = Record::new(Standing::Here, Some("a".repeat(1000)), vec!["/ram".into()]);
        let file = RecordFile::create(&monitor, long.clone()).unwrap();
        file.stand(Standing::GivingUp).unwrap();
        file.leave();
        let left = RecordFile::left(&monitor).unwrap().unwrap();
        assert_eq!(left.record(), Record { standing: Standing::GivingUp, ..long });
        // A shorter one hides all of it.
        left.change(|record| record.peer = None).unwrap();
        drop(left);
        let left = RecordFile::left(&monitor).unwrap().unwrap();
        assert_eq!(left.record().peer, None);
        left.remove().unwrap();
        assert!(RecordFile::left(&monitor).unwrap().is_none());
        // Nothing is left to decide of a migration that came to its end.
        drop(RecordFile::create(&monitor, Record::new(Standing::Here, None, Vec::new())).unwrap());
        assert!(!beside(&monitor).exists());
    }

    #[test]
    fn a_standing_is_shown_as_it_is_in_the_file() {
        use Standing::{Awaited, GivingUp, Gone, Here, Taken};
        for standing in [Here, GivingUp, Gone, Awaited, Taken] {
            assert_eq!(serde_json::to_value(standing).unwrap(), standing.to_string());
        }
    }

    #[test]
    fn a_guest_is_moved_by_one_program_at_a_time() {
        let (_folder, monitor) = monitor();
        let record = Record::new(Standing::Here, None, Vec::new());
        let _file = RecordFile::create(&monitor, record.clone()).unwrap();
        let again = RecordFile::create(&monitor, record).unwrap_err();
        assert!(matches!(again, RecordError::InUse { .. }), "{again}");
        let left = RecordFile::left(&monitor).unwrap_err();
        assert!(matches!(left, RecordError::InUse { .. }), "{left}");
    }

    #[test]
    fn what_is_still_to_be_decided_is_not_written_over() {
        use Standing::{Awaited, GivingUp, Gone, Here, Taken};
        for (standing, is_decided) in
            [(Here, true), (Awaited, true), (GivingUp, false), (Gone, false), (Taken, false)]
        {
            let (_folder, monitor) = monitor();
            let record = Record::new(Here, None, Vec::new());
            let file = RecordFile::create(&monitor, record.clone()).unwrap();
            file.stand(standing).unwrap();
            file.leave();
            let next = RecordFile::create(&monitor, record);
            assert_eq!(next.is_ok(), is_decided, "{standing:?}: {next:?}");
        }
    }

    #[test]
    fn what_is_no_record_is_refused_and_left() {
        for bytes in
            [&b"\n"[..], b"{}", b"\xff", br#"{"schema":2,"standing":"here","peer":null,"made":[]}"#]
        {
            let (_folder, monitor) = monitor();
            std::fs::write(beside(&monitor), bytes).unwrap();
            let left = RecordFile::left(&monitor).unwrap_err();
            assert!(matches!(left, RecordError::Malformed { .. }), "{left}");
            let record = Record::new(Standing::Here, None, Vec::new());
            RecordFile::create(&monitor, record).unwrap_err();
            assert_eq!(std::fs::read(beside(&monitor)).unwrap(), bytes);
        }
        // Of one that was killed before it wrote.
        let (_folder, monitor) = monitor();
        std::fs::write(beside(&monitor), b"").unwrap();
        assert!(RecordFile::left(&monitor).unwrap().is_none());
    }
}
