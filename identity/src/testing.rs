//! Certificates and keys that tests make for themselves.

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};

use crate::security::{Certificates, Identity, Material, Tls};

/// Of a side that has a key which others of these have too.
pub fn shared_key() -> Tls {
    Tls::new(Identity::SharedKey(Material::bytes([b'k'; 32])))
}

/// Signs, and revokes.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
}

/// What an authority has signed, with its key.
#[derive(Debug)]
pub struct Issued {
    /// In PEM.
    pub certificate: String,
    /// In PEM.
    pub key: String,
    serial: SerialNumber,
}

impl Authority {
    /// Another one each time, also if it has the same name.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// In PEM.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// For these names, of hosts or addresses.
    pub fn issue(&self, names: &[&str]) -> Issued {
        self.issue_until(names, 4096)
    }

    /// The same, valid until that year.
    pub fn issue_until(&self, names: &[&str], year: i32) -> Issued {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).expect("names of hosts");
        (params.not_before, params.not_after) =
            (date_time_ymd(2020, 1, 1), date_time_ymd(year, 1, 1));
        let key = KeyPair::generate().expect("a key");
        let serial = SerialNumber::from_slice(&key.public_key_raw()[1..9]);
        params.serial_number = Some(serial.clone());
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate").pem();
        Issued { certificate, key: key.serialize_pem(), serial }
    }

    /// A list of those, in PEM.
    pub fn revoke(&self, issued: &[&Issued]) -> String {
        let revoked = |issued: &&Issued| RevokedCertParams {
            serial_number: issued.serial.clone(),
            revocation_time: date_time_ymd(2020, 1, 2),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 2),
            next_update: date_time_ymd(4096, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: issued.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).expect("a list").pem().expect("in PEM")
    }

    /// Of a side that has this certificate, and trusts whom this authority does.
    pub fn certificates(&self, issued: &Issued) -> Certificates {
        Certificates {
            certificate: Material::bytes(issued.certificate.as_bytes()),
            key: Material::bytes(issued.key.as_bytes()),
            authority: Material::bytes(self.pem()),
            revoked: Vec::new(),
        }
    }

    /// The same, as a setting.
    pub fn tls(&self, issued: &Issued) -> Tls {
        Tls::new(Identity::Certificates(self.certificates(issued)))
    }
}
