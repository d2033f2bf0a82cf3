//! One HTML file: styles and drawings inside, no script, nothing from elsewhere.

mod comparison;
mod latency;
mod migration;
mod throughput;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::document::{Document, Kind, median};
use crate::facts::{Facts, TransportFacts};
use crate::plot::{bytes, duration_ns, number};

const STYLE: &str = include_str!("style.css");

/// The page that shows a document.
pub fn render(document: &Document) -> String {
    let title = match document.kind {
        Kind::Demo => "A live migration",
        Kind::Migrate => "Live migrations",
        Kind::Latency => "Latencies",
        Kind::Compare => "pageferry and others",
        Kind::Report => "pageferry, measured",
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { (title) }
                    p { (place(&document.facts)) }
                    (cards(document))
                    (migration::overview(&document.migrations))
                    (comparison::all(&document.comparisons))
                    (latency::all(&document.latencies))
                    (migration::each(&document.migrations))
                    (facts(document))
                    footer { "pageferry " (document.facts.version) ", schema " (document.schema) "." }
                }
            }
        }
    }
    .into_string()
}

/// In a line, what it was measured on.
fn place(facts: &Facts) -> String {
    let cpus = if facts.cpus == 1 { "CPU" } else { "CPUs" };
    let memory = bytes(facts.memory_bytes as f64);
    format!("{} {cpus} of {}, {memory}, Linux {}", facts.cpus, facts.cpu, facts.kernel)
}

fn cards(document: &Document) -> Markup {
    let mut cards: Vec<(String, &str)> = Vec::new();
    let migrations = &document.migrations;
    let completed: Vec<_> = migrations.iter().filter(|each| each.outcome == "completed").collect();
    if !migrations.is_empty() {
        cards
            .push((format!("{} of {}", completed.len(), migrations.len()), "migrations completed"));
    }
    if let Some(downtime) = median(completed.iter().map(|each| each.downtime_ms)) {
        cards.push((duration_ns(downtime * 1e6), "median downtime"));
    }
    let fastest = completed.iter().map(|each| each.throughput_gbps).reduce(f64::max);
    if let Some(fastest) = fastest {
        cards.push((format!("{} Gb/s", number(fastest)), "highest mean throughput"));
    }
    let copied = migrations.iter().map(|each| each.user_copied_bytes).max();
    if let Some(copied) = copied {
        cards.push((bytes(copied as f64), "copied in user space"));
    }
    html! {
        @if !cards.is_empty() {
            div.cards {
                @for (figure, name) in cards { div.card { b { (figure) } span { (name) } } }
            }
        }
    }
}

fn facts(document: &Document) -> Markup {
    let facts = &document.facts;
    let or_unknown = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.into() };
    let rows = [
        ("CPU", format!("{}, {} of them", or_unknown(&facts.cpu), facts.cpus)),
        ("kernel", or_unknown(&facts.kernel)),
        ("memory", bytes(facts.memory_bytes as f64)),
        ("transparent huge pages", or_unknown(&facts.thp)),
        ("the same of shared memory", or_unknown(&facts.thp_shmem)),
        ("reserved huge pages of 2 MiB", facts.huge_pages.to_string()),
        ("load average before", or_unknown(&facts.load_average)),
        ("sent zero-copy", zero_copy(document)),
    ];
    html! {
        h2 { "The machine" }
        div.table {
            table {
                tbody {
                    @for (name, value) in rows { tr { th { (name) } td { (value) } } }
                    @for transport in &facts.transports {
                        tr {
                            th { "transport " (transport.name) }
                            td { span class=(class(transport)) { (transport.can) } }
                        }
                    }
                }
            }
        }
    }
}

/// What a machine does not have is no failure.
fn class(transport: &TransportFacts) -> &'static str {
    match transport {
        TransportFacts { available: true, .. } => "",
        TransportFacts { failed: true, .. } => "bad",
        _ => "absent",
    }
}

/// Whether zero-copy was what it says.
fn zero_copy(document: &Document) -> String {
    let of = |bytes: fn(&crate::document::ZeroCopy) -> u64| -> u64 {
        document.migrations.iter().map(|each| bytes(&each.zero_copy)).sum()
    };
    let (sent, copied) = (of(|counts| counts.sent_bytes), of(|counts| counts.copied_bytes));
    match (sent, copied) {
        (0, _) => "nothing".to_owned(),
        (sent, 0) => format!("{}, and the kernel copied none of it", bytes(sent as f64)),
        (sent, copied) if sent == copied => {
            format!("{}, and the kernel copied all of it after all", bytes(sent as f64))
        }
        (sent, copied) => {
            let (sent, copied) = (bytes(sent as f64), bytes(copied as f64));
            format!("{sent}, and the kernel copied {copied} of it after all")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_failed_is_red() {
        let mut document = Document::new(Kind::Demo, Facts::default());
        document.facts.transports = serde_json::from_value(serde_json::json!([
            {"name": "tcp", "available": true, "can": "sendmsg"},
            {"name": "rdma", "available": false, "can": "no RDMA device"},
            {"name": "iouring", "available": false, "failed": true, "can": "failed to set up a ring"},
        ]))
        .unwrap();
        let page = facts(&document).into_string();
        for (class, can) in
            [("", "sendmsg"), ("absent", "no RDMA device"), ("bad", "failed to set up a ring")]
        {
            assert!(
                page.contains(&format!("<span class=\"{class}\">{can}</span>")),
                "{can}: {page}"
            );
        }
    }
}
