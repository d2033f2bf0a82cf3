//! Who connects to a listening destination and is no source, or not the one that is served, disturbs
//! nobody.

use std::io::{Read, Write};
use std::net::TcpStream;

use pageferry_tcp::preamble::{Kind, Preamble, Status};
use rustix::process::Signal;

use crate::support::peer::{Noise, control_preamble, dial, read_answer};
use crate::support::sides::{destination, source, under_way};

/// Throws bytes at the port, more than a preamble and less; gives back connections that say
/// nothing more.
fn disturb(address: &str, noise: &mut Noise) -> Vec<TcpStream> {
    for length in [1, 7, 8, 31, 32, 33, 500, 70_000] {
        let mut stream = dial(address);
        // The other side hangs up before it has read a lot of nonsense.
        let _ = stream.write_all(&noise.bytes(length)).and_then(|()| stream.read(&mut [0; 256]));
    }
    // A good beginning, and then nonsense.
    let start = &Preamble { id: pageferry::transport::MigrationId([1; 16]), kind: Kind::Control };
    let mut cut_short = dial(address);
    cut_short.write_all(&start.encode()[..20]).expect("write");
    let mut wrong_kind = dial(address);
    let mut bytes = start.encode();
    bytes[10] = 200;
    wrong_kind.write_all(&bytes).expect("write");
    assert_eq!(read_answer(&mut wrong_kind).status, Status::Malformed);
    let mut no_such_migration = dial(address);
    let data = Preamble { kind: Kind::Data { channel: 0 }, ..*start };
    no_such_migration.write_all(&data.encode()).expect("write");
    assert_eq!(read_answer(&mut no_such_migration).status, Status::UnknownMigration);
    vec![cut_short, dial(address)]
}

#[test]
fn noise_before_and_during_a_migration() {
    let mut noise = Noise(1);
    let (mut destination, address) = destination(&[]);
    let mut silent = disturb(&address, &mut noise);
    let mut source = source(&["--verify"]);
    source.say(format!("migrate {address}"));
    destination.await_message("a source connected");
    // The migration stands still while they come.
    source.stop();
    silent.extend(disturb(&address, &mut noise));
    let mut second = dial(&address);
    second.write_all(&control_preamble()).expect("write");
    let answer = read_answer(&mut second);
    assert_eq!(answer.status, Status::Busy, "{answer:?}");
    source.signal(Signal::CONT);
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
    destination.await_message("refused a connection");
}

#[test]
fn a_second_source_while_one_is_served() {
    let (mut destination, address) = destination(&[]);
    let (mut first, mut second) = (source(&[]), source(&[]));
    let beats = second.beats();
    first.say(format!("migrate {address}"));
    destination.await_message("a source connected");
    first.stop();
    second.say(format!("migrate {address}"));
    let why = ["refused by", &address, "another migration is being served"];
    second.finish().report(1).assert_kept("failed", &why, beats);
    first.signal(Signal::CONT);
    first.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn commands_while_a_migration_is_under_way() {
    let (mut source, mut destination, beats) = under_way(&[]);
    // So that it stays under way.
    destination.stop();
    source.say("status");
    source.await_message("a migration is under way");
    source.say("quit");
    source.await_message("a migration is under way: cancel it first");
    source.say("migrate 127.0.0.1:1");
    source.await_message("a migration is under way");
    source.say("nonsense");
    source.await_message("is not known here");
    source.say("cancel");
    source.finish().report(3).assert_kept("cancelled", &["cancelled"], beats);
    destination.signal(Signal::CONT);
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
}
