//! Who may do what with a file, taken over by the one that replaces it.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use rustix::fs::{XattrFlags, fremovexattr, fsetxattr, getxattr};
use rustix::io::Errno;

/// Where Linux keeps a file's POSIX ACL. The mode's group bits are the ACL's mask then, and no longer
/// what the group may do.
const ACL: &str = "system.posix_acl_access";
/// No attribute is longer.
const MOST_ACL_BYTES: usize = 64 << 10;

const GROUP_AND_OTHERS: u32 = 0o077;

/// What a file allows to whom.
#[derive(Debug)]
pub(super) struct Access {
    uid: u32,
    gid: u32,
    mode: u32,
    acl: Option<Vec<u8>>,
}

impl Access {
    /// Of the file of that name.
    pub(super) fn of(path: &Path, file: &Metadata) -> io::Result<Self> {
        let mut acl = vec![0; MOST_ACL_BYTES];
        let acl = match getxattr(path, ACL, &mut acl[..]) {
            Ok(len) => {
                acl.truncate(len);
                Some(acl)
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self { uid: file.uid(), gid: file.gid(), mode: file.permissions().mode(), acl })
    }

    /// Gives it to a new file that is its owner's alone so far. Its owner and its group are what they
    /// were where the one who runs this may give a file to them, as root may. Where something can't be
    /// had nobody but the owner gets more than before.
    pub(super) fn give_to(&self, file: &File) -> io::Result<()> {
        // First, since it takes bits away from the mode. Who is not root keeps the file, and may give
        // it to a group that is one of their own.
        let _ = fchown(file, Some(self.uid), None);
        let has_group = fchown(file, None, Some(self.gid)).is_ok();
        let acl = match &self.acl {
            Some(acl) if has_group => fsetxattr(file, ACL, acl, XattrFlags::empty()),
            // The directory may have given it one.
            _ => match fremovexattr(file, ACL) {
                Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
                removed => removed,
            },
        };
        let mode = match (has_group, &self.acl, acl) {
            (true, _, Ok(())) => self.mode,
            // Who was in the group is one of the others now, and the group is one of those.
            (false, None, Ok(())) => {
                let both = (self.mode >> 3) & self.mode & 0o7;
                (self.mode & !GROUP_AND_OTHERS) | (both << 3) | both
            }
            _ => self.mode & !GROUP_AND_OTHERS,
        };
        // Not as the file is made, where the umask takes bits away.
        file.set_permissions(Permissions::from_mode(mode))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::PathBuf;
    use std::thread;

    use rustix::fs::setxattr;
    use rustix::process::Uid;
    use rustix::thread::set_thread_res_uid;

    use super::*;

    const NOBODY: u32 = 65_534;
    /// A group that nobody is in.
    const OTHER_GROUP: u32 = 65_533;

    /// `user::rw-`, `user:1001:rw-`, `group::---`, `mask::rw-`, `other::---`.
    const ENTRIES: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 6, 1001), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)];

    /// As the kernel has it.
    fn acl() -> Vec<u8> {
        let entry = |(tag, allowed, id): (u16, u16, u32)| {
            [&tag.to_le_bytes()[..], &allowed.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        [2u32.to_le_bytes().to_vec()].into_iter().chain(ENTRIES.map(entry)).flatten().collect()
    }

    /// Two files, of which one is to be as the other is: by root or by nobody.
    struct Files {
        root: tempfile::TempDir,
        before: PathBuf,
    }

    impl Files {
        fn new(mode: u32) -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::set_permissions(root.path(), Permissions::from_mode(0o777)).unwrap();
            let before = root.path().join("before");
            fs::write(&before, b"").unwrap();
            fs::set_permissions(&before, Permissions::from_mode(mode)).unwrap();
            Self { root, before }
        }

        /// Mode and ACL of one that is made and is given what the other has.
        fn after(&self) -> (u32, Option<Vec<u8>>) {
            let path = self.root.path().join("after");
            let access = Access::of(&self.before, &fs::metadata(&self.before).unwrap()).unwrap();
            let mut new = OpenOptions::new();
            let file = new.write(true).create_new(true).mode(0o600).open(&path).unwrap();
            access.give_to(&file).unwrap();
            let after = Access::of(&path, &fs::metadata(&path).unwrap()).unwrap();
            fs::remove_file(&path).unwrap();
            (after.mode & 0o777, after.acl)
        }

        /// The same, by nobody, who may not give a file to that group.
        fn after_by_nobody(&self) -> (u32, Option<Vec<u8>>) {
            fchown(File::open(&self.before).unwrap(), None, Some(OTHER_GROUP)).unwrap();
            let nobody = Uid::from_raw(NOBODY);
            thread::scope(|scope| {
                let by_nobody = scope.spawn(|| {
                    // Of this thread, and not of the process.
                    set_thread_res_uid(nobody, nobody, nobody).unwrap();
                    self.after()
                });
                by_nobody.join().unwrap()
            })
        }
    }

    /// False where the file system has none, having said so.
    fn set_acl(path: &Path, name: &str) -> bool {
        match setxattr(path, name, &acl(), XattrFlags::empty()) {
            Ok(()) => true,
            Err(Errno::OPNOTSUPP) => {
                skipped("there are no ACLs in the directory for temporary files");
                false
            }
            Err(error) => panic!("failed to set an ACL: {error}"),
        }
    }

    fn skipped(why: &str) {
        let thread = thread::current();
        let line = format!("{} skipped, because {why}\n", thread.name().unwrap_or("a test"));
        io::Write::write_all(&mut io::stderr(), line.as_bytes()).unwrap();
    }

    #[test]
    fn an_acl_is_taken_over() {
        let files = Files::new(0o600);
        if set_acl(&files.before, ACL) {
            // What is shown for the group is the mask.
            assert_eq!(files.after(), (0o660, Some(acl())));
        }
    }

    /// New files of a directory may have one that the file before did not.
    #[test]
    fn an_acl_that_was_not_there_is_none() {
        for mode in [0o600, 0o640, 0o660, 0o666] {
            let files = Files::new(mode);
            if set_acl(files.root.path(), "system.posix_acl_default") {
                assert_eq!(files.after(), (mode, None), "{mode:o}");
            }
        }
    }

    /// The mode that is left says what a mask said, or what another group was allowed.
    #[test]
    fn nobody_gets_more_by_a_file_that_cannot_have_the_same_group() {
        if !rustix::process::geteuid().is_root() {
            return skipped("this is not root, who alone may become somebody else");
        }
        for (mode, expected) in [
            (0o600, 0o600),
            (0o640, 0o600),
            (0o604, 0o600),
            (0o664, 0o644),
            (0o646, 0o644),
            (0o666, 0o666),
        ] {
            assert_eq!(Files::new(mode).after_by_nobody(), (expected, None), "{mode:o}");
        }
        let files = Files::new(0o600);
        if set_acl(&files.before, ACL) {
            assert_eq!(files.after_by_nobody(), (0o600, None));
        }
    }
}
