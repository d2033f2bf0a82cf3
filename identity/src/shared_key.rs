//! Two key pairs of one secret, one for each side.

use std::sync::Arc;

use ring::hkdf;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    SignatureScheme,
};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Fewer can be guessed, also where each is random.
pub(crate) const LEAST_BYTES: usize = 32;

const SEED_BYTES: usize = 32;
/// What is before the seed of a key pair of Ed25519 in PKCS#8 (RFC 8410, section 7).
const PKCS8_HEAD: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];
/// What is before a public key of Ed25519 that says what it is (RFC 8410, section 4).
const SPKI_HEAD: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Which side a key pair is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Role {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Source => b"pageferry source, Ed25519",
            Self::Destination => b"pageferry destination, Ed25519",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What one side has of a secret.
pub(crate) struct Derived {
    pub(crate) own: Arc<CertifiedKey>,
    pub(crate) other: Arc<OtherKey>,
}

impl Derived {
    /// `None` if it is too short.
    pub(crate) fn of(
        secret: &[u8],
        role: Role,
        provider: &CryptoProvider,
    ) -> Result<Option<Self>, Error> {
        let ends = secret.iter().rev().take_while(|byte| b"\r\n".contains(byte)).count();
        let secret = &secret[..secret.len() - ends];
        if secret.len() < LEAST_BYTES {
            return Ok(None);
        }
        let (own, own_public) = key_pair(secret, role)?;
        let (_, other_public) = key_pair(secret, role.other())?;
        let key = any_eddsa_type(&PrivatePkcs8KeyDer::from(own.as_slice()))?;
        let own = Arc::new(CertifiedKey::new(vec![CertificateDer::from(own_public)], key));
        let algorithms = provider.signature_verification_algorithms;
        Ok(Some(Self { own, other: Arc::new(OtherKey { public: other_public, algorithms }) }))
    }
}

/// Private in PKCS#8, and public.
fn key_pair(secret: &[u8], role: Role) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), Error> {
    let failed = |_| Error::General("failed to derive a key".to_owned());
    let mut seed = Zeroizing::new([0; SEED_BYTES]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, b"pageferry shared key 1")
        .extract(secret)
        .expand(&[role.label()], hkdf::HKDF_SHA256)
        .and_then(|key| key.fill(seed.as_mut()))
        .map_err(failed)?;
    let pair = Ed25519KeyPair::from_seed_unchecked(seed.as_ref())
        .map_err(|error| Error::General(format!("failed to derive a key: {error}")))?;
    let mut private = Zeroizing::new(Vec::with_capacity(PKCS8_HEAD.len() + SEED_BYTES));
    private.extend_from_slice(&PKCS8_HEAD);
    private.extend_from_slice(seed.as_ref());
    Ok((private, [&SPKI_HEAD, pair.public_key().as_ref()].concat()))
}

/// The only one that the other side may have.
#[derive(Debug)]
pub(crate) struct OtherKey {
    public: Vec<u8>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl OtherKey {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), Error> {
        // Not secret, but who could try out many would learn what it is.
        if bool::from(self.public.ct_eq(shown)) {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn check_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(shown.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }
}

/// There is no older version here.
fn too_old() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered)
}

impl ServerCertVerifier for OtherKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for OtherKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
