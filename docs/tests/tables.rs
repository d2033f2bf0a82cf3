//! What the documents and the sources both lay out is the same in both.

#[test]
fn the_preamble_is_in_the_protocol_as_it_is_in_the_source() {
    let protocol = include_str!("../protocol.md");
    let source = include_str!("../../transport-tcp/src/preamble.rs");
    let rows = source.lines().filter_map(|line| line.strip_prefix("//! |"));
    let rows: Vec<_> =
        rows.map(|row| format!("|{row}").replace("[status](Status)", "status")).collect();
    assert!(rows.len() > 10, "{rows:?}");
    let statuses = source.lines().filter_map(|line| line.strip_prefix("    /// "));
    let statuses = statuses.filter_map(|line| line.strip_suffix('.')?.split_once(": "));
    let statuses = statuses.filter(|(code, _)| code.parse::<u8>().is_ok());
    let statuses: Vec<_> = statuses.map(|(code, what)| format!("| {code} | {what} |")).collect();
    assert_eq!(statuses.len(), 8, "{statuses:?}");
    for row in rows.into_iter().chain(statuses) {
        assert!(protocol.lines().any(|line| line == row), "{row} is not in protocol.md");
    }
}
