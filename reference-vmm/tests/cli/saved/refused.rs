//! Files that hold no guest, or none of this program's.

use std::fs;

use xxhash_rust::xxh3::xxh3_128;

use super::{Scratch, run, saved};

#[test]
fn a_file_that_is_no_guest_is_refused() {
    let (file, _) = saved("damaged", &["--guest=process"]);
    let good = fs::read(&file.0).unwrap();
    let refused = |contents: &[u8], why: &str| {
        let bad = Scratch::with("bad", contents);
        let (status, out, messages) = run(&["restore", bad.path()]);
        assert_eq!((status, out.as_str()), (Some(1), ""), "{messages}");
        assert!(messages.contains(why), "no {why:?} in {messages}");
    };
    refused(b"", "ends too early");
    refused(&good[..good.len() - 1], "ends too early");
    refused(&good[..40], "ends too early");
    refused(&[&good[..], b"x"].concat(), "goes on after its end");
    refused(&[b"X", &good[1..]].concat(), "holds no guest");
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    refused(&changed(8, 9), "it has format 9, this program reads format 2");
    refused(&changed(15, 0xff), "its description has");
    refused(&changed(27, 0xff), "its device state has");
    refused(&changed(40, good[40] ^ 1), "its description or device state is damaged");
    let last_page = good.len() - 16 - 16 - 1;
    refused(&changed(last_page, good[last_page] ^ 1), "its memory is damaged");
    // What is printed of a file is what was written to it.
    let damaged = Scratch::with("damaged-state", &changed(40, good[40] ^ 1));
    let (status, out, messages) = run(&["inspect", damaged.path()]);
    assert_eq!((status, out.as_str()), (Some(1), ""), "{messages}");
    assert!(messages.contains("is damaged"), "{messages}");
    let (status, _, messages) = run(&["restore", "/nowhere"]);
    assert_eq!(status, Some(1));
    assert!(messages.contains("failed to open /nowhere"), "{messages}");
}

/// Makes both digests of a file right: the one after the device state, and the last.
fn sum_up(file: &mut [u8]) {
    let number = |at: usize, bytes: usize| {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(&file[at..at + bytes]);
        usize::try_from(u64::from_le_bytes(number)).expect("64 bits")
    };
    let head = 28 + number(12, 4) + number(16, 4) + number(20, 8);
    for at in [head, file.len() - 16] {
        let digest = xxh3_128(&file[..at]).to_le_bytes();
        file[at..at + 16].copy_from_slice(&digest);
    }
}

#[test]
fn a_file_of_another_program_is_refused_by_its_schema() {
    let (file, _) = saved("foreign", &["--guest=process"]);
    let good = fs::read(&file.0).unwrap();
    // The name of a field of the same length, so that nothing moves; and a type.
    let replaced = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut file = good.clone();
        file[at..at + from.len()].copy_from_slice(to.as_bytes());
        sum_up(&mut file);
        file
    };
    let from = r#""name":"granted","type":"u32""#;
    let renamed = Scratch::with("renamed", &replaced(from, r#""name":"permits","type":"u32""#));
    assert_eq!(run(&["restore", renamed.path(), "--run-for=10ms"]).0, Some(0));
    let retyped = Scratch::with("retyped", &replaced(from, r#""name":"granted","type":"i32""#));
    let (status, _, messages) = run(&["restore", retyped.path()]);
    assert_eq!(status, Some(1));
    assert!(messages.contains("thread.granted: the writer has i32, the reader u32"), "{messages}");
}
