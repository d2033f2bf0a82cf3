//! Any bytes are a value or an error, in memory bounded by their number; and a value has one form.
//!
//! `ci/test fuzz` runs it for a bounded time, from the corpus beside it. For longer: `cargo fuzz run
//! decode`, or the program that `ci/test fuzz` builds.
#![no_main]

#[path = "../src/allocator.rs"]
mod allocator;

use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use pageferry_device_state::inspect::diff;
use pageferry_device_state::{
    DeviceState, Registry, Schema, Section, StreamWriter, from_bytes, inspect, to_bytes,
};

/// Bytes of memory for each byte of input, at most. An element of a list takes four bytes of input
/// at least, a value that is looked into eight.
const MEMORY_PER_BYTE: usize = 64;
/// And for what does not depend on the input.
const MEMORY_BESIDES: usize = 64 << 10;

/// Does something, and fails if it takes more memory than an input of that length may.
fn bounded<R>(len: usize, work: impl FnOnce() -> R) -> R {
    allocator::bounded(MEMORY_BESIDES + MEMORY_PER_BYTE * len, work)
}

#[derive(DeviceState, Debug, Default)]
struct Entry {
    #[device_state(tag = 1)]
    address: u64,
    #[device_state(tag = 2, max_len = 1000)]
    payload: Vec<u8>,
}

#[derive(DeviceState, Debug, Default)]
#[device_state(version = 2)]
enum Mode {
    #[default]
    #[device_state(tag = 1)]
    Off,
    #[device_state(tag = 2)]
    Count(#[device_state(tag = 1)] u16, #[device_state(tag = 2, since = 2, default)] bool),
    #[device_state(tag = 5, since = 2)]
    Scripted {
        #[device_state(tag = 1, max_len = 1000)]
        steps: Vec<Entry>,
    },
}

/// Everything that decoding can meet.
#[derive(DeviceState, Debug, Default)]
#[device_state(name = "zoo", version = 3, retired(tag = 5, until = 2), post_load = Zoo::check)]
struct Zoo {
    #[device_state(tag = 1)]
    flag: bool,
    #[device_state(tag = 2)]
    wide: i128,
    #[device_state(tag = 3, max_len = 40)]
    label: String,
    #[device_state(tag = 4)]
    words: [u16; 3],
    #[device_state(tag = 6, max_len = 100_000)]
    entries: Vec<Entry>,
    #[device_state(tag = 7)]
    mode: Mode,
    #[device_state(tag = 8, since = 2, default, max_len = 100_000)]
    names: Option<Vec<Option<String>>>,
    #[device_state(tag = 9, since = 3, default)]
    shared: Arc<Mutex<[u32; 2]>>,
    #[device_state(tag = 10, since = 3, default, max_len = 100_000)]
    flags: Vec<Vec<bool>>,
    #[device_state(subsection = "zoo/entry", needed = |zoo: &Zoo| zoo.entry.address != 0)]
    entry: Entry,
}

impl Zoo {
    fn check(&mut self) -> Result<(), &'static str> {
        if self.label == "no" { Err("no") } else { Ok(()) }
    }
}

fuzz_target!(|input: &[u8]| {
    decode(input);
    // With headers and a checksum that fit, the decoder of fields gets to see the input.
    let Some((version, payload)) = input.split_first() else { return };
    let mut stream = StreamWriter::new();
    let written = stream.section(Zoo::NAME, 0, u16::from(*version), |out| {
        out.put(payload);
        Ok(())
    });
    written.expect("a short section");
    decode(&stream.finish());
});

fn decode(stream: &[u8]) {
    let schema = Schema::new().with::<Zoo>();
    if let Ok(mut zoo) = bounded(stream.len(), || from_bytes::<Zoo>(stream)) {
        let again = to_bytes(&mut zoo).expect("what was decoded is within its bounds");
        // It may have been of an older version; from now on it is of this one.
        let mut same: Zoo = from_bytes(&again).expect("what was encoded is decoded");
        assert_eq!(to_bytes(&mut same).expect("as before"), again);
        let mut device = Zoo::default();
        let mut machine = Registry::new();
        machine.add(0, &mut device).expect("the first device");
        machine.load(stream).expect("what was decoded is loaded");
        drop(machine);
        assert_eq!(to_bytes(&mut device).expect("as before"), again);
    }
    if let Ok(seen) = bounded(stream.len(), || inspect(stream, &schema)) {
        assert!(diff(&seen, &seen).is_empty());
        let _ = seen.to_string();
    }
    if let Ok(theirs) = Schema::from_json(stream) {
        let _ = (schema.reads(&theirs).to_string(), theirs.reads(&schema).to_string());
    }
}
