//! `cpu`: what virtual CPUs are made of, as a file for `--cpu-baseline`.

use std::fs::File;
use std::io::{Read, Take};
use std::path::Path;

use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::output;
use pageferry_rust_vmm::cpu::CpuProfile;
use pageferry_vmm::guest::host_cpu;

use crate::args::CpuArgs;

/// Of a file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

pub(crate) fn cpu(args: &CpuArgs) -> Result<Outcome, Failure> {
    let mut profiles = args.files.iter().map(|file| read(file));
    let first = profiles.next().unwrap_or_else(|| Ok(host_cpu()?))?;
    let mut profile =
        profiles.try_fold(first, |common, next| Ok::<_, Failure>(common.common(&next?)))?;
    for name in &args.without {
        profile = profile.without(name)?;
    }
    // If nobody reads it there is nothing to do about it.
    let _ = output::line(&serde_json::to_string(&profile)?);
    Ok(Outcome::Completed)
}

/// What this host has, no more than the baseline in that file. None without a file: all of it.
pub(crate) fn limited_to(baseline: Option<&Path>) -> Result<Option<CpuProfile>, Failure> {
    let Some(baseline) = baseline else { return Ok(None) };
    Ok(Some(host_cpu()?.common(&read(baseline)?)))
}

fn read(path: &Path) -> Result<CpuProfile, Failure> {
    let file =
        File::open(path).map_err(|error| format!("failed to open {}: {error}", path.display()))?;
    let file: Take<File> = file.take(MAX_FILE_BYTES);
    let profile = serde_json::from_reader(std::io::BufReader::new(file));
    let profile: CpuProfile =
        profile.map_err(|error| format!("{} is no CPU baseline: {error}", path.display()))?;
    profile.cpuid().map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(profile)
}
