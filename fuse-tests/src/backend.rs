//! Stores: the embedded one, Vault, OpenBao, with one set of calls, so that one test body runs on each.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fuse_secrets::dev::{Embedded, Options};
use fuse_secrets::secret::Token;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::cluster::world::World;
use crate::{needs, wait};

/// Which store.
#[derive(Clone, Debug)]
pub enum Kind {
    /// The embedded one, in this process.
    Embedded,
    /// A server's binary: Vault, or OpenBao, which has the same command line.
    Binary(PathBuf),
}

impl Kind {
    /// Those that this machine has, by name. Vault is required, OpenBao optional.
    #[must_use]
    pub fn all() -> Vec<(&'static str, Self)> {
        let vault = needs::server("FUSE_SECRETS_TEST_VAULT", true).map(|path| ("vault", Self::Binary(path)));
        let bao = needs::server("FUSE_SECRETS_TEST_BAO", false).map(|path| ("openbao", Self::Binary(path)));
        [Some(("embedded", Self::Embedded)), vault, bao].into_iter().flatten().collect()
    }
}

/// A store that runs, until this is dropped.
pub struct Backend {
    kind: Kind,
    tls: bool,
    listen: SocketAddr,
    /// Where it runs, if not beside the test.
    world: Option<Arc<World>>,
    root_token: String,
    server: Server,
    runtime: Runtime,
    http: reqwest::Client,
    directory: TempDir,
}

enum Server {
    Stopped,
    Embedded(Embedded),
    Process(Child),
}

/// Requests so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Logins.
    pub logins: u64,
    /// Reads by path.
    pub reads: BTreeMap<String, u64>,
}

impl Backend {
    /// Starts one, with TLS if it is a real server and `tls`.
    ///
    /// # Panics
    /// It does not answer within a minute.
    #[must_use]
    pub fn start(kind: &Kind, tls: bool) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        Self::start_at(kind, tls, free, None)
    }

    /// The same at this address; in a cluster's network if there is one.
    ///
    /// # Panics
    /// It does not answer within a minute.
    #[must_use]
    pub fn start_at(kind: &Kind, tls: bool, listen: SocketAddr, world: Option<Arc<World>>) -> Self {
        let runtime = match &world {
            Some(world) => world.runtime(),
            None => {
                let mut builder = tokio::runtime::Builder::new_multi_thread();
                builder.worker_threads(1).enable_all().build().unwrap()
            }
        };
        let root_token = format!("root-{:032x}", rand::random::<u128>());
        let mut backend = Self {
            kind: kind.clone(),
            tls: tls && matches!(kind, Kind::Binary(_)),
            listen,
            world,
            root_token,
            server: Server::Stopped,
            runtime,
            http: reqwest::Client::new(),
            directory: tempfile::tempdir().unwrap(),
        };
        backend.resume();
        backend
    }

    /// Stops it. Its content is lost.
    ///
    /// # Panics
    /// The process cannot be killed.
    pub fn stop(&mut self) {
        match std::mem::replace(&mut self.server, Server::Stopped) {
            Server::Stopped => {}
            Server::Embedded(embedded) => self.runtime.block_on(embedded.shutdown()),
            Server::Process(mut child) => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }

    /// Starts it again at the same address, with the same root token, empty.
    ///
    /// # Panics
    /// It does not answer within a minute.
    pub fn resume(&mut self) {
        let listen = self.listen;
        match &self.kind {
            Kind::Embedded => {
                let root_token = Some(Token::new(self.root_token.clone()).unwrap());
                let options = Options { listen, root_token };
                // Spawned, as the runtime's own threads may be in another network.
                let started = self.runtime.spawn(Embedded::start(options));
                self.server = Server::Embedded(self.runtime.block_on(started).unwrap().unwrap());
            }
            Kind::Binary(binary) => {
                let mut server = Command::new(binary);
                server.args(["server", "-dev", "-dev-no-store-token"]);
                server.arg(format!("-dev-root-token-id={}", self.root_token));
                server.arg(format!("-dev-listen-address={listen}"));
                if self.tls {
                    server.arg("-dev-tls");
                    server.arg(format!("-dev-tls-cert-dir={}", self.directory.path().display()));
                    if !listen.ip().is_loopback() {
                        server.arg(format!("-dev-tls-san={}", listen.ip()));
                    }
                }
                let log = std::fs::File::create(self.directory.path().join("log")).unwrap();
                server
                    .env("HOME", self.directory.path())
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .stdout(log);
                let child = match &self.world {
                    Some(world) => world.spawn(server),
                    None => server.spawn().unwrap(),
                };
                self.server = Server::Process(child);
                wait::until_true("an answering store", Duration::from_secs(60), || {
                    self.trust();
                    self.try_ask("GET", "sys/health", None).is_some_and(|(status, _)| status == 200)
                });
                let file = json!({"file_path": self.audit().display().to_string()});
                self.write("sys/audit/file", &json!({"type": "file", "options": file}));
            }
        }
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.listen)
    }

    /// Its port on this machine.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.listen.port()
    }

    /// The file with the CA of a server with TLS.
    #[must_use]
    pub fn ca(&self) -> Option<PathBuf> {
        self.tls.then(|| self.directory.path().join("vault-ca.pem"))
    }

    /// A token that may do everything.
    #[must_use]
    pub fn root_token(&self) -> &str {
        &self.root_token
    }

    /// The embedded store's own controls.
    ///
    /// # Panics
    /// It is another kind.
    #[must_use]
    pub fn embedded(&self) -> &Embedded {
        match &self.server {
            Server::Embedded(embedded) => embedded,
            _ => panic!("not the embedded store"),
        }
    }

    /// Writes; answers the response's JSON.
    ///
    /// # Panics
    /// It is refused.
    pub fn write(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask("POST", path, Some(body));
        assert!((200..300).contains(&status), "POST {path}: {status} {answer}");
        answer
    }

    /// Writes a version of a KV v2 secret.
    ///
    /// # Panics
    /// It is refused.
    pub fn put(&self, name: &str, data: &Value) {
        self.write(&format!("secret/data/{name}"), &json!({ "data": data }));
    }

    /// Writes a version into the embedded store past HTTP, whatever faults wait there.
    ///
    /// # Panics
    /// It is another kind, or refuses.
    pub fn put_beside(&self, name: &str, data: &Value) {
        self.embedded().put(&format!("secret/{name}"), data).unwrap();
    }

    /// Runs a future on the runtime of the embedded store.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Any request with the root token: status and JSON.
    ///
    /// # Panics
    /// No answer comes.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.try_ask(method, path, body).unwrap_or_else(|| panic!("{method} {path}: no answer"))
    }

    /// Requests so far: of a server by its audit log, from which the test's own, with the root token, are not told apart.
    ///
    /// # Panics
    /// The audit log cannot be read.
    #[must_use]
    pub fn counts(&self) -> Counts {
        if let Server::Embedded(embedded) = &self.server {
            let counts = embedded.counts();
            return Counts { logins: counts.logins, reads: counts.reads };
        }
        let mut counts = Counts::default();
        let text = std::fs::read_to_string(self.audit()).unwrap();
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let path = line["request"]["path"].as_str().unwrap_or_default();
            if line["type"] != "request" {
                continue;
            }
            if path.starts_with("auth/") && path.ends_with("/login") {
                counts.logins += 1;
            } else if line["request"]["operation"] == "read"
                && !path.starts_with("sys/")
                && !path.starts_with("auth/")
            {
                *counts.reads.entry(path.to_owned()).or_default() += 1;
            }
        }
        counts
    }

    /// Logins so far that succeeded under this role at `auth/mount`, of a server by its audit log.
    ///
    /// # Panics
    /// The audit log cannot be read: it is the embedded one.
    #[must_use]
    pub fn logins_at(&self, mount: &str, role: &str) -> usize {
        let text = std::fs::read_to_string(self.audit()).unwrap();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let path = format!("auth/{mount}/login");
        let logins = lines.filter(|line| line["type"] == "response" && line["request"]["path"] == path);
        logins.filter(|line| line["auth"]["metadata"]["role"] == role).count()
    }

    /// The process of a server.
    ///
    /// # Panics
    /// It is the embedded one, or stopped.
    #[must_use]
    pub fn pid(&self) -> u32 {
        match &self.server {
            Server::Process(child) => child.id(),
            _ => panic!("not a process"),
        }
    }

    fn audit(&self) -> PathBuf {
        self.directory.path().join("audit.log")
    }

    /// Takes over the CA that a server with TLS wrote when it started.
    fn trust(&mut self) {
        if let Some(pem) = self.ca().and_then(|ca| std::fs::read(ca).ok())
            && let Ok(ca) = reqwest::Certificate::from_pem(&pem)
        {
            self.http = reqwest::Client::builder().add_root_certificate(ca).build().unwrap();
        }
    }

    fn try_ask(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.address()));
        request = request.header("X-Vault-Token", &self.root_token).timeout(Duration::from_secs(30));
        if let Some(body) = body {
            request = request.json(body);
        }
        let asked = self.runtime.spawn(async {
            let answer = request.send().await.ok()?;
            Some((answer.status().as_u16(), answer.json().await.unwrap_or(Value::Null)))
        });
        self.runtime.block_on(asked).unwrap()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop();
    }
}
