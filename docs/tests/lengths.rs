//! The examples stay as short as the documents say.

/// The one Rust example of a document.
fn example(document: &str) -> Vec<&str> {
    let mut fences = document.split("\n```rust\n").skip(1);
    let fence = fences.next().expect("the document has an example");
    assert!(fences.next().is_none(), "the document has a second example");
    let (example, _) = fence.split_once("\n```\n").expect("the example ends");
    example.lines().collect()
}

#[test]
fn a_vmm_embeds_the_engine_in_100_lines() {
    let lines = example(include_str!("../embedding.md"));
    assert!(lines.contains(&"fn main() -> Result<()> {"), "it is not a whole program");
    assert!(lines.len() <= 100, "{} lines", lines.len());
    assert!(!lines.iter().any(|line| line.contains("unsafe")), "it is not safe");
}

#[test]
fn a_transport_takes_100_lines() {
    let lines = example(include_str!("../transports.md"));
    assert!(lines.contains(&"fn main() -> io::Result<()> {"), "it is not a whole program");
    assert!(lines.len() <= 100, "{} lines", lines.len());
    assert!(!lines.iter().any(|line| line.contains("unsafe")), "it is not safe");
}
