//! Transport errors in people's words: what the network or TLS said, and what to change.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError};

use super::super::{ErrorKind, error::one_line};
use super::CONNECT_TIMEOUT;
use super::reach::{Local, Reach};
use super::shown::{self, Shown};
use crate::reference::{Address, Connection, Pem};

/// A transport error in words.
pub(super) struct Words {
    pub(super) kind: ErrorKind,
    pub(super) answered: String,
    pub(super) remedy: Option<String>,
}

/// Words for an exchange with `address` that gave no answer.
pub(super) async fn words(
    error: &reqwest::Error,
    address: &Address,
    connection: &Connection,
    reach: &Reach,
) -> Words {
    if let Some(tls) = find::<rustls::Error>(error) {
        let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let shown = if *tls == unknown { shown::certificate(address, connection, reach).await } else { None };
        return tls_words(tls, address, connection, shown);
    }
    if find::<Local>(error).is_some() {
        return local();
    }
    let (kind, answered, remedy) = if error.is_dns() {
        let host = address.url().host_str().unwrap_or_default();
        (
            ErrorKind::Unreachable,
            format!("the host name {host} does not resolve"),
            "check the address and this node's DNS".to_owned(),
        )
    } else if error.is_connect() && error.is_timeout() {
        (
            ErrorKind::Unreachable,
            format!("no connection within {CONNECT_TIMEOUT:?}"),
            "check the address, and that a firewall or network policy lets this node reach it".to_owned(),
        )
    } else if find::<io::Error>(error).is_some_and(|io| io.kind() == io::ErrorKind::ConnectionRefused) {
        (
            ErrorKind::Unreachable,
            "connection refused".to_owned(),
            "check that the store is running and listens at this address".to_owned(),
        )
    } else {
        let kind = if error.is_connect() { ErrorKind::Unreachable } else { ErrorKind::Unavailable };
        return Words { kind, answered: root(error), remedy: None };
    };
    Words { kind, answered, remedy: Some(remedy) }
}

/// Words for an address that is out of reach, whether it was written or a name led to it.
pub(super) fn local() -> Words {
    Words {
        kind: ErrorKind::Refused,
        answered: format!("not asked: {Local}"),
        remedy: Some(
            "correct the address, or have the operator set allowLocalAddresses: true for the agent"
                .to_owned(),
        ),
    }
}

fn tls_words(
    error: &rustls::Error,
    address: &Address,
    connection: &Connection,
    shown: Option<Shown>,
) -> Words {
    use CertificateError as Fault;
    let expected = connection.server_name.as_deref().or(address.url().host_str()).unwrap_or_default();
    let whose = shown.map(|Shown { subject, issuer }| format!(" ({subject}, signed by {issuer})"));
    let (answered, remedy) = match error {
        rustls::Error::InvalidCertificate(fault) => match fault {
            Fault::UnknownIssuer | Fault::BadSignature => (
                format!(
                    "the certificate of {expected}{} is not signed by {}",
                    whose.unwrap_or_default(),
                    trusted(connection)
                ),
                "name the CA that signed the store's certificate".to_owned(),
            ),
            Fault::Expired | Fault::ExpiredContext { .. } => (
                format!("the certificate of {expected} has expired"),
                "renew the store's certificate, or correct this node's clock".to_owned(),
            ),
            Fault::NotValidYet | Fault::NotValidYetContext { .. } => (
                format!("the certificate of {expected} is not valid yet"),
                "correct the clock of this node or of the store".to_owned(),
            ),
            Fault::NotValidForName => (
                format!("the certificate is not for {expected}"),
                "correct the address, or set the server name to one in the certificate".to_owned(),
            ),
            Fault::NotValidForNameContext { presented, .. } => (
                format!("the certificate is not for {expected} but for {}", bare(presented)),
                "correct the address, or set the server name to one of these".to_owned(),
            ),
            other => (
                format!(
                    "the certificate of {expected} is not acceptable ({}); trusted: {}",
                    one_line(&other.to_string()),
                    trusted(connection)
                ),
                "give the store a server certificate that this CA signed".to_owned(),
            ),
        },
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied,
        ) => match &connection.client_certificate {
            Some(client) => (
                format!("the store does not accept the client certificate {}", client.certificate.display()),
                "use one that is signed by the CA that the store trusts for clients".to_owned(),
            ),
            None => (
                "the store asks for a client certificate".to_owned(),
                "configure a client certificate and its key".to_owned(),
            ),
        },
        rustls::Error::InvalidMessage(_) => (
            "what listens there does not speak TLS".to_owned(),
            "correct the port, or write http:// if the store has no TLS".to_owned(),
        ),
        other => (
            format!("the TLS handshake failed: {}", one_line(&other.to_string())),
            "check that the store offers TLS 1.2 or 1.3 at this address".to_owned(),
        ),
    };
    Words { kind: ErrorKind::Certificate, answered, remedy: Some(remedy) }
}

/// The names of a certificate without the kind that TLS writes around them: `DnsName("vault")`.
fn bare(names: &[String]) -> String {
    let bare = |name: &String| {
        let inner = name.split_once('(').map_or(name.as_str(), |(_, rest)| rest);
        inner.trim_matches(['"', ')']).to_owned()
    };
    one_line(&names.iter().map(bare).collect::<Vec<_>>().join(", "))
}

fn trusted(connection: &Connection) -> String {
    match &connection.ca {
        None => "a CA of this system".to_owned(),
        Some(Pem::File(path)) => format!("a CA of the file {}", path.display()),
        Some(Pem::Directory(path)) => format!("a CA of the directory {}", path.display()),
        Some(Pem::Text(_)) => "a CA of the configured text".to_owned(),
    }
}

/// The first error of type `E` among the causes. An I/O error hides the error it wraps from `source()`, so that one is
/// asked for.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    causes(error).find_map(|cause| cause.downcast_ref::<E>())
}

/// The innermost cause's text, on one line.
pub(super) fn root(error: &(dyn Error + 'static)) -> String {
    one_line(&causes(error).last().map_or_else(String::new, ToString::to_string))
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&cause| {
        let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|inner| inner as &(dyn Error + 'static)).or_else(|| cause.source())
    })
}
