//! A scripted HTTP server on the loopback, over TCP or TLS, that remembers what it was asked.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::vault::Vault;
use super::{Answer, Reach, Store as _, StoreError};
use crate::metrics::Metrics;
use crate::reference::{Address, Auth, AuthMethod, Connection, Identity, Method, Request, Subject};
use crate::secret::Token;

/// The token that tests present; no error may hold it.
pub(super) const TOKEN: &str = "hvs.canary-token";

/// One request as the server saw it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) target: String,
    /// Names in lower case.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// What the script answers.
pub(super) enum Say {
    /// Status, further headers (`Name: value\r\n`…), body.
    Answer(u16, String, String),
    /// Head and body as they are.
    Raw(Vec<u8>),
    /// Closes the connection after it has read the request.
    HangUp,
    /// Never answers.
    Nothing,
}

pub(super) fn say(status: u16, body: &str) -> Say {
    Say::Answer(status, String::new(), body.to_owned())
}

pub(super) fn redirect(status: u16, to: &str) -> Say {
    Say::Answer(status, format!("Location: {to}\r\n"), String::new())
}

pub(super) const SECRET: &str = r#"{"request_id":"1","lease_id":"","renewable":false,"lease_duration":0,"data":{"data":{"k":"v"},"metadata":{"version":3,"created_time":"2026-01-02T03:04:05Z"}}}"#;

type Script = dyn Fn(usize, &Seen) -> Say + Send + Sync;

/// A running server; it ends with the test's runtime.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) port: u16,
    scheme: &'static str,
    seen: Arc<Mutex<Vec<Seen>>>,
    protocols: Arc<Mutex<Vec<Option<String>>>>,
    names: Arc<Mutex<Vec<Option<String>>>>,
    closed: Arc<tokio::sync::Notify>,
}

impl Server {
    /// Answers request number n (from 0) with `script(n, request)`.
    pub(super) async fn start(script: impl Fn(usize, &Seen) -> Say + Send + Sync + 'static) -> Self {
        Self::listen(None, script).await
    }

    /// The same over TLS.
    pub(super) async fn start_tls(
        config: rustls::ServerConfig,
        script: impl Fn(usize, &Seen) -> Say + Send + Sync + 'static,
    ) -> Self {
        Self::listen(Some(TlsAcceptor::from(Arc::new(config))), script).await
    }

    async fn listen(
        tls: Option<TlsAcceptor>,
        script: impl Fn(usize, &Seen) -> Say + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            scheme: if tls.is_some() { "https" } else { "http" },
            seen: Arc::default(),
            protocols: Arc::default(),
            names: Arc::default(),
            closed: Arc::default(),
        };
        let (script, shared): (Arc<Script>, _) = (Arc::new(script), server.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, shared, tls) = (Arc::clone(&script), shared.clone(), tls.clone());
                tokio::spawn(async move {
                    let Some(tls) = tls else { return shared.serve(stream, &*script).await };
                    if let Ok(stream) = tls.accept(stream).await {
                        let session = stream.get_ref().1;
                        let protocol =
                            session.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
                        shared.protocols.lock().unwrap().push(protocol);
                        shared.names.lock().unwrap().push(session.server_name().map(str::to_owned));
                        shared.serve(stream, &*script).await;
                    }
                });
            }
        });
        server
    }

    async fn serve(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin, script: &Script) {
        let mut buffer = Vec::new();
        loop {
            let Some(seen) = next_request(&mut stream, &mut buffer).await else {
                return self.closed.notify_one();
            };
            let number = {
                let mut all = self.seen.lock().unwrap();
                all.push(seen.clone());
                all.len() - 1
            };
            let bytes = match script(number, &seen) {
                Say::Answer(status, headers, body) => {
                    format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
                        .into_bytes()
                }
                Say::Raw(bytes) => bytes,
                Say::HangUp => return,
                Say::Nothing => std::future::pending().await,
            };
            if stream.write_all(&bytes).await.is_err() {
                return;
            }
        }
    }

    /// `http://127.0.0.1:port`.
    pub(super) fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(super) fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// Waits until a client has closed its connection.
    pub(super) async fn closed(&self) {
        tokio::time::timeout(Duration::from_secs(30), self.closed.notified()).await.unwrap();
    }

    /// The application protocols that the TLS handshakes chose.
    pub(super) fn protocols(&self) -> Vec<Option<String>> {
        self.protocols.lock().unwrap().clone()
    }

    /// The names that the TLS handshakes asked for.
    pub(super) fn names(&self) -> Vec<Option<String>> {
        self.names.lock().unwrap().clone()
    }
}

async fn next_request(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Seen> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..end].to_vec()).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let length =
        headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, n)| n.parse().unwrap());
    while buffer.len() < end + 4 + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = String::from_utf8(buffer[end + 4..end + 4 + length].to_vec()).ok()?;
    buffer.drain(..end + 4 + length);
    Some(Seen { method, target, headers, body })
}

pub(super) fn connection(urls: &[&str]) -> Connection {
    Connection::to(urls.iter().map(|url| Address::parse(url).unwrap()).collect())
}

/// The service account `shop/web` with the role `web`.
pub(super) fn identity(connection: Connection) -> Identity {
    Identity {
        connection,
        auth: Auth {
            method: AuthMethod::Kubernetes,
            mount: "kubernetes".to_owned(),
            role: "web".to_owned(),
            audience: None,
        },
        subject: Subject::ServiceAccount { namespace: "shop".into(), name: "web".into(), uid: "u1".into() },
    }
}

pub(super) fn request(path: &str) -> Request {
    Request { method: Method::Get, path: path.to_owned(), query: None, args: None }
}

pub(super) fn token() -> Token {
    Token::new(TOKEN.to_owned()).unwrap()
}

pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A client and its counters.
pub(super) struct Client {
    pub(super) vault: Vault,
    pub(super) metrics: Arc<Metrics>,
}

impl Client {
    pub(super) fn new() -> Self {
        Self::within(Reach::anywhere())
    }

    /// One that does not reach everything.
    pub(super) fn within(reach: Reach) -> Self {
        let metrics = Arc::<Metrics>::default();
        Self { vault: Vault::within(Arc::clone(&metrics), reach), metrics }
    }

    /// Reads `path` over `connection`.
    pub(super) async fn read(&self, connection: &Connection, path: &str) -> Result<Answer, StoreError> {
        self.vault.read(&identity(connection.clone()), &token(), &request(path), soon()).await
    }

    /// The error of a read that must fail, after a look that it is one line without the token.
    pub(super) async fn refused(&self, connection: &Connection, path: &str) -> StoreError {
        match self.read(connection, path).await {
            Ok(_) => panic!("the read of {path} did not fail"),
            Err(error) => decent(error),
        }
    }
}

/// Checks what holds for every error.
pub(super) fn decent(error: StoreError) -> StoreError {
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.contains("canary"), "{text}");
    error
}

/// A certificate authority that exists for one test.
pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>, String);

impl Authority {
    pub(super) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Authorities with one name would be taken for one another.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        params.distinguished_name.push(DnType::CommonName, format!("authority {number}"));
        let name = format!("CN=authority {number}");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(), name)
    }

    /// As a certificate of it says who signed it.
    pub(super) fn name(&self) -> &str {
        &self.1
    }

    pub(super) fn pem(&self) -> String {
        self.0.pem()
    }

    pub(super) fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    /// A certificate for `names`, and its key.
    pub(super) fn issue(&self, names: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        self.sign(CertificateParams::new(names).unwrap())
    }

    pub(super) fn sign(&self, params: CertificateParams) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    /// A server's side for `names`.
    pub(super) fn server(&self, names: &[&str]) -> rustls::ServerConfig {
        serving(builder().with_no_client_auth(), &self.issue(names))
    }

    /// The same, asking every client for a certificate of this authority.
    pub(super) fn mutual_server(&self, names: &[&str]) -> rustls::ServerConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.der()).unwrap();
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        serving(builder().with_client_cert_verifier(verifier.build().unwrap()), &self.issue(names))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn builder() -> rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier> {
    rustls::ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap()
}

pub(super) fn serving(
    builder: rustls::ConfigBuilder<rustls::ServerConfig, rustls::server::WantsServerCert>,
    (certificate, key): &(rcgen::Certificate, KeyPair),
) -> rustls::ServerConfig {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    builder.with_single_cert(vec![certificate.der().clone()], key).unwrap()
}

pub(super) fn plain(certified: &(rcgen::Certificate, KeyPair)) -> rustls::ServerConfig {
    serving(builder().with_no_client_auth(), certified)
}
