//! The fields of a report and their order, as others' scripts rely on them. A field that is new changes the
//! snapshot and `docs/report.md`.

use pageferry_cli::report::Report;

#[test]
fn the_fields_of_a_report_are_a_contract() {
    let report = Report::of_failure("tcp", "a reason".to_owned());
    insta::assert_snapshot!("failure", serde_json::to_string_pretty(&report).expect("JSON"));
}
