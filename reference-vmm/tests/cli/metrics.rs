//! `--metrics`: how far it is, for Prometheus.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::support::peer::closed_port;
use crate::support::process::Process;
use crate::support::sides::{destination_that_stays, source_that_stays};

/// Where a program serves them.
fn address(process: &mut Process) -> String {
    let said = process.messages();
    let line = said.lines().find_map(|line| line.strip_prefix("metrics at http://"));
    line.and_then(|line| line.strip_suffix("/metrics")).expect("an address").to_owned()
}

fn scrape(address: &str) -> String {
    let mut peer = TcpStream::connect(address).expect("a connection");
    peer.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("a request");
    let mut answer = String::new();
    peer.read_to_string(&mut answer).expect("an answer");
    let (head, page) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    page.to_owned()
}

/// The value of this series on that page.
fn value(page: &str, series: &str) -> Option<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    Some(line.parse().unwrap_or_else(|error| panic!("{series} {line}: {error}")))
}

/// Scrapes until this series has more than that.
fn await_more(address: &str, series: &str, than: f64) -> String {
    let due = Instant::now() + Duration::from_secs(60);
    loop {
        let page = scrape(address);
        if value(&page, series) > Some(than) {
            return page;
        }
        assert!(Instant::now() < due, "{series} is not above {than}: {page}");
    }
}

#[test]
fn both_sides_are_scraped_before_during_and_after() {
    let metrics = "--metrics=127.0.0.1:0";
    let (mut destination, to) = destination_that_stays(&[metrics]);
    let mut source = source_that_stays(&[metrics, "--channels=2", "--downtime-limit=1us"]);
    let [there, here] = [&mut destination, &mut source].map(address);
    assert_eq!(value(&scrape(&here), "pageferry_phase{side=\"source\",phase=\"setup\"}"), None);

    // One that nobody waits for ends too.
    let (_held, nowhere) = closed_port();
    source.say(format!("migrate {nowhere}"));
    let ended = "pageferry_phase{side=\"source\",phase=\"ended\"}";
    await_more(&here, "pageferry_migrations_total{side=\"source\",outcome=\"failed\"}", 0.0);
    let page = await_more(&here, ended, 0.0);
    let elapsed = |page| value(page, "pageferry_elapsed_seconds{side=\"source\"}");
    assert_eq!(elapsed(&scrape(&here)), elapsed(&page));

    source.say(format!("migrate {to}"));
    let page = await_more(&here, "pageferry_round{side=\"source\"}", 3.0);
    let of_source = |name: &str| value(&page, &format!("pageferry_{name}{{side=\"source\"}}"));
    assert!(of_source("expected_downtime_seconds") > Some(1e-6), "{page}");
    assert!(of_source("bytes_per_second") > Some(1e6), "{page}");
    assert!(of_source("downtime_limit_seconds") == Some(1e-6), "{page}");
    assert!(of_source("left_pages") <= of_source("round_pages"), "{page}");
    let landed = |side, page: &str| {
        let of = |channel| {
            format!("pageferry_landed_bytes_total{{side=\"{side}\",channel=\"{channel}\"}}")
        };
        [0, 1].map(|channel| value(page, &of(channel)).unwrap_or_else(|| panic!("{page}")))
    };
    assert!(landed("source", &page).iter().all(|bytes| *bytes > 0.0), "{page}");
    assert!(landed("destination", &scrape(&there)).iter().all(|bytes| *bytes > 0.0));

    // What was set meanwhile is served, and how it ended.
    source.say("downtime-limit 10s");
    let page = await_more(
        &there,
        "pageferry_migrations_total{side=\"destination\",outcome=\"completed\"}",
        0.0,
    );
    assert_eq!(value(&page, "pageferry_phase{side=\"destination\",phase=\"ended\"}"), Some(1.0));
    let ended = source.finish();
    ended.assert_status(0);
    ended.reports.last().expect("a report").assert_departed();
    destination.say("quit");
    destination.finish().assert_status(0);
}

#[test]
fn a_port_that_is_taken_is_told() {
    let (mut other, _) = destination_that_stays(&["--metrics=127.0.0.1:0"]);
    let taken = address(&mut other);
    let mut second =
        Process::start("second", &["receive", "--listen=127.0.0.1:0", "--metrics", &taken]);
    second.await_message(&format!("--metrics {taken}: "));
    assert_eq!(second.finish_for_people().0, Some(1));
}
