//! Processes that a program starts, and that a program is.

use std::io;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command};

use rustix::process::{Signal, set_parent_process_death_signal};

/// A process that ends with its owner: dropping it ends it and waits until it is gone.
#[derive(Debug)]
pub struct OwnedChild(Child);

impl OwnedChild {
    /// Starts it.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(Self)
    }
}

impl Deref for OwnedChild {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for OwnedChild {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for OwnedChild {
    fn drop(&mut self) {
        // Both calls do nothing to a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has the kernel send this process that signal when its parent ends.
pub fn end_with_parent(signal: Signal) -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(signal))?)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_child_is_gone_when_its_owner_is() {
        let mut child = OwnedChild::spawn(Command::new("cat").stdin(Stdio::piped())).unwrap();
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        // It ends by itself when this is closed, and no earlier.
        let _stdin = child.stdin.take();
        assert!(process.exists());
        drop(child);
        assert!(!process.exists());
    }
}
