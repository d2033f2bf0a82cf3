//! A file that has its name once it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use tempfile::{Builder, TempPath};

use super::SnapshotError;
use super::access::Access;

/// Links that lead to one another, as many as the kernel follows.
const MOST_LINKS: usize = 40;

/// So much may be written and not be on the disk. Who calls the writing off may have to wait for it, and
/// the kernel would gather gigabytes.
const MOST_UNSYNCED_BYTES: usize = 16 << 20;

/// Whether a file gets its name, which is decided once: by who has written all of it, or by who calls
/// that off from another thread. Clones are of the same file.
#[derive(Debug, Clone, Default)]
pub struct Fate {
    decided: Arc<AtomicBool>,
}

impl Fate {
    /// Decides it. False if that was done before.
    pub fn decide(&self) -> bool {
        !self.decided.swap(true, Ordering::Relaxed)
    }

    /// Whether it is decided.
    pub fn is_decided(&self) -> bool {
        self.decided.load(Ordering::Relaxed)
    }
}

/// A file that is being written under a name of its own, beside the one it is to have. Nobody
/// takes half a guest for one: the file gets its name, in place of one that had it before, when
/// all of it is on the disk. A symbolic link stays one, it is what it leads to that is written.
/// What a file that is replaced allows to whom stays as it was, its ACL too; its owner and its group do
/// where the one who runs this may give a file to them, as root may. Where not all of that can be had nobody
/// but who runs this gets more than before.
///
/// # Resource cleanup
///
/// Dropped before [`NewFile::keep`], nothing stays of it. A process that is killed meanwhile leaves
/// `pageferry-XXXXXX.partial` in that directory, of no use to anybody.
#[derive(Debug)]
pub struct NewFile {
    out: BufWriter<File>,
    unsynced_bytes: usize,
    /// The name that it has meanwhile.
    partial: TempPath,
    path: PathBuf,
}

impl NewFile {
    /// Begins one in the directory of `path`, which may have to be written to for the first time:
    /// whether that is possible is known when this returns, and whether a file that has that name may be
    /// replaced.
    pub fn create(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Io { operation: "create", source };
        let path = followed(path).map_err(failed)?;
        // The kernel would refuse that only as the file gets its name: "new/", "new/." and "".
        let named = path
            .file_name()
            .is_some_and(|name| path.as_os_str().as_bytes().ends_with(name.as_bytes()));
        if !named {
            let why = "it ends with the name of no file";
            return Err(failed(io::Error::new(ErrorKind::IsADirectory, why)));
        }
        // Another sort of file (a device, say) would be replaced, and not written to.
        let replaced = match fs::metadata(&path) {
            Ok(there) if !there.is_file() => {
                let what = if there.is_dir() { "a directory" } else { "no regular file" };
                let why = format!("what has that name is {what}");
                return Err(failed(io::Error::new(ErrorKind::AlreadyExists, why)));
            }
            // Who may not read the one that is there reads no other in its place.
            Ok(there) => {
                if is_kept(&path) {
                    let why = "the file that has that name may not be replaced: it is another \
                               user's in a directory where each may replace their own (its sticky \
                               bit is set, as that of /tmp), or it is immutable; have it removed, \
                               or save under another name";
                    return Err(failed(io::Error::new(ErrorKind::PermissionDenied, why)));
                }
                Some(Access::of(&path, &there).map_err(failed)?)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        // Names are bounded, and this one may have the longest there is: so it is no part of the other.
        let mode = if replaced.is_some() { 0o600 } else { 0o666 };
        let file = Builder::new()
            .prefix("pageferry-")
            .suffix(".partial")
            // By hand, since the other way names the file in its errors, where it tells nobody anything.
            .make_in(directory_of(&path), |partial| {
                OpenOptions::new().write(true).create_new(true).mode(mode).open(partial)
            })
            .map_err(failed)?;
        let (file, partial) = file.into_parts();
        if let Some(replaced) = replaced {
            replaced.give_to(&file).map_err(failed)?;
        }
        Ok(Self { out: BufWriter::new(file), unsynced_bytes: 0, partial, path })
    }

    /// Has the disk take all of it, and gives it its name, unless that was called off.
    pub fn keep(self, fate: &Fate) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Io { operation: "write", source };
        let file = self.out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        if !fate.decide() {
            return Err(SnapshotError::CalledOff);
        }
        self.partial.persist(&self.path).map_err(|error| failed(error.error))?;
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

/// Whether the file of that name stays where it is whatever this user does. The kernel asks the same of
/// a rename, at the very end; here it is asked to remove a directory, and what is none is never removed:
/// where it might have been, that is the complaint.
fn is_kept(path: &Path) -> bool {
    let complaint = fs::remove_dir(path).err();
    complaint.and_then(|error| error.raw_os_error()) == Some(Errno::PERM.raw_os_error())
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
        let written = self.out.write(bytes)?;
        self.unsynced_bytes += written;
        if self.unsynced_bytes >= MOST_UNSYNCED_BYTES {
            self.out.flush()?;
            self.out.get_ref().sync_data()?;
            self.unsynced_bytes = 0;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::fs::Permissions;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown, symlink};
    use std::thread;

    use rustix::process::Uid;
    use rustix::thread::set_thread_res_uid;

    use super::*;

    fn write(path: &Path, contents: &[u8]) -> Result<(), SnapshotError> {
        let mut file = NewFile::create(path)?;
        file.write_all(contents).unwrap();
        file.keep(&Fate::default())
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
        for kept in [0o600, 0o644, 0o664, 0o666, 0o755, 0o777, 0o400] {
            fs::set_permissions(&path, Permissions::from_mode(kept)).unwrap();
            write(&path, b"two").unwrap();
            assert_eq!(mode(&path), kept, "{kept:o}");
        }
    }

    /// Who is not root may give a file to nobody, and replaces it with one of its own.
    #[test]
    fn a_file_has_the_owner_of_the_one_before_where_that_is_allowed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("guest");
        write(&path, b"one").unwrap();
        let owner = |path: &Path| fs::metadata(path).map(|file| (file.uid(), file.gid())).unwrap();
        let given = fchown(File::open(&path).unwrap(), Some(65_534), Some(65_533));
        let expected = if given.is_ok() { (65_534, 65_533) } else { owner(&path) };
        // Who changes the owner of a file that is run as another takes that from its mode. So does who writes to
        // it, unless it is root.
        let bits = if given.is_ok() { 0o7777 } else { 0o777 };
        for kept in [0o640, 0o6755] {
            fs::set_permissions(&path, Permissions::from_mode(kept)).unwrap();
            write(&path, b"two").unwrap();
            assert_eq!(owner(&path), expected);
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode, kept & bits, "{mode:o}");
        }
    }

    /// Only root may become somebody else, and only root's file is sure to be another's.
    #[test]
    fn a_file_that_may_not_be_replaced_is_found_before_anything_is_written() {
        if !rustix::process::geteuid().is_root() {
            let why = b"a_file_that_may_not_be_replaced skipped, because this is not root\n";
            return io::stderr().write_all(why).unwrap();
        }
        let root = tempfile::tempdir().unwrap();
        let (theirs, mine) = (root.path().join("theirs"), root.path().join("mine"));
        for path in [&theirs, &mine] {
            fs::write(path, b"before").unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
        }
        let nobody = Uid::from_raw(65_534);
        fchown(File::open(&mine).unwrap(), Some(nobody.as_raw()), None).unwrap();
        let as_nobody = |path: &Path| {
            thread::scope(|scope| {
                let writing = scope.spawn(|| {
                    // Of this thread, and not of the process.
                    set_thread_res_uid(nobody, nobody, nobody).unwrap();
                    write(path, b"after")
                });
                writing.join().unwrap()
            })
        };
        // As /tmp is.
        fs::set_permissions(root.path(), Permissions::from_mode(0o1777)).unwrap();
        as_nobody(&mine).unwrap();
        as_nobody(&root.path().join("new")).unwrap();
        let error = as_nobody(&theirs).unwrap_err();
        assert!(
            matches!(&error, SnapshotError::Io { operation: "create", source }
            if source.to_string().contains("sticky")),
            "{error:?}"
        );
        assert_eq!(fs::read(&theirs).unwrap(), b"before");
        assert_eq!(names_in(root.path()), ["mine", "new", "theirs"]);
        // Who may replace what is anybody's may do that.
        fs::set_permissions(root.path(), Permissions::from_mode(0o777)).unwrap();
        as_nobody(&theirs).unwrap();
        assert_eq!(fs::read(&theirs).unwrap(), b"after");
    }

    #[test]
    fn the_name_of_a_directory_is_refused_before_anything_is_written() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        symlink("new/", &link).unwrap();
        let paths = ["new/", "new//", "new/."].map(|name| root.path().join(name));
        for path in paths.into_iter().chain([link, PathBuf::new()]) {
            let error = NewFile::create(&path).unwrap_err();
            assert!(matches!(error, SnapshotError::Io { operation: "create", .. }), "{error}");
            assert_eq!(names_in(root.path()), ["link"]);
        }
    }

    #[test]
    fn what_is_called_off_before_it_has_its_name_gets_none() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("guest");
        write(&path, b"before").unwrap();
        let (mut file, fate) = (NewFile::create(&path).unwrap(), Fate::default());
        file.write_all(b"after").unwrap();
        assert!(fate.decide());
        assert!(matches!(file.keep(&fate), Err(SnapshotError::CalledOff)));
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(names_in(root.path()), ["guest"]);
        // And who comes too late is told so.
        let (file, fate) = (NewFile::create(&path).unwrap(), Fate::default());
        file.keep(&fate).unwrap();
        assert!(!fate.decide());
        assert_eq!(fs::read(&path).unwrap(), b"");
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
