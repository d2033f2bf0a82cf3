//! The system calls that docs/embedding.md lists for filters.

use std::collections::{BTreeMap, BTreeSet};

/// By the beginning of a thread's name: what it may call. "every one" is in each.
pub(crate) fn system_calls() -> BTreeMap<String, BTreeSet<String>> {
    let document = include_str!("../../../docs/embedding.md");
    let (_, section) = document.split_once("\n### System calls\n").expect("the section");
    let rows = section.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let mut table = BTreeMap::new();
    for row in rows.take_while(|line| line.starts_with('|')) {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        // "None but those of every thread" is no name.
        let listed = cells[1].split(", ").filter(|call| !call.contains(' '));
        let listed = listed.map(str::to_owned).collect();
        table.insert(cells[0].to_owned(), listed);
    }
    table
}
