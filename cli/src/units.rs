//! Sizes, rates, times, names and options as a command line has them.

use std::num::NonZeroU64;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::memory::PAGE_BYTES;

/// "512M", "1G", "64MiB": binary units.
pub fn size(text: &str) -> Result<u64, String> {
    match parse_size::Config::new().with_binary().parse_size(text) {
        Ok(0) => Err("nothing is too little; a size is like 512M or 1G".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(format!("{error}; a size is like 512M or 1G")),
    }
}

/// "100M": bytes a second.
pub fn rate(text: &str) -> Result<NonZeroU64, String> {
    match NonZeroU64::new(size(text)?) {
        Some(rate) if rate.get() >= PAGE_BYTES => Ok(rate),
        _ => Err(format!(
            "less than {PAGE_BYTES} bytes a second, one page; a rate is like 100M, and most often \
             more than the guest writes"
        )),
    }
}

/// "300ms": how long a guest may stand still.
pub fn downtime(text: &str) -> Result<Duration, String> {
    match time(text)? {
        Duration::ZERO => {
            Err("a guest stands still for some time whenever it moves: with no time \
                               for that it is sent until the deadline, and stays; a time is like \
                               300ms or 2s"
                .to_owned())
        }
        limit => Ok(limit),
    }
}

/// A time as [`time`] reads it, whatever it is.
pub fn time_text(time: &Duration) -> String {
    humantime::format_duration(*time).to_string().replace(' ', "")
}

/// "300ms", "1s", "2s 500ms".
pub fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; a time is like 300ms or 2s"))
}

/// One of a few values, by the name that chooses it.
pub fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Options with values, as far as they were given, for the command line of another process.
pub fn options<'a>(given: impl IntoIterator<Item = (&'a str, Option<String>)>) -> Vec<String> {
    let given = given.into_iter().filter_map(|(name, value)| Some((name, value?)));
    given.flat_map(|(name, value)| [format!("--{name}"), value]).collect()
}
