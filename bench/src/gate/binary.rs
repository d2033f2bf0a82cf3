//! A build of this program, run from outside.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pageferry_cli::outcome::Failure;
use serde_json::Value;

/// What clap ends with when it does not know a command, or one of its values.
const UNKNOWN: i32 = 2;

/// The program.
#[derive(Debug)]
pub(super) struct Binary {
    name: &'static str,
    path: PathBuf,
}

impl fmt::Display for Binary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Binary {
    pub(super) fn new(name: &'static str, path: &Path) -> Result<Self, Failure> {
        if path.is_file() {
            Ok(Self { name, path: path.to_owned() })
        } else {
            Err(format!("failed to find the {name}: there is no program {}", path.display()).into())
        }
    }

    /// What it prints; `None` if it does not know what it is asked for.
    pub(super) fn run(&self, args: &[&str]) -> Result<Option<String>, Failure> {
        let mut command = Command::new(&self.path);
        self.finish(command.args(args), args).map(|output| output.map(|(stdout, _)| stdout))
    }

    /// The same by another program: (stdout, stderr).
    pub(super) fn run_by(
        &self,
        program: &str,
        options: &[&str],
        args: &[&str],
    ) -> Result<Option<(String, String)>, Failure> {
        let mut command = Command::new(program);
        command.args(options).arg(&self.path).args(args);
        self.finish(&mut command, args)
    }

    /// What it prints as one JSON object.
    pub(super) fn json(&self, args: &[&str]) -> Result<Option<Value>, Failure> {
        let Some(text) = self.run(args)? else { return Ok(None) };
        Ok(Some(serde_json::from_str(&text)?))
    }

    fn finish(
        &self,
        command: &mut Command,
        args: &[&str],
    ) -> Result<Option<(String, String)>, Failure> {
        let program = command.get_program().to_string_lossy().into_owned();
        let Output { status, stdout, stderr } = command
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("failed to start {program}: {error}"))?;
        let [stdout, stderr] =
            [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        if status.success() {
            Ok(Some((stdout, stderr)))
        } else if status.code() == Some(UNKNOWN) && stderr.contains("try '--help'") {
            Ok(None)
        } else {
            Err(format!("the {self} failed to do {args:?} ({status}): {}", stderr.trim()).into())
        }
    }
}
