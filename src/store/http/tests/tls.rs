//! Whom the client trusts, and how it shows itself.

use std::path::Path;

use rcgen::{CertificateParams, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::reference::{ClientCertificate, Connection, Pem};
use crate::store::ErrorKind;
use crate::store::testing::*;

fn trusting(server: &Server, ca: Pem) -> Connection {
    Connection { ca: Some(ca), ..connection(&[&server.url()]) }
}

async fn serve(config: rustls::ServerConfig) -> Server {
    Server::start_tls(config, |_, _| say(200, SECRET)).await
}

async fn good(connection: &Connection) {
    Client::new().read(connection, "secret/data/app").await.unwrap_or_else(|error| panic!("{error}"));
}

async fn bad(connection: &Connection, kind: ErrorKind, words: &str) {
    let error = Client::new().refused(connection, "secret/data/app").await;
    assert!(error.kind == kind && error.to_string().contains(words), "{error}");
}

fn write_pair(dir: &Path, (certificate, key): &(rcgen::Certificate, KeyPair)) -> ClientCertificate {
    let pair = ClientCertificate { certificate: dir.join("client.pem"), key: dir.join("client.key") };
    std::fs::write(&pair.certificate, certificate.pem()).unwrap();
    std::fs::write(&pair.key, key.serialize_pem()).unwrap();
    pair
}

#[tokio::test]
async fn a_ca_may_be_text_file_or_directory_with_others_beside_it() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = serve(authority.server(&["127.0.0.1"])).await;
    let dir = tempfile::tempdir().unwrap();
    let both = format!("{}{}", other.pem(), authority.pem());
    good(&trusting(&server, Pem::Text(both.clone()))).await;
    std::fs::write(dir.path().join("a.pem"), other.pem()).unwrap();
    std::fs::write(dir.path().join("b.pem"), both).unwrap();
    std::fs::write(dir.path().join("readme"), "no certificate").unwrap();
    std::fs::create_dir(dir.path().join("..data")).unwrap();
    good(&trusting(&server, Pem::File(dir.path().join("b.pem")))).await;
    good(&trusting(&server, Pem::Directory(dir.path().to_owned()))).await;
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_and_both_are_named() {
    let authority = Authority::new();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "Other team");
    params.distinguished_name.push(rcgen::DnType::CommonName, "vault");
    let server = serve(plain(&authority.sign(params))).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    std::fs::write(&path, Authority::new().pem()).unwrap();
    let words = format!(
        "the certificate of 127.0.0.1 (O=Other team, CN=vault, signed by {}) is not signed by a CA of the file {}",
        authority.name(),
        path.display()
    );
    bad(&trusting(&server, Pem::File(path)), ErrorKind::Certificate, &words).await;
    bad(&connection(&[&server.url()]), ErrorKind::Certificate, "is not signed by a CA of this system").await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused_and_the_names_are_told() {
    let authority = Authority::new();
    let server = serve(authority.server(&["vault.example", "10.0.0.1"])).await;
    let to = trusting(&server, Pem::Text(authority.pem()));
    let words = "the certificate is not for 127.0.0.1 but for vault.example, 10.0.0.1;";
    bad(&to, ErrorKind::Certificate, words).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn the_server_name_replaces_the_hosts_in_the_handshake_and_nowhere_else() {
    let authority = Authority::new();
    let server = serve(authority.server(&["vault.example"])).await;
    let mut to = trusting(&server, Pem::Text(authority.pem()));
    to.server_name = Some("vault.example".to_owned());
    good(&to).await;
    assert_eq!(server.names(), [Some("vault.example".to_owned())]);
    assert_eq!(server.seen()[0].header("host"), Some(format!("127.0.0.1:{}", server.port).as_str()));
    to.server_name = Some("other.example".to_owned());
    bad(&to, ErrorKind::Certificate, "is not for other.example").await;
    to.server_name = Some("10.0.0.1".to_owned());
    bad(&to, ErrorKind::Local, "not a DNS name").await;
}

#[tokio::test]
async fn an_expired_certificate_is_called_so() {
    let authority = Authority::new();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    let server = serve(plain(&authority.sign(params))).await;
    bad(&trusting(&server, Pem::Text(authority.pem())), ErrorKind::Certificate, "has expired").await;
}

#[tokio::test]
async fn verification_can_be_switched_off() {
    let server = serve(Authority::new().server(&["vault.example"])).await;
    good(&Connection { skip_verify: true, ..connection(&[&server.url()]) }).await;
}

#[tokio::test]
async fn a_client_certificate_is_shown_and_its_absence_is_explained() {
    let authority = Authority::new();
    let server = serve(authority.mutual_server(&["127.0.0.1"])).await;
    let dir = tempfile::tempdir().unwrap();
    let mut to = trusting(&server, Pem::Text(authority.pem()));
    bad(&to, ErrorKind::Certificate, "the store asks for a client certificate").await;
    to.client_certificate = Some(write_pair(dir.path(), &authority.issue(&["agent"])));
    good(&to).await;
    to.client_certificate = Some(write_pair(dir.path(), &Authority::new().issue(&["agent"])));
    bad(&to, ErrorKind::Certificate, "does not accept the client certificate").await;
}

#[tokio::test]
async fn changed_certificate_files_take_effect_at_the_next_request() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = serve(authority.server(&["127.0.0.1"])).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    std::fs::write(&path, other.pem()).unwrap();
    let (client, to) = (Client::new(), trusting(&server, Pem::File(path.clone())));
    client.refused(&to, "secret/data/app").await;
    std::fs::write(&path, format!("{}{}", other.pem(), authority.pem())).unwrap();
    client.read(&to, "secret/data/app").await.unwrap_or_else(|error| panic!("{error}"));
}

#[tokio::test]
async fn certificate_files_that_vanish_leave_the_last_good_ones_in_use() {
    let authority = Authority::new();
    let server = serve(authority.server(&["127.0.0.1"])).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    std::fs::write(&path, authority.pem()).unwrap();
    let (client, to) = (Client::new(), trusting(&server, Pem::File(path.clone())));
    client.read(&to, "secret/data/app").await.unwrap_or_else(|error| panic!("{error}"));
    std::fs::remove_file(&path).unwrap();
    client.read(&to, "secret/data/app").await.unwrap_or_else(|error| panic!("{error}"));
    let error = Client::new().refused(&to, "secret/data/app").await;
    assert!(error.kind == ErrorKind::Local && error.answered.contains("ca.pem: No such file"), "{error}");
}

#[tokio::test]
async fn unusable_certificates_are_named_before_anything_is_sent() {
    let authority = Authority::new();
    let server = serve(authority.server(&["127.0.0.1"])).await;
    let dir = tempfile::tempdir().unwrap();
    bad(&trusting(&server, Pem::Text("nothing".into())), ErrorKind::Local, "the configured CA text holds no")
        .await;
    bad(&trusting(&server, Pem::Directory(dir.path().join("no"))), ErrorKind::Local, "cannot read").await;
    let mut to = trusting(&server, Pem::Text(authority.pem()));
    let pair = write_pair(dir.path(), &authority.issue(&["agent"]));
    std::fs::write(&pair.key, "no key").unwrap();
    to.client_certificate = Some(pair);
    bad(&to, ErrorKind::Local, "are not a certificate and its private key").await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn both_ends_that_speak_http_2_use_it() {
    let authority = Authority::new();
    let mut config = authority.server(&["127.0.0.1"]);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // The script speaks HTTP/1.1 only: what counts is what the handshake chose.
    let server = serve(config).await;
    Client::new().refused(&trusting(&server, Pem::Text(authority.pem())), "secret/data/app").await;
    assert!(server.protocols().iter().all(|protocol| protocol.as_deref() == Some("h2")));
    assert!(!server.protocols().is_empty());
}

#[tokio::test]
async fn a_verified_stranger_may_be_redirected_to_but_never_without_tls() {
    let authority = Authority::new();
    let leader = serve(authority.server(&["127.0.0.1"])).await;
    let to = leader.url();
    let config = authority.server(&["127.0.0.1"]);
    let standby =
        Server::start_tls(config, move |_, seen| redirect(307, &format!("{to}{}", seen.target))).await;
    good(&trusting(&standby, Pem::Text(authority.pem()))).await;
    assert_eq!(leader.count(), 1);
    let blind = Connection { skip_verify: true, ..connection(&[&standby.url()]) };
    bad(&blind, ErrorKind::Refused, "not among the configured addresses").await;

    let naked = Server::start(|_, _| say(200, SECRET)).await;
    let to = naked.url();
    let config = authority.server(&["127.0.0.1"]);
    let standby =
        Server::start_tls(config, move |_, seen| redirect(307, &format!("{to}{}", seen.target))).await;
    let mut both = trusting(&standby, Pem::Text(authority.pem()));
    both.addresses.push(crate::reference::Address::parse(&naked.url()).unwrap());
    bad(&both, ErrorKind::Refused, "would show the token to the network").await;
    assert_eq!((leader.count(), naked.count()), (1, 0));
}

#[tokio::test]
async fn a_redirect_keeps_to_the_server_name() {
    let authority = Authority::new();
    let leader = serve(authority.server(&["vault.example"])).await;
    let to = leader.url();
    let config = authority.server(&["vault.example"]);
    let standby =
        Server::start_tls(config, move |_, seen| redirect(307, &format!("{to}{}", seen.target))).await;
    let mut to = trusting(&standby, Pem::Text(authority.pem()));
    to.server_name = Some("vault.example".to_owned());
    good(&to).await;
    assert_eq!(leader.names(), [Some("vault.example".to_owned())]);
}

#[tokio::test]
async fn a_port_without_tls_is_recognised() {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut hello = [0; 5];
            stream.read_exact(&mut hello).await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        }
    });
    let to = Connection { skip_verify: true, ..connection(&[&address]) };
    bad(&to, ErrorKind::Certificate, "does not speak TLS").await;
}
