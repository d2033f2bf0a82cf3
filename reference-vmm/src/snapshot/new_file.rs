//! A file that has its name once it is whole.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use tempfile::{Builder, NamedTempFile};

use super::SnapshotError;

/// Links that lead to one another, as many as the kernel follows.
const MOST_LINKS: usize = 40;

/// A file that is being written under a name of its own, beside the one it is to have. Nobody
/// takes half a guest for one: the file gets its name, in place of one that had it before, when
/// all of it is on the disk. A symbolic link stays one, it is what it leads to that is written.
///
/// # Resource cleanup
///
/// Dropped before [`NewFile::keep`], nothing stays of it. A process that is killed meanwhile leaves
/// `pageferry-XXXXXX.partial` in that directory, of no use to anybody.
#[derive(Debug)]
pub struct NewFile {
    out: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl NewFile {
    /// Begins one in the directory of `path`, which may have to be written to for the first time:
    /// whether that is possible is known when this returns.
    pub fn create(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Io { operation: "create", source };
        let path = followed(path).map_err(failed)?;
        // Another sort of file (a device, say) would be replaced, and not written to.
        let permissions = match fs::metadata(&path) {
            Ok(there) if !there.is_file() => {
                let what = if there.is_dir() { "a directory" } else { "no regular file" };
                let why = format!("what has that name is {what}");
                return Err(failed(io::Error::new(ErrorKind::AlreadyExists, why)));
            }
            // Who may not read the one that is there reads no other in its place.
            Ok(there) => there.permissions(),
            Err(error) if error.kind() == ErrorKind::NotFound => Permissions::from_mode(0o666),
            Err(error) => return Err(failed(error)),
        };
        // Names are bounded, and this one may have the longest there is: so it is no part of the other.
        let file = Builder::new()
            .prefix("pageferry-")
            .suffix(".partial")
            .permissions(permissions)
            .tempfile_in(directory_of(&path))
            .map_err(failed)?;
        Ok(Self { out: BufWriter::new(file), path })
    }

    /// Has the disk take all of it, and gives it its name.
    pub fn keep(self) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Io { operation: "write", source };
        let file = self.out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&self.path).map_err(|error| failed(error.error))?;
        // A name is the directory's to remember.
        File::open(directory_of(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(failed)
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    }
}

/// Where a path leads in the end, which need not be there: as a file that is opened to be made.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = directory_of(&path).join(target),
            // Not there, or no link.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                return Ok(path);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Errno::LOOP.into())
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(path: &Path, contents: &[u8]) -> Result<(), SnapshotError> {
        let mut file = NewFile::create(path)?;
        file.write_all(contents).unwrap();
        file.keep()
    }

    fn names_in(directory: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_link_stays_and_what_it_leads_to_is_written() {
        let root = tempfile::tempdir().unwrap();
        let (here, there) = (root.path().join("here"), root.path().join("there"));
        fs::create_dir(&here).unwrap();
        fs::create_dir(&there).unwrap();
        symlink("../there/next", here.join("first")).unwrap();
        symlink("guest", there.join("next")).unwrap();
        // At first the last link leads nowhere.
        for contents in [b"one", b"two"] {
            write(&here.join("first"), contents).unwrap();
            assert_eq!(fs::read(there.join("guest")).unwrap(), contents);
            assert_eq!(fs::read_link(here.join("first")).unwrap(), Path::new("../there/next"));
            assert_eq!(names_in(&here), ["first"]);
            assert_eq!(names_in(&there), ["guest", "next"]);
        }
        symlink("round", there.join("round")).unwrap();
        let error = NewFile::create(&there.join("round")).unwrap_err();
        assert!(
            matches!(&error, SnapshotError::Io { operation: "create", source }
            if source.raw_os_error() == Some(Errno::LOOP.raw_os_error())),
            "{error}"
        );
    }

    #[test]
    fn a_name_may_be_as_long_as_names_are() {
        let root = tempfile::tempdir().unwrap();
        for length in [230, 240, 250, 255] {
            let path = root.path().join("n".repeat(length));
            write(&path, b"guest").unwrap_or_else(|error| panic!("{length}: {error}"));
            assert_eq!(fs::read(&path).unwrap(), b"guest");
        }
        assert_eq!(names_in(root.path()).len(), 4);
        assert!(NewFile::create(&root.path().join("n".repeat(256))).is_err());
        assert_eq!(names_in(root.path()).len(), 4);
    }

    /// What is kept from others stays kept from them, and a new file is as any other.
    #[test]
    fn a_file_has_the_permissions_of_the_one_before() {
        let root = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (path, usual) = (root.path().join("guest"), root.path().join("usual"));
        fs::write(&usual, b"").unwrap();
        write(&path, b"one").unwrap();
        assert_eq!(mode(&path), mode(&usual));
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn nothing_stays_of_what_is_not_kept() {
        let root = tempfile::tempdir().unwrap();
        let mut file = NewFile::create(&root.path().join("guest")).unwrap();
        file.write_all(&vec![1; 100_000]).unwrap();
        assert_eq!(names_in(root.path()).len(), 1);
        drop(file);
        assert_eq!(names_in(root.path()).len(), 0);
    }
}
