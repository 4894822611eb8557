//! Whom a connection trusts and how it shows itself: from paths and texts to a client that can shake hands.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use reqwest::{Certificate, ClientBuilder};
use zeroize::Zeroizing;

use super::reach::Reach;
use crate::reference::{Connection, Pem};
use crate::store::error::Unusable;

/// All certificates of one connection together: five times what the largest public bundles have.
const LARGEST_PEM: u64 = 1 << 20;

/// What the files of a connection looked like. Another stamp means that they were changed.
#[derive(PartialEq, Eq)]
pub(super) struct Stamp(Vec<(PathBuf, Option<(SystemTime, u64)>)>);

/// Whether the connection depends on files, so that it has a stamp worth comparing.
pub(super) fn has_files(connection: &Connection) -> bool {
    matches!(connection.ca, Some(Pem::File(_) | Pem::Directory(_))) || connection.client_certificate.is_some()
}

/// The present stamp. Blocks.
pub(super) fn stamp(connection: &Connection) -> Stamp {
    let mut paths = match &connection.ca {
        Some(Pem::File(path)) => vec![path.clone()],
        Some(Pem::Directory(path)) => files_of(path).unwrap_or_default(),
        Some(Pem::Text(_)) | None => Vec::new(),
    };
    if let Some(client) = &connection.client_certificate {
        paths.extend([client.certificate.clone(), client.key.clone()]);
    }
    let look = |path: PathBuf| {
        let seen = fs::metadata(&path).and_then(|meta| Ok((meta.modified()?, meta.len()))).ok();
        (path, seen)
    };
    Stamp(paths.into_iter().map(look).collect())
}

/// Adds trust and client certificate to a client. A CA replaces the system's roots. Blocks.
pub(super) fn configure(
    builder: ClientBuilder,
    connection: &Connection,
    reach: &Reach,
) -> Result<ClientBuilder, Unusable> {
    let mut builder = if connection.skip_verify {
        builder.tls_danger_accept_invalid_certs(true)
    } else if let Some(ca) = &connection.ca {
        builder.tls_certs_only(authorities(ca, reach)?)
    } else if connection.addresses.iter().any(crate::reference::Address::is_https) {
        builder
    } else {
        // No handshake will take place, so the system's roots are neither needed nor worth their memory.
        builder.tls_certs_only([])
    };
    if let Some(client) = &connection.client_certificate {
        let mut pem = Zeroizing::new(Vec::new());
        for path in [&client.certificate, &client.key] {
            read(path, reach, &mut pem)?;
            pem.push(b'\n');
        }
        let identity = reqwest::Identity::from_pem(&pem).map_err(|_| Unusable {
            what: format!(
                "{} and {} are not a certificate and its private key",
                client.certificate.display(),
                client.key.display()
            ),
            remedy: "both must be PEM, the key unencrypted as PKCS #8, PKCS #1 or SEC 1",
        })?;
        builder = builder.identity(identity);
    }
    Ok(builder)
}

fn authorities(ca: &Pem, reach: &Reach) -> Result<Vec<Certificate>, Unusable> {
    let mut pem = Zeroizing::new(Vec::new());
    let place = match ca {
        Pem::Text(text) => {
            pem.extend_from_slice(text.as_bytes());
            "the configured CA text".to_owned()
        }
        Pem::File(path) => {
            read(path, reach, &mut pem)?;
            format!("CA file {}", path.display())
        }
        Pem::Directory(path) => {
            for file in files_of(path).map_err(|error| unreadable(path, &error))? {
                read(&file, reach, &mut pem)?;
                pem.push(b'\n');
            }
            format!("CA directory {}", path.display())
        }
    };
    match Certificate::from_pem_bundle(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(Unusable {
            what: format!("{place} holds no usable certificate"),
            remedy: "it must be PEM with BEGIN CERTIFICATE lines",
        }),
    }
}

/// The files of a directory in the order of their names; links are followed, directories (`..data` of a mounted Secret)
/// left out.
fn files_of(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path, reach: &Reach, pem: &mut Vec<u8>) -> Result<(), Unusable> {
    let room = LARGEST_PEM.saturating_sub(pem.len() as u64);
    let file = reach.open(path).map_err(|error| unreadable(path, &error))?;
    let length = file.take(room + 1).read_to_end(pem).map_err(|error| unreadable(path, &error))?;
    if length as u64 > room {
        return Err(Unusable {
            what: format!(
                "{} brings the certificates of this store to more than {LARGEST_PEM} bytes",
                path.display()
            ),
            remedy: "name only the CA that signed the store's certificate",
        });
    }
    Ok(())
}

fn unreadable(path: &Path, error: &std::io::Error) -> Unusable {
    Unusable {
        what: format!("cannot read {}: {error}", path.display()),
        remedy: "check that the path exists here and that the agent may read it",
    }
}
