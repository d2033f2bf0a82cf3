//! A file that has its name once it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::SnapshotError;

/// A file that is being written under a name of its own, beside the one it is to have. Nobody
/// takes half a guest for one: the file gets its name, in place of one that had it before, when
/// all of it is on the disk.
///
/// # Resource cleanup
///
/// Dropped before [`NewFile::keep`], nothing stays of it. A process that is killed meanwhile leaves
/// `NAME.PID.partial`.
#[derive(Debug)]
pub struct NewFile {
    out: BufWriter<File>,
    path: PathBuf,
    partial: Option<PathBuf>,
}

impl NewFile {
    /// Begins one in the directory of `path`, which may have to be written to for the first time:
    /// whether that is possible is known when this returns.
    pub fn create(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Io { operation: "create", source };
        // Another sort of file (a device, say) would be replaced, and not written to.
        match fs::metadata(path) {
            Ok(there) if !there.is_file() => {
                let what = if there.is_dir() { "a directory" } else { "no regular file" };
                let why = format!("what has that name is {what}");
                return Err(failed(io::Error::new(ErrorKind::AlreadyExists, why)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = PathBuf::from(partial);
        // Of two that save to one name at a time, each has its own.
        let file = OpenOptions::new().write(true).create_new(true).open(&partial);
        let file = file.map_err(failed)?;
        Ok(Self { out: BufWriter::new(file), path: path.to_owned(), partial: Some(partial) })
    }

    /// Has the disk take all of it, and gives it its name.
    pub fn keep(mut self) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Io { operation: "write", source };
        self.out.flush().map_err(failed)?;
        self.out.get_ref().sync_all().map_err(failed)?;
        if let Some(partial) = &self.partial {
            fs::rename(partial, &self.path).map_err(failed)?;
        }
        self.partial = None;
        // A name is the directory's to remember.
        let directory = match self.path.parent() {
            Some(directory) if directory != Path::new("") => directory,
            _ => Path::new("."),
        };
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            // What is not there need not be removed.
            let _ = fs::remove_file(partial);
        }
    }
}
