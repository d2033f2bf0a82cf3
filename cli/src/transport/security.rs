//! Who may be at the other end, and who can read what passes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pageferry_tcp::{Certificates, Identity, KernelTls, Material, Security, Tls};

use crate::units::{options, value_name};

/// Settings of both sides, which need the same. With none of them plain text goes no further than this host.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Encryption and identity (both sides need the same)")]
pub struct SecurityArgs {
    /// A key that only the two sides have, 32 bytes or more: "head -c 32 /dev/urandom | base64" makes one.
    #[arg(long, value_name = "FILE", group = "identity")]
    pub shared_key: Option<PathBuf>,
    /// This side's certificate, and those between it and the authority, in PEM.
    #[arg(long, value_name = "FILE", group = "identity", requires_all = ["tls_key", "tls_ca"])]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert", conflicts_with = "shared_key")]
    pub tls_key: Option<PathBuf>,
    /// Certificates of the authorities by which the other side's must be signed, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert", conflicts_with = "shared_key")]
    pub tls_ca: Option<PathBuf>,
    /// Lists of certificates that no longer hold, in PEM; several times where there are several [default: none is
    /// asked].
    #[arg(long, value_name = "FILE", requires = "tls_cert", conflicts_with = "shared_key")]
    pub tls_crl: Vec<PathBuf>,
    /// The name that the other side's certificate must be for [default: at the source the host it connects to, at
    /// the destination any].
    #[arg(long, value_name = "NAME", requires = "tls_cert", conflicts_with = "shared_key")]
    pub tls_peer_name: Option<String>,
    /// Have the kernel encrypt what data channels carry (modprobe tls), without a copy in this process [default:
    /// auto].
    #[arg(long, value_name = "WHEN", requires = "identity")]
    pub kernel_tls: Option<KernelTlsChoice>,
    /// Plain text, also to and from other hosts: whoever is on the way can read the guest's memory, and change it.
    #[arg(long, conflicts_with_all = ["identity", "tls_key", "tls_ca", "tls_crl", "tls_peer_name", "kernel_tls"])]
    pub insecure: bool,
}

/// Whether the kernel encrypts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KernelTlsChoice {
    /// Where it can.
    Auto,
    /// Never.
    Off,
    /// Always; the migration fails where it cannot.
    On,
}

impl From<KernelTlsChoice> for KernelTls {
    fn from(choice: KernelTlsChoice) -> Self {
        match choice {
            KernelTlsChoice::Auto => Self::Auto,
            KernelTlsChoice::Off => Self::Off,
            KernelTlsChoice::On => Self::On,
        }
    }
}

impl SecurityArgs {
    /// What the sockets of a link are told.
    pub fn security(&self) -> Security {
        let file = |path: &Option<PathBuf>| Material::File(path.clone().unwrap_or_default());
        let identity = match (&self.shared_key, &self.tls_cert) {
            (Some(_), _) => Identity::SharedKey(file(&self.shared_key)),
            (None, Some(_)) => Identity::Certificates(Certificates {
                certificate: file(&self.tls_cert),
                key: file(&self.tls_key),
                authority: file(&self.tls_ca),
                revoked: self.tls_crl.iter().cloned().map(Material::File).collect(),
            }),
            (None, None) if self.insecure => return Security::PlainText,
            (None, None) => return Security::WithinHost,
        };
        Security::Tls(Tls {
            peer_name: self.tls_peer_name.clone(),
            kernel: self.kernel_tls.map_or_else(KernelTls::default, KernelTls::from),
            ..Tls::new(identity)
        })
    }

    /// As options of a command line.
    pub fn to_command_line(&self) -> Vec<String> {
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut list = options([
            ("shared-key", self.shared_key.as_ref().map(path)),
            ("tls-cert", self.tls_cert.as_ref().map(path)),
            ("tls-key", self.tls_key.as_ref().map(path)),
            ("tls-ca", self.tls_ca.as_ref().map(path)),
            ("tls-peer-name", self.tls_peer_name.clone()),
            ("kernel-tls", self.kernel_tls.as_ref().map(value_name)),
        ]);
        list.extend(options(self.tls_crl.iter().map(|list| ("tls-crl", Some(path(list))))));
        list.extend(self.insecure.then(|| "--insecure".to_owned()));
        list
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        security: SecurityArgs,
    }

    /// What would be ignored is refused: nobody is in plain text, or trusts more, without a word.
    #[test]
    fn what_does_not_belong_together_is_refused() {
        let refused = [
            "--insecure --shared-key k",
            "--insecure --tls-cert c --tls-key k --tls-ca a",
            "--insecure --tls-ca a",
            "--insecure --tls-key k --tls-peer-name n",
            "--insecure --kernel-tls on",
            "--kernel-tls on",
            "--shared-key k --tls-cert c --tls-key k --tls-ca a",
            "--shared-key k --tls-ca a",
            "--shared-key k --tls-crl l",
            "--shared-key k --tls-peer-name n",
            "--tls-cert c",
            "--tls-cert c --tls-key k",
            "--tls-cert c --tls-ca a",
            "--tls-key k --tls-ca a",
            "--tls-crl l",
        ];
        let parse =
            |given: &str| Command::try_parse_from(["program"].into_iter().chain(given.split(' ')));
        for given in refused {
            assert!(parse(given).is_err(), "{given}");
        }
        for given in [
            "--insecure",
            "--shared-key k --kernel-tls off",
            "--tls-cert c --tls-key k --tls-ca a --kernel-tls on",
        ] {
            assert!(parse(given).is_ok(), "{given}");
        }
    }
}
