//! Which certificate a server shows, for the words about one that is not trusted: whose it is and who signed it. TLS libraries
//! do not say, so the server is asked for it once more, over a handshake that is never finished.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};

use super::reach::Reach;
use crate::reference::{Address, Connection};
use crate::store::error::one_line;

/// It only improves the wording.
const TIME: Duration = Duration::from_secs(2);
/// Longest name that is repeated, in characters: enough for a common name and an organisation.
const LONGEST: usize = 120;

/// Names of a certificate.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    /// Whose it is.
    pub(super) subject: String,
    /// Who signed it.
    pub(super) issuer: String,
}

/// Asks; `None` where the server is behind a proxy, or shows nothing that can be read.
pub(super) async fn certificate(address: &Address, connection: &Connection, reach: &Reach) -> Option<Shown> {
    if connection.proxy.is_some() || !address.is_https() {
        return None;
    }
    let name = connection.server_name.clone();
    let (address, reach) = (address.clone(), reach.clone());
    let asking = tokio::task::spawn_blocking(move || ask(&address, name.as_deref(), &reach));
    let certificate = tokio::time::timeout(2 * TIME, asking).await.ok()?.ok()??;
    names(&certificate)
}

/// Blocks.
fn ask(address: &Address, name: Option<&str>, reach: &Reach) -> Option<Vec<u8>> {
    let host = address.url().host_str()?.trim_matches(['[', ']']);
    let port = address.url().port_or_known_default()?;
    let mut there = (host, port).to_socket_addrs().ok()?.filter(|there| reach.may(there.ip()));
    let mut stream = TcpStream::connect_timeout(&there.next()?, TIME).ok()?;
    stream.set_read_timeout(Some(TIME)).ok()?;
    stream.set_write_timeout(Some(TIME)).ok()?;
    let recorder = Arc::new(Recorder::default());
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .ok()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&recorder) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    let name = ServerName::try_from(name.unwrap_or(host).to_owned()).ok()?;
    let mut handshake = ClientConnection::new(Arc::new(config), name).ok()?;
    // It always fails: the recorder trusts nobody.
    let _ = handshake.complete_io(&mut stream);
    recorder.0.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Keeps the server's own certificate, and trusts none.
#[derive(Debug, Default)]
struct Recorder(Mutex<Option<Vec<u8>>>);

impl ServerCertVerifier for Recorder {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(certificate.to_vec());
        Err(CertificateError::UnknownIssuer.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(CertificateError::UnknownIssuer.into())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(CertificateError::UnknownIssuer.into())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Reads subject and issuer of a certificate (RFC 5280, section 4.1).
fn names(certificate: &[u8]) -> Option<Shown> {
    let (certificate, _) = element(certificate, 0x30)?;
    let (signed, _) = element(certificate, 0x30)?;
    // The version may be left out.
    let rest = element(signed, 0xa0).map_or(signed, |(_, rest)| rest);
    let (_, rest) = element(rest, 0x02)?;
    let (_, rest) = element(rest, 0x30)?;
    let (issuer, rest) = element(rest, 0x30)?;
    let (_, rest) = element(rest, 0x30)?;
    let (subject, _) = element(rest, 0x30)?;
    Some(Shown { subject: name(subject), issuer: name(issuer) })
}

/// `CN=vault, O=Example`: what people look at of a name.
fn name(mut rest: &[u8]) -> String {
    let mut parts = Vec::new();
    while let Some((set, after)) = element(rest, 0x31) {
        rest = after;
        let Some((pair, _)) = element(set, 0x30) else { continue };
        let Some((kind, value)) = element(pair, 0x06) else { continue };
        let kind = match kind {
            [0x55, 4, 3] => "CN",
            [0x55, 4, 10] => "O",
            [0x55, 4, 11] => "OU",
            _ => continue,
        };
        let text = any_element(value).map(|(_, text, _)| String::from_utf8_lossy(text).into_owned());
        parts.push(format!("{kind}={}", text.unwrap_or_default()));
    }
    let text = one_line(&parts.join(", "));
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None if text.is_empty() => "no name".to_owned(),
        None => text,
    }
}

/// Content of the first element, which must have this tag, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    any_element(bytes).filter(|(found, ..)| *found == tag).map(|(_, content, rest)| (content, rest))
}

/// Tag and content of the first element of DER, and what follows it.
fn any_element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match usize::from(first) {
        short @ 0..=127 => (short, rest),
        // No certificate has lengths of more than three bytes.
        long @ 129..=131 => {
            let (digits, rest) = rest.split_at_checked(long - 128)?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(name: &str) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["vault.example".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "XX");
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, name);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn common_name_and_organisation_are_told_on_one_short_line() {
        let shown = names(&certificate("vault\nCA")).unwrap();
        assert_eq!(shown.subject, "O=Example, CN=vault CA");
        assert_eq!(shown.issuer, shown.subject);
        let long = names(&certificate(&"é".repeat(500))).unwrap().subject;
        assert_eq!((long.chars().count(), long.chars().last()), (LONGEST + 1, Some('…')));
        assert_eq!(name(&[]), "no name");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let mut bytes = certificate("vault");
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = names(&bytes);
        }
    }
}
