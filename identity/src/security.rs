//! Who may be at the other end, and who can read what passes between.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use zeroize::Zeroizing;

/// How the connections of a link are kept from others; both sides need the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Security {
    /// Plain text, from an address to itself or over the loopback device, and nowhere else: what stays within one host
    /// can only be read by who may read the guest's memory anyway. A connection to or from another host fails with
    /// `TransportError::Security`; so does one that is given. Sockets
    /// of a kind that has no IP addresses, and tunnels that begin on this host, are the host's own matter.
    #[default]
    WithinHost,
    /// Plain text, wherever it goes: whoever is on the way reads the guest's memory, and can change it.
    PlainText,
    /// TLS 1.3, where both sides prove who they are.
    Tls(Tls),
}

/// Settings of TLS.
///
/// Both sides prove who they are before either says anything of the guest, and a stranger has no place at the destination. There is no resumption, no early data and no older version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Who this side is, and whom it takes for the other one.
    pub identity: Identity,
    /// The name that the other side's certificate must be for (DNS name or IP address, among its subject's
    /// alternative names). `None`: at the source the host that it connects to, at the destination any that the
    /// authority has signed. Of no meaning with a shared key.
    pub peer_name: Option<String>,
    /// Whether data channels are encrypted by the kernel.
    pub kernel: KernelTls,
}

impl Tls {
    /// By this identity, and all else as it is best.
    pub fn new(identity: Identity) -> Self {
        Self { identity, peer_name: None, kernel: KernelTls::default() }
    }
}

/// Whether the kernel encrypts and decrypts what data channels carry (`Documentation/networking/tls.rst`): pages go
/// straight from and into guest memory then, as in plain text. Each side decides for itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KernelTls {
    /// Where the kernel has it (`modprobe tls`).
    #[default]
    Auto,
    /// Never: in user space, with a copy of each page.
    Off,
    /// Always. Fails where the kernel does not have it.
    On,
}

/// What proves who this side is, and shows that the other one is who it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// X.509 certificates.
    Certificates(Certificates),
    /// A key that only the two sides have: 32 bytes or more that nobody can guess, also not by trying out as many as a
    /// computer can: no pass phrase. Ends of lines at its end do not count.
    ///
    /// Each side derives a key pair of Ed25519 for itself and one for the other (HKDF-SHA-256), and they are raw
    /// public keys to TLS (RFC 7250). So the key exchange is ephemeral: who learns the key later cannot read what
    /// was sent before.
    SharedKey(Material),
}

/// In PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates {
    /// This side's, and those between it and the authority.
    pub certificate: Material,
    /// Its private key, in PKCS#8, PKCS#1 or SEC1.
    pub key: Material,
    /// Of the authorities by which the other side's must be signed.
    pub authority: Material,
    /// Lists of certificates that no longer hold. If there are any, each certificate of the other side's chain
    /// must be covered by one that has not expired.
    pub revoked: Vec<Material>,
}

/// A file, which is read for each link so that it may be replaced meanwhile; or what is in it.
#[derive(Clone, PartialEq, Eq)]
pub enum Material {
    /// Where it is.
    File(PathBuf),
    /// What it is. Overwritten when it is dropped.
    Bytes(Zeroizing<Vec<u8>>),
}

/// Larger than any key, chain or list that makes sense.
const MOST_BYTES: u64 = 16 << 20;

impl Material {
    /// In memory.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Bytes(Zeroizing::new(bytes.into()))
    }

    pub(crate) fn read(&self) -> io::Result<Zeroizing<Vec<u8>>> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::File(path) => {
                let unfit = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
                // A pipe would give it once, or have everybody wait.
                if !fs::metadata(path)?.is_file() {
                    return unfit("it is no regular file".to_owned());
                }
                let mut bytes = Zeroizing::new(Vec::new());
                File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
                if bytes.len() as u64 > MOST_BYTES {
                    return unfit(format!("it has more than {MOST_BYTES} bytes"));
                }
                Ok(bytes)
            }
        }
    }
}

/// What tells whether a file is another one, or was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp {
    file: (u64, u64, u64),
    /// When, by the kernel's clock of files.
    pub(crate) changed: SystemTime,
}

#[cfg(test)]
impl Stamp {
    pub(crate) fn of(file: (u64, u64, u64), changed: SystemTime) -> Self {
        Self { file, changed }
    }
}

impl Material {
    /// Of a file that is there.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        let Self::File(path) = self else { return None };
        let metadata = fs::metadata(path).ok()?;
        let since = Duration::new(
            metadata.ctime().try_into().ok()?,
            metadata.ctime_nsec().try_into().ok()?,
        );
        let file = (metadata.dev(), metadata.ino(), metadata.len());
        Some(Stamp { file, changed: SystemTime::UNIX_EPOCH + since })
    }
}

impl Identity {
    pub(crate) fn materials(&self) -> impl Iterator<Item = &Material> {
        let (each, lists) = match self {
            Self::SharedKey(key) => ([Some(key), None, None], &[][..]),
            Self::Certificates(Certificates { certificate, key, authority, revoked }) => {
                ([Some(certificate), Some(key), Some(authority)], &revoked[..])
            }
        };
        each.into_iter().flatten().chain(lists)
    }
}

impl From<&Path> for Material {
    fn from(path: &Path) -> Self {
        Self::File(path.to_owned())
    }
}

impl From<PathBuf> for Material {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

/// The file's name; of what is in memory only that.
impl fmt::Display for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Bytes(_) => f.write_str("the one in memory"),
        }
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Bytes(_) => f.debug_struct("Bytes").finish_non_exhaustive(),
        }
    }
}
