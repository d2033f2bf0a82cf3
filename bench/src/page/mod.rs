//! `report`: one page of what other commands measured.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::transport::facts::transports;
use pageferry_report::document::{Comparison, Contestant, Document, Kind};
use pageferry_report::facts::Facts;
use pageferry_report::{page, trace};
use serde::Deserialize;

use crate::output::line;
use crate::perftest::WRITE;

pub(crate) const EXAMPLES: &str = "\
Example:
  pageferry-bench migrate --channels 1,2,4 --json > sweep.json
  pageferry-bench latency --json > latency.json
  pageferry-bench compare --json > compare.json
  pageferry-bench report sweep.json latency.json compare.json --out report.html";

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// What `migrate`, `latency`, `compare` and `throughput` printed with --json, and what --events of
    /// `pageferry-vmm` and `pageferry-qemu` wrote.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Where to write the page.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub(crate) out: PathBuf,
    /// Print one JSON object with everything that is on the page.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Writes the page.
pub(crate) fn run(args: &ReportArgs) -> Result<Outcome, Failure> {
    let mut whole: Option<Document> = None;
    for path in &args.files {
        let document = read(path)?;
        match &mut whole {
            Some(whole) => {
                whole.add(document);
                whole.kind = Kind::Report;
            }
            None => whole = Some(document),
        }
    }
    let document = whole.ok_or("there is nothing to report")?;
    fs::write(&args.out, page::render(&document))
        .map_err(|error| format!("failed to write {}: {error}", args.out.display()))?;
    say!("the report is in {}", args.out.display());
    if args.json {
        line(&serde_json::to_string(&document)?)?;
    }
    Ok(Outcome::Completed)
}

fn read(path: &Path) -> Result<Document, Failure> {
    let failed = |error: &(dyn std::error::Error + 'static)| {
        format!("failed to read {}: {}", path.display(), pageferry::Chain::of(error))
    };
    let text = fs::read_to_string(path).map_err(|error| failed(&error))?;
    Document::parse(&text).or_else(|error| {
        if let Some(comparison) = throughput(&text) {
            let mut document = Document::new(Kind::Compare, Facts::here(transports()));
            document.comparisons.push(comparison);
            return Ok(document);
        }
        trace::read(&text).ok_or_else(|| failed(&error).into())
    })
}

/// What `throughput` printed, as a comparison.
fn throughput(text: &str) -> Option<Comparison> {
    #[expect(clippy::struct_field_names, reason = "as the object has them")]
    #[derive(Deserialize)]
    struct Pair {
        engine_gbps: f64,
        bare_gbps: Option<f64>,
        perftest_gbps: Option<f64>,
    }
    #[derive(Deserialize)]
    struct Throughput {
        transport: String,
        channels: u16,
        backing: String,
        memory_bytes: u64,
        pairs: Vec<Pair>,
    }
    let Throughput { transport, channels, backing, memory_bytes, pairs } =
        serde_json::from_str(text).ok()?;
    let mib = memory_bytes >> 20;
    let figures = |figure: fn(&Pair) -> Option<f64>| pairs.iter().filter_map(figure).collect();
    let contestants: [(String, Vec<f64>); 3] = [
        (format!("pageferry, {transport}"), figures(|pair| Some(pair.engine_gbps))),
        ("bare loop".to_owned(), figures(|pair| pair.bare_gbps)),
        (WRITE.to_owned(), figures(|pair| pair.perftest_gbps)),
    ];
    let contestant = |(name, gbps)| Contestant { name, gbps };
    Some(Comparison {
        title: format!("{mib} MiB of {backing} memory, {channels} channels"),
        contestants: contestants
            .into_iter()
            .filter(|it| !it.1.is_empty())
            .map(contestant)
            .collect(),
        missing: Vec::new(),
    })
}
