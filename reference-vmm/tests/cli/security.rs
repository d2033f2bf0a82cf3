//! Guests that move encrypted, between sides that know each other; and what becomes of those that do not.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry_tcp::testing::Authority;
use rustix::process::Signal;

use crate::support::sides::{destination, destination_that_stays, source_that_stays};

/// A file in a folder of the test's own, and the option that names it.
fn option(folder: &Path, option: &str, name: &str, contents: impl AsRef<[u8]>) -> String {
    let path: PathBuf = folder.join(name);
    fs::write(&path, contents).expect("the folder is writable");
    format!("--{option}={}", path.display())
}

/// A guest moves with these options of the two sides.
fn assert_moves(here: &[&str], there: &[&str]) {
    let (mut destination, address) = destination(there);
    let mut source = source_that_stays(&[here, &["--verify"]].concat());
    source.say(format!("migrate {address}"));
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    departed.assert_departed_encrypted();
    arrived.assert_arrived_encrypted();
    for report in [&departed, &arrived] {
        assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
    }
}

#[test]
fn a_guest_moves_by_a_shared_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = option(folder.path(), "shared-key", "key", "0123456789abcdef0123456789abcdef\n");
    for transport in ["--transport=tcp", "--transport=auto"] {
        assert_moves(&[&key, transport], &[&key, transport]);
    }
}

#[test]
fn a_guest_moves_by_certificates() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new("ours");
    let side = |name: &str| -> Vec<String> {
        let issued = authority.issue(&[name]);
        let file =
            |what, contents: &str| option(folder.path(), what, &format!("{name}.{what}"), contents);
        vec![
            file("tls-cert", &issued.certificate),
            file("tls-key", &issued.key),
            file("tls-ca", &authority.pem()),
            file("tls-crl", &authority.revoke(&[])),
        ]
    };
    let (here, there) = (side("source.example"), side("127.0.0.1"));
    let there: Vec<&str> =
        there.iter().map(String::as_str).chain(["--tls-peer-name=source.example"]).collect();
    let here: Vec<&str> = here.iter().map(String::as_str).collect();
    assert_moves(&here, &there);
}

/// Both sides say why, nothing is lost, and who has the right key comes after.
#[test]
fn who_has_another_key_does_not_come_in() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = option(folder.path(), "shared-key", "key", [b'k'; 32]);
    let other = option(folder.path(), "shared-key", "other", [b'o'; 32]);
    let (mut destination, address) = destination_that_stays(&[&key]);
    for (here, heard, logged) in [
        (
            vec![&*other],
            "the other side has another shared key",
            "this side has another shared key",
        ),
        (vec![], "it says: it wants TLS", "it does not speak TLS"),
    ] {
        let mut stranger = source_that_stays(&here);
        stranger.say(format!("migrate {address}"));
        let failed = stranger.await_report();
        assert_eq!((failed.text("outcome"), failed.text("guest_at")), ("failed", "source"));
        assert!(failed.text("error").contains(heard), "{failed:?}");
        let beats = stranger.beats();
        stranger.await_beats_beyond(beats);
        destination.await_message(logged);
        stranger.say("quit");
        stranger.finish();
    }
    let mut source = source_that_stays(&[&*key]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed_encrypted();
    assert_eq!(destination.await_report().text("outcome"), "completed");
    destination.signal(Signal::INT);
    destination.finish().assert_status(0);
}

/// Before anything else is begun.
#[test]
fn what_is_missing_is_said_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let short = option(folder.path(), "shared-key", "short", "secret");
    for (given, said) in
        [("--shared-key=/none/key", "/none/key: No such file"), (&*short, "has less than 32 bytes")]
    {
        let mut source = source_that_stays(&[given]);
        source.say("migrate 127.0.0.1:1");
        let failed = source.await_report();
        assert!(failed.text("error").contains(said), "{failed:?}");
        source.say("quit");
        source.finish();
    }
}

/// Nor is anything of the guest.
#[test]
fn no_key_is_in_a_core_dump() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = option(folder.path(), "shared-key", "key", "0123456789abcdef0123456789abcdef\n");
    for (options, filter) in [(&[][..], None), (&[key.as_str()][..], Some("00000010"))] {
        let (destination, _) = destination(options);
        let seen = fs::read_to_string(format!("/proc/{}/coredump_filter", destination.pid()));
        let seen = seen.expect("it runs");
        let ours = fs::read_to_string("/proc/self/coredump_filter").expect("this is Linux");
        assert_eq!(seen.trim(), filter.unwrap_or_else(|| ours.trim()));
    }
}
