//! Compiles and runs the examples of the documents beside this crate, from their own text:
//! `cargo test --doc -p pageferry-docs`.

#[cfg(doctest)]
#[doc = include_str!("../embedding.md")]
struct Embedding;

#[cfg(doctest)]
#[doc = include_str!("../async.md")]
struct Async;

#[cfg(doctest)]
#[doc = include_str!("../transports.md")]
struct Transports;

#[cfg(doctest)]
#[doc = include_str!("../device-state.md")]
struct DeviceState;
