//! Prints the public API of crates, one item a line, from what `rustdoc --output-format json` wrote.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    for json in std::env::args_os().skip(1) {
        // What is derived, and what a type is by itself, like `Send`, are promises as well. What the compiler
        // has for every type is none.
        let api = public_api::Builder::from_rustdoc_json(json).omit_blanket_impls(true).build()?;
        print!("{api}");
    }
    Ok(())
}
