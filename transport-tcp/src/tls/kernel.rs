//! TLS by the kernel (`Documentation/networking/tls.rst`): sockets encrypt and decrypt by themselves.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use ktls_core::{
    ConnectionTrafficSecrets, Error, ProtocolVersion, TlsCryptoInfoRx, TlsCryptoInfoTx,
    setup_tls_params, setup_ulp,
};
use rustls::ExtractedSecrets;
use socket2::{Domain, Socket, Type};

/// Most records under one key: what AES-GCM may have (RFC 8446, section 5.5; rustls goes by 2^24), without what a batch
/// or a queue may add before it is looked at again.
const MOST_RECORDS: u64 = (1 << 24) - (1 << 16);
/// Most bytes of a record.
const RECORD_BYTES: usize = 16 << 10;

/// Why this kernel does not do it; `None` if it does.
pub(crate) fn unavailable() -> Option<&'static str> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let why = || {
        let error = probe().err()?;
        Some(format!(
            "this kernel has no TLS for sockets ({error}); modprobe tls, if it is a module"
        ))
    };
    WHY.get_or_init(why).as_deref()
}

/// A socket that is not connected cannot have it, which is what a kernel says that knows it.
fn probe() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    match setup_ulp(&socket).map_err(io_error) {
        Err(error) if error.raw_os_error() != Some(libc::ENOTCONN) => Err(error),
        _ => Ok(()),
    }
}

/// Has the kernel go on with a session that stands at these secrets.
pub(crate) fn take_over(socket: BorrowedFd<'_>, secrets: ExtractedSecrets) -> io::Result<()> {
    set(socket, secrets).map_err(io_error)
}

fn set(socket: BorrowedFd<'_>, secrets: ExtractedSecrets) -> Result<(), Error> {
    let ExtractedSecrets { tx: (sent, sending), rx: (received, receiving) } = secrets;
    let version = ProtocolVersion::TLSv1_3;
    let sending =
        TlsCryptoInfoTx::new(version, ConnectionTrafficSecrets::try_from(sending)?, sent)?;
    let receiving =
        TlsCryptoInfoRx::new(version, ConnectionTrafficSecrets::try_from(receiving)?, received)?;
    setup_ulp(&socket)?;
    setup_tls_params(&socket, &sending, &receiving)
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Ulp(cause) | Error::CryptoMaterial(cause) => cause,
        error => io::Error::other(error),
    }
}

/// How many records a key has protected.
#[derive(Debug, Default)]
pub(crate) struct Records(AtomicU64);

impl Records {
    /// So many bytes were sent by one call, which ends a record.
    pub(crate) fn note(&self, bytes: usize) {
        self.0.fetch_add(bytes.div_ceil(RECORD_BYTES) as u64, Ordering::Relaxed);
    }

    pub(crate) fn are_too_many(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MOST_RECORDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 255 GiB in full records, and no more by shorter ones.
    #[test]
    fn a_key_is_used_up_before_it_matters() {
        let full = Records::default();
        for _ in 0..(255_usize << 30) / (4 << 20) {
            assert!(!full.are_too_many());
            full.note(4 << 20);
        }
        assert!(full.are_too_many());
        let short = Records::default();
        (1..MOST_RECORDS).for_each(|_| short.note(1));
        assert!(!short.are_too_many());
        short.note(1);
        assert!(short.are_too_many());
    }
}
