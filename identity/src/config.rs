//! What TLS is told, of what the host has said. Read anew where it has changed.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{
    AlwaysResolvesClientRawPublicKeys, Resumption, WebPkiServerVerifier, verify_server_name,
};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, ServerConnection, SignatureScheme,
};

use crate::security::{Certificates, Identity, KernelTls, Material, Tls};
use crate::shared_key::{Derived, LEAST_BYTES, Role};
use crate::words::words;

/// Why there can be no session: for who has set it up so.
type Why = String;

/// What a source has made of [`Tls`], for all connections of one link.
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    /// Whom it connects to: as was said, or written. `None` if that is nothing but an address.
    name: Option<ServerName<'static>>,
    kernel: KernelTls,
}

/// What a destination has made of [`Tls`].
#[derive(Debug, Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    kernel: KernelTls,
}

impl Tls {
    /// Whether what it needs is there now, at either side; else why not.
    pub fn check(&self) -> Result<(), String> {
        ClientTls::load(self, "localhost")?;
        ServerTls::load(self)?;
        Ok(())
    }
}

impl ClientTls {
    /// For a link to somebody at that address, as it was written: `host:7400`. Reads files. What fails is for who has
    /// set it up so.
    pub fn load(tls: &Tls, address: &str) -> Result<Self, String> {
        let provider = provider();
        let name = match &tls.peer_name {
            Some(name) => Some(name_of(name)?),
            None => name_of(host(address)).ok(),
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?;
        let mut config = match &tls.identity {
            Identity::Certificates(certificates) => {
                let (chain, key) = own(certificates)?;
                let (roots, revoked) = trusted(certificates)?;
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider);
                let verifier = if revoked.is_empty() {
                    verifier
                } else {
                    verifier.with_crls(revoked).enforce_revocation_expiration()
                };
                let verifier = verifier
                    .build()
                    .map_err(|error| format!("{}: {error}", certificates.authority))?;
                builder
                    .with_webpki_verifier(verifier)
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| unusable_key(certificates, &error))?
            }
            Identity::SharedKey(material) => {
                let Derived { own, other } = derived(material, Role::Source, &provider)?;
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(other)
                    .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                        own,
                    )))
            }
        };
        config.resumption = Resumption::disabled();
        // A destination has one identity, and who listens in need not know its name.
        config.enable_sni = false;
        config.enable_secret_extraction = tls.kernel != KernelTls::Off;
        Ok(Self { config: Arc::new(config), name, kernel: tls.kernel })
    }

    /// Whether data channels are to be encrypted by the kernel.
    pub fn kernel(&self) -> KernelTls {
        self.kernel
    }

    /// A session with who is at that address, before its first byte.
    pub fn session(&self, peer: SocketAddr) -> Result<ClientConnection, String> {
        let name = self.name.clone().unwrap_or_else(|| ServerName::from(peer.ip()));
        ClientConnection::new(Arc::clone(&self.config), name).map_err(unusable)
    }
}

impl ServerTls {
    /// For all who connect. Reads files; [`ServerFiles`](crate::ServerFiles) does where they have changed. What fails is
    /// for who has set it up so.
    pub fn load(tls: &Tls) -> Result<Self, String> {
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?;
        let mut config = match &tls.identity {
            Identity::Certificates(certificates) => {
                let (chain, key) = own(certificates)?;
                let (roots, revoked) = trusted(certificates)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                let verifier = if revoked.is_empty() {
                    verifier
                } else {
                    verifier.with_crls(revoked).enforce_revocation_expiration()
                };
                let verifier = verifier
                    .build()
                    .map_err(|error| format!("{}: {error}", certificates.authority))?;
                let verifier: Arc<dyn ClientCertVerifier> = match &tls.peer_name {
                    None => verifier,
                    Some(name) => Arc::new(Named { verifier, name: name_of(name)? }),
                };
                builder
                    .with_client_cert_verifier(verifier)
                    .with_single_cert(chain, key)
                    .map_err(|error| unusable_key(certificates, &error))?
            }
            Identity::SharedKey(material) => {
                let Derived { own, other } = derived(material, Role::Destination, &provider)?;
                builder
                    .with_client_cert_verifier(other)
                    .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(own)))
            }
        };
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = tls.kernel != KernelTls::Off;
        Ok(Self { config: Arc::new(config), kernel: tls.kernel })
    }

    /// Whether data channels are to be encrypted by the kernel.
    pub fn kernel(&self) -> KernelTls {
        self.kernel
    }

    /// A session with somebody who connects, before its first byte.
    pub fn session(&self) -> Result<ServerConnection, String> {
        ServerConnection::new(Arc::clone(&self.config)).map_err(unusable)
    }
}

/// The host of an address with a port.
fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// Those that the kernel has too, the fastest first.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites =
        vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..default_provider() })
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn unusable(error: Error) -> Why {
    format!("TLS cannot be used: {error}")
}

fn unusable_key(certificates: &Certificates, error: &Error) -> Why {
    let Certificates { certificate, key, .. } = certificates;
    format!("the private key in {key}, for the certificate in {certificate}: {}", words(error))
}

fn name_of(name: &str) -> Result<ServerName<'static>, Why> {
    // The scope of an IPv6 address is this host's own matter.
    let bare = name.split('%').next().unwrap_or(name);
    ServerName::try_from(bare.to_owned())
        .map_err(|_| format!("{name} is neither a host's name nor an IP address"))
}

fn read(material: &Material, what: &str) -> Result<zeroize::Zeroizing<Vec<u8>>, Why> {
    material.read().map_err(|error| format!("{what} {material}: {error}"))
}

/// This side's chain and private key.
fn own(
    certificates: &Certificates,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Why> {
    let chain = certificates_in(&certificates.certificate, "the certificate")?;
    let pem = read(&certificates.key, "the private key")?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        let (material, error) = (&certificates.key, pem_words(error));
        format!("the private key {material}: {error}")
    })?;
    Ok((chain, key))
}

/// Whom it trusts, and whom no longer.
fn trusted(
    certificates: &Certificates,
) -> Result<(Arc<RootCertStore>, Vec<CertificateRevocationListDer<'static>>), Why> {
    let mut roots = RootCertStore::empty();
    for root in certificates_in(&certificates.authority, "the authority's certificate")? {
        roots.add(root).map_err(|error| {
            format!("the authority's certificate {}: {}", certificates.authority, words(&error))
        })?;
    }
    let mut lists = Vec::new();
    for material in &certificates.revoked {
        const WHAT: &str = "the list of revoked certificates";
        let pem = read(material, WHAT)?;
        let before = lists.len();
        for list in CertificateRevocationListDer::pem_slice_iter(&pem) {
            lists.push(list.map_err(|error| format!("{WHAT} {material}: {}", pem_words(error)))?);
        }
        if lists.len() == before {
            return Err(format!("{WHAT} {material}: there is none in it"));
        }
    }
    Ok((Arc::new(roots), lists))
}

fn certificates_in(material: &Material, what: &str) -> Result<Vec<CertificateDer<'static>>, Why> {
    let pem = read(material, what)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates =
        certificates.map_err(|error| format!("{what} {material}: {}", pem_words(error)))?;
    if certificates.is_empty() {
        return Err(format!("{what} {material}: there is none in it (in PEM)"));
    }
    Ok(certificates)
}

fn pem_words(error: rustls::pki_types::pem::Error) -> String {
    match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            "there is none in it (in PEM, and not encrypted)".to_owned()
        }
        error => error.to_string(),
    }
}

fn derived(material: &Material, role: Role, provider: &CryptoProvider) -> Result<Derived, Why> {
    let secret = read(material, "the shared key")?;
    let derived = Derived::of(&secret, role, provider).map_err(unusable)?;
    derived.ok_or_else(|| {
        format!(
            "the shared key {material} has less than {LEAST_BYTES} bytes, which can be guessed; \
             \"head -c 32 /dev/urandom | base64\" makes one"
        )
    })
}

/// A source whose certificate is for one name.
#[derive(Debug)]
struct Named {
    verifier: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
