//! For tests.

use pageferry_identity::{KernelTls, Security, Tls, testing};

use crate::options::TcpOptions;

pub use pageferry_identity::testing::{Authority, Issued};

/// A side that has a key which others of these have too.
pub fn shared_key(kernel: KernelTls) -> TcpOptions {
    let tls = Tls { kernel, ..testing::shared_key() };
    TcpOptions { security: Security::Tls(tls), ..TcpOptions::default() }
}
