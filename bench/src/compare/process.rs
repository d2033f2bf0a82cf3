//! Programs of others.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Output, Stdio};

use pageferry_cli::child::OwnedChild;
use pageferry_cli::outcome::Failure;

/// Where a program is.
pub(super) fn find(program: &str, package: &str) -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!("there is no {program} (on Debian: apt-get install {package})").into()
        })
}

/// A program that is ended when it is dropped.
#[derive(Debug)]
pub(super) struct Running {
    name: String,
    pub(super) child: OwnedChild,
}

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self, Failure> {
        let name = command.get_program().to_string_lossy().into_owned();
        // Ctrl-C is for us, who end it.
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = OwnedChild::spawn(command)
            .map_err(|error| format!("failed to start {name}: {error}"))?;
        Ok(Self { name, child })
    }

    /// Reads its output up to a line that has this in it.
    pub(super) fn await_line(&mut self, part: &str) -> Result<BufReader<ChildStdout>, Failure> {
        let stdout = self.child.stdout.take().ok_or("its output is read already")?;
        let mut lines = BufReader::new(stdout);
        let mut line = String::new();
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 {
                return Err(self.complaint("it ended too early"));
            }
            if line.contains(part) {
                return Ok(lines);
            }
        }
    }

    /// What it says about why it failed.
    pub(super) fn complaint(&mut self, what: &str) -> Failure {
        let mut words = String::new();
        // It has ended, or is made to.
        let _ = self.child.kill();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut words);
        }
        format!("{}: {what}: {}", self.name, words.trim()).into()
    }
}

/// Runs a program to its end, which must be a good one.
pub(super) fn output(command: &mut Command) -> Result<String, Failure> {
    let name = command.get_program().to_string_lossy().into_owned();
    let Output { status, stdout, stderr } = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("failed to start {name}: {error}"))?;
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    if status.success() {
        return Ok(stdout);
    }
    let words = if stderr.trim().is_empty() { stdout.trim() } else { stderr.trim() };
    Err(format!("{name} ended with {status}: {words}").into())
}
