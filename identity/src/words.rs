//! What it means that TLS says no, and what to do.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

/// An error of TLS in the words of who has to mend it.
pub fn words(error: &Error) -> String {
    use CertificateError as Bad;
    const THEIRS: &str = "the other side's certificate";
    match error {
        Error::InvalidCertificate(bad) => match bad {
            Bad::Expired | Bad::ExpiredContext { .. } => {
                format!("{THEIRS} has expired, or the clocks differ ({bad})")
            }
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                format!("{THEIRS} is not valid yet, or the clocks differ ({bad})")
            }
            Bad::Revoked => format!("{THEIRS} is revoked"),
            Bad::UnknownIssuer => {
                format!("{THEIRS} is not signed by an authority that this side trusts")
            }
            Bad::BadSignature => {
                format!(
                    "{THEIRS} is not signed by the authority whose name it bears and that this side trusts"
                )
            }
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                format!("{THEIRS} is for another name ({bad})")
            }
            Bad::UnknownRevocationStatus => {
                format!("{THEIRS} is covered by none of the lists of revoked certificates")
            }
            Bad::ExpiredRevocationList | Bad::ExpiredRevocationListContext { .. } => {
                format!("the list of revoked certificates has expired ({bad})")
            }
            Bad::ApplicationVerificationFailure => {
                "the other side has another shared key".to_owned()
            }
            bad => format!("{THEIRS} is not accepted: {bad}"),
        },
        Error::InvalidCertRevocationList(bad) => {
            format!("a list of revoked certificates cannot be used: {bad:?}")
        }
        Error::NoCertificatesPresented => "the other side shows no certificate".to_owned(),
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => {
            "the other side does not speak TLS: it takes plain text, or is no pageferry".to_owned()
        }
        Error::PeerIncompatible(
            PeerIncompatible::IncorrectCertificateTypeExtension
            | PeerIncompatible::UnsolicitedCertificateTypeExtension,
        ) => "one side has a shared key, and the other one certificates".to_owned(),
        Error::DecryptError => {
            "what came was changed on the way, or made up (bad record MAC)".to_owned()
        }
        Error::AlertReceived(alert) => alert_words(*alert),
        error => error.to_string(),
    }
}

/// What the other side says of this one (RFC 8446, section 6.2).
fn alert_words(alert: AlertDescription) -> String {
    use AlertDescription as Alert;
    let what = match alert {
        Alert::UnknownCA | Alert::DecryptError => {
            "this side's certificate is not signed by an authority that it trusts, or covered by no list of \
             revoked ones that still holds; its log says which"
        }
        Alert::CertificateExpired => {
            "this side's certificate is not valid now: it has expired, or is not valid yet, or the clocks differ"
        }
        Alert::CertificateRevoked => "this side's certificate is revoked",
        Alert::CertificateRequired => "this side shows no certificate",
        Alert::BadCertificate | Alert::CertificateUnknown | Alert::UnsupportedCertificate => {
            "this side's certificate is not accepted: it is for another name or purpose; the other side's log \
             says which"
        }
        Alert::AccessDenied => "this side has another shared key",
        Alert::BadRecordMac => "what came there was changed on the way, or made up",
        Alert::HandshakeFailure | Alert::ProtocolVersion => {
            "no version, cipher or kind of key that both have: one side may have a shared key, and the other \
             one certificates"
        }
        _ => return format!("the other side ends it: {alert:?}"),
    };
    format!("the other side says: {what}")
}
