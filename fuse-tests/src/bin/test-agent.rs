//! Serves volumes as its standard input says, one JSON line per command ([`fuse_tests::agent::Command`]); the parts are the
//! agent's own, allocator, panic hook and log included. Ends when its input does.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuse_secrets::agent::{Agent, Served, Setup, admin};
use fuse_secrets::cli::{log, panics};
use fuse_secrets::config::{Config, Layer};
use fuse_secrets::fs::{Notice, Notify};
use fuse_secrets::fuse::in_handler;
use fuse_secrets::metrics::Metrics;
use fuse_secrets::reference::{
    Address, Auth, AuthMethod, Connection, Encoding, FilePath, FileSpec, Freshness, Identity, Method,
    Ownership, Request, Subject, VolumeId, VolumeSpec,
};
use fuse_secrets::secret::SecretBytes;
use fuse_secrets::store::vault::Vault;
use fuse_secrets::sys::alloc::{self, Wiping};
use fuse_secrets::time::Moment;
use fuse_secrets::volume::{NewFile, Surroundings, Volume};
use fuse_tests::agent::{Answer, BareFile, Command};
use fuse_tests::stamp::Content;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

struct Server {
    agent: Arc<Agent>,
    served: HashMap<PathBuf, Arc<Served>>,
    planted: Vec<String>,
}

fn main() {
    alloc::pin();
    log::start(&log::Options { log: "trace".to_owned(), log_format: log::Format::Json }).unwrap();
    let _panicked = panics::watch();
    rustls::crypto::aws_lc_rs::default_provider().install_default().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(serve());
    runtime.shutdown_background();
}

async fn serve() {
    let metrics = Arc::new(Metrics::default());
    let vault = Arc::new(Vault::new(Arc::clone(&metrics)));
    let agent = Agent::start(vault, metrics, Setup::default()).unwrap();
    let socket = admin::listen(&agent).unwrap();
    let mut server = Server { agent, served: HashMap::new(), planted: Vec::new() };
    let mut commands = BufReader::new(tokio::io::stdin()).lines();
    // Whoever ends the test from a terminal sends its signal to this process too.
    let mut interrupt = signal(SignalKind::interrupt()).unwrap();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    loop {
        let line = tokio::select! {
            line = commands.next_line() => line,
            _ = interrupt.recv() => Ok(None),
            _ = terminate.recv() => Ok(None),
        };
        let Ok(Some(line)) = line else { break };
        let answer = match server.obey(serde_json::from_str(&line).unwrap()).await {
            Ok(answer) => answer,
            Err(why) => Answer::Failed(why),
        };
        drop(line);
        let mut answer = serde_json::to_vec(&answer).unwrap();
        answer.push(b'\n');
        let mut out = tokio::io::stdout();
        out.write_all(&answer).await.unwrap();
        out.flush().await.unwrap();
    }
    for served in server.served.values() {
        let _ = served.detach();
    }
    server.agent.shutdown().await;
    drop(socket);
}

impl Server {
    async fn obey(&mut self, command: Command) -> Result<Answer, String> {
        match command {
            Command::Bare { path, files, contents } => {
                let volume = self.bare(&path, &files);
                install(&volume, &contents)?;
                let served =
                    self.agent.serve(&path, volume, true).await.map_err(|error| error.to_string())?;
                self.served.insert(path, served);
            }
            Command::Install { path, contents } => install(self.volume(&path)?, &contents)?,
            Command::Class { path, class, settings } => {
                let served = self.class(&path, &class, settings).await?;
                self.served.insert(path, served);
            }
            Command::Panic { path } => {
                let served = self.find(&path)?;
                let panics = Panics { volume: Arc::downgrade(served.volume()), armed: AtomicBool::new(true) };
                served.fs().notify_through(Arc::new(panics));
            }
            Command::Generations { path } => {
                return Ok(Answer::Generations(self.volume(&path)?.generations().numbers()));
            }
            Command::Metrics => {
                let rows = self.agent.metrics().rows().map(|row| (row.name.to_owned(), row.value()));
                return Ok(Answer::Metrics(rows.collect()));
            }
            Command::Plant(needle) => self.planted.push(needle),
            Command::Forget { path } => {
                let served = self.served.remove(&path).ok_or("no such volume")?;
                tokio::time::timeout(Duration::from_secs(10), served.ended())
                    .await
                    .map_err(|_| "the session does not end")?;
            }
        }
        Ok(Answer::Done)
    }

    fn find(&self, path: &Path) -> Result<&Arc<Served>, String> {
        self.served.get(path).ok_or_else(|| format!("no volume at {}", path.display()))
    }

    fn volume(&self, path: &Path) -> Result<&Arc<Volume>, String> {
        self.find(path).map(|served| served.volume())
    }

    fn bare(&self, path: &Path, files: &[BareFile]) -> Arc<Volume> {
        let request =
            Request { method: Method::Get, path: "secret/data/none".into(), query: None, args: None };
        let file = |file: &BareFile| FileSpec {
            path: FilePath::parse(&file.path).unwrap(),
            request: request.clone(),
            key: None,
            encoding: Encoding::Utf8,
            ownership: Ownership { uid: file.uid, gid: file.gid, mode: file.mode },
        };
        let connection = Connection::to(vec![Address::parse("http://127.0.0.1:1").unwrap()]);
        let auth =
            Auth { method: AuthMethod::Token, mount: String::new(), role: String::new(), audience: None };
        let spec = VolumeSpec {
            class: "bare".into(),
            identity: Arc::new(Identity { connection, auth, subject: Subject::Local("nobody".into()) }),
            files: files.iter().map(file).collect(),
            freshness: Freshness::default(),
            ownership: Ownership::default(),
        };
        let surroundings = Surroundings {
            memory: Arc::clone(self.agent.memory()),
            metrics: Arc::clone(self.agent.metrics()),
            default_owner: (0, 0),
        };
        Volume::new(VolumeId(path.display().to_string()), spec, None, surroundings)
    }

    async fn class(
        &self,
        path: &Path,
        class: &str,
        settings: std::collections::BTreeMap<String, String>,
    ) -> Result<Arc<Served>, String> {
        let variable = |name: &str| OsString::from(format!("FUSE_SECRETS_{}", name.to_uppercase()));
        let variables = settings.into_iter().map(|(name, value)| (variable(&name), value.into()));
        let said = Layer::from_environment(variables).map_err(|faults| faults.to_string())?;
        let config = Config::resolve(Layer::default(), said, Layer::default());
        let config = config.map_err(|faults| faults.to_string())?;
        let mut classes = fuse_secrets::class::parse(class).map_err(|faults| faults.to_string())?;
        let spec = classes.remove(0).into_spec(&config.over, &config.under, config.subject());
        let spec = spec.map_err(|faults| faults.to_string())?;
        let credential = Arc::new(config.credential());
        let deadline = Instant::now() + Duration::from_secs(30);
        let mounting = self.agent.mount(path, spec, None, credential, true, deadline);
        mounting.await.map_err(|error| error.to_string())
    }
}

fn install(volume: &Volume, contents: &[Content]) -> Result<(), String> {
    let now = Moment::now();
    let file = |content: &Content| NewFile {
        value: content.bytes().map(SecretBytes::new),
        written: now.wall,
        ..NewFile::default()
    };
    let files: Vec<NewFile> = contents.iter().map(file).collect();
    volume.install(&files, now).map_err(|error| error.to_string())
}

/// Panics once, inside a handler, in the worst way: with a secret in the message.
struct Panics {
    volume: std::sync::Weak<Volume>,
    armed: AtomicBool,
}

impl Notify for Panics {
    fn notify(&self, _: &Notice) {
        if in_handler() && self.armed.swap(false, Ordering::AcqRel) {
            let volume = self.volume.upgrade().unwrap();
            let current = volume.generations().current().unwrap();
            panic!("{}", String::from_utf8_lossy(current.snapshot.value(0).unwrap_or_default()));
        }
    }
}
