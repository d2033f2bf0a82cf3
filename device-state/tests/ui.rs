//! What the compiler says of declarations that are wrong.
//!
//! Each file of `ui/` is compiled alone. A comment `//~ ERROR text` tells that the line before it
//! has an error whose message begins with the text, `//~v ERROR text` the same of the line after;
//! there must be no other. Only messages and lines are looked at, so that a compiler that draws
//! its errors in another way says the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// (Line, message).
type Errors = BTreeSet<(u64, String)>;

#[test]
fn wrong_declarations_are_refused_where_they_are_wrong() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ui");
    let mut files: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 10, "{files:?}");
    let library = library();
    let wrong: Vec<String> = files.iter().filter_map(|file| check(file, &library)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is wrong with a file's errors.
fn check(file: &Path, library: &Path) -> Option<String> {
    let text = fs::read_to_string(file).unwrap();
    let expected = expected(&text);
    let found = compile(file, library);
    let missing = expected.iter().filter(|(line, message)| {
        !found.iter().any(|(at, text)| at == line && text.starts_with(message))
    });
    let extra = found.iter().filter(|(line, message)| {
        !expected.iter().any(|(at, text)| at == line && message.starts_with(text))
    });
    let lines: Vec<_> = missing
        .map(|(line, message)| format!("  line {line} lacks: {message}"))
        .chain(extra.map(|(line, message)| format!("  line {line} has: {message}")))
        .collect();
    // A file that expects nothing says so by its name.
    let is_to_compile = file.file_name().unwrap().to_string_lossy().starts_with("right_");
    let is_right = lines.is_empty() && expected.is_empty() == is_to_compile;
    (!is_right).then(|| format!("{}:\n{}", file.display(), lines.join("\n")))
}

fn expected(text: &str) -> Errors {
    let mut errors = Errors::new();
    for (line, text) in (1..).zip(text.lines()) {
        let comment = text.trim();
        if let Some(message) = comment.strip_prefix("//~ ERROR ") {
            errors.insert((line - 1, message.to_owned()));
        } else if let Some(message) = comment.strip_prefix("//~v ERROR ") {
            errors.insert((line + 1, message.to_owned()));
        }
    }
    errors
}

/// The errors that the compiler finds.
fn compile(file: &Path, library: &Path) -> Errors {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let compiled = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .arg(file)
        .args(["--edition", "2024", "--crate-type", "lib", "--emit", "metadata"])
        .args(["--error-format", "json", "--cap-lints", "allow", "--out-dir"])
        .arg(out)
        .arg("-L")
        .arg(format!("dependency={}", library.parent().unwrap().display()))
        .arg("--extern")
        .arg(format!("pageferry_device_state={}", library.display()))
        .output()
        .expect("start the compiler");
    let text = String::from_utf8(compiled.stderr).unwrap();
    let diagnostics = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let errors: Errors = diagnostics
        .filter(|diagnostic| diagnostic["level"] == "error")
        .filter_map(|diagnostic| {
            let spans = diagnostic["spans"].as_array()?.clone();
            let primary = spans.iter().find(|span| span["is_primary"] == true)?;
            let line = primary["line_start"].as_u64()?;
            Some((line, diagnostic["message"].as_str()?.to_owned()))
        })
        .collect();
    assert_eq!(compiled.status.success(), errors.is_empty(), "{}: {text}", file.display());
    errors
}

/// The library that this test was linked with: the newest one beside it.
fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = fs::read_dir(test.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let is_library = |path: &PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("libpageferry_device_state-")
            && path.extension().is_some_and(|extension| extension == "rlib")
    };
    built
        .filter(is_library)
        .max_by_key(|path| fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap())
        .expect("the library")
}
