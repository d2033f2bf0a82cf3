//! Who may be at the other end of a link of [pageferry](https://docs.rs/pageferry), and what a host says of that: a shared
//! key, or certificates. Transports make sessions of TLS 1.3 of it, each in its own way.
//!
//! A host says it by [`Security`], among the options of its transport. [`ClientTls`] and [`ServerTls`] are for authors
//! of transports: what a source and a destination have made of it, and [`words()`] for what may be wrong.
//!
//! # Thread safety
//!
//! All of it is plain data: [`Send`] and [`Sync`], and nothing waits.

mod config;
mod files;
mod security;
mod shared_key;
#[cfg(feature = "test-support")]
pub mod testing;
mod words;

pub use config::{ClientTls, ServerTls};
pub use files::ServerFiles;
pub use security::{Certificates, Identity, KernelTls, Material, Security, Tls};
pub use words::words;
