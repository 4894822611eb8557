//! Serves volumes as its standard input says, one JSON line per command ([`fuse_tests::agent::Command`]); the parts are the
//! agent's own, allocator, panic hook and log included. Ends when its input does.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails in here is a test that fails")]

use std::collections::HashMap;
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fuse_secrets::agent::lent::Estate;
use fuse_secrets::agent::{Agent, Served, Setup, admin};
use fuse_secrets::cli::{log, panics};
use fuse_secrets::config::{Config, Layer};
use fuse_secrets::fs::{Notice, Notify};
use fuse_secrets::fuse::{handshake, in_handler};
use fuse_secrets::metrics::Metrics;
use fuse_secrets::reference::{
    Address, Auth, AuthMethod, Connection, Encoding, FilePath, FileSpec, Freshness, Identity, Method,
    Ownership, Request, Subject, VolumeId, VolumeSpec,
};
use fuse_secrets::secret::{SecretBytes, Token};
use fuse_secrets::store::Credential;
use fuse_secrets::store::vault::Vault;
use fuse_secrets::sys::alloc::{self, Wiping};
use fuse_secrets::time::Moment;
use fuse_secrets::volume::record::Init;
use fuse_secrets::volume::{Keeper, Lending, NewFile, Pod, Surroundings, Volume};
use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::{Asked, End, Link};
use fuse_secrets_csi::wire::message::{Deposit, Done, Part, Refused};
use fuse_tests::agent::{Answer, BareFile, Command};
use fuse_tests::stamp::Content;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::Receiver;

#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

struct Server {
    agent: Arc<Agent>,
    link: Option<Linked>,
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
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (agent, link) = match arguments.as_slice() {
        [socket, handover] => {
            let (link, questions) = Link::start(UnixStream::connect(socket).await.unwrap(), End::Connected);
            let keeper = Arc::new(Keeping(link));
            let agent = Agent::start_lending(vault, metrics, Setup::default(), keeper.clone()).unwrap();
            let mounts = Mounts::default();
            tokio::spawn(obey_link(questions, Arc::clone(&agent), Arc::clone(&mounts), handover == "resend"));
            (agent, Some(Linked { keeper, mounts }))
        }
        _ => (Agent::start(vault, metrics, Setup::default()).unwrap(), None),
    };
    let socket = admin::listen(&agent).unwrap();
    let mut server = Server { agent, link, served: HashMap::new(), planted: Vec::new() };
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
                install(&volume, &contents).await?;
                let served =
                    self.agent.serve(&path, volume, true).await.map_err(|error| error.to_string())?;
                self.served.insert(path, served);
            }
            Command::Lend { path, files, contents } => self.lend(&path, &files, &contents).await?,
            Command::Install { path, contents } => {
                let volume = self.volume(&path)?;
                install(&volume, &contents).await?;
            }
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

    fn find(&self, path: &Path) -> Result<Arc<Served>, String> {
        let lent = || self.agent.find(&VolumeId(path.display().to_string()));
        self.served.get(path).cloned().or_else(lent).ok_or_else(|| format!("no volume at {}", path.display()))
    }

    fn volume(&self, path: &Path) -> Result<Arc<Volume>, String> {
        self.find(path).map(|served| Arc::clone(served.volume()))
    }

    async fn lend(&self, path: &Path, files: &[BareFile], contents: &[Content]) -> Result<(), String> {
        let Linked { keeper, mounts } = self.link.as_ref().ok_or("nobody keeps anything")?;
        let id = VolumeId(path.display().to_string());
        let fuse = mounts.lock().unwrap().remove(&id.0).ok_or("no mount came")?;
        let fuse = tokio::task::spawn_blocking(|| handshake::negotiate(fuse.as_fd()).map(|_| fuse));
        let fuse = fuse.await.unwrap().map_err(|error| error.to_string())?;
        let (keeper, target) = (Arc::clone(keeper) as Arc<dyn Keeper>, id.0.clone());
        let lending = Lending { keeper, target, group: None, init: Init::default() };
        let volume = Volume::lent(id, bare_spec(files), Pod::default(), self.surroundings(), lending);
        let volume = volume.map_err(|error| error.to_string())?;
        install(&volume, contents).await?;
        let credential = Arc::new(Credential::Jwt(Token::new("none".to_owned()).unwrap()));
        volume.deposit_all(&credential).await.map_err(|error| error.to_string())?;
        self.agent.serve_lent(volume, fuse, false).await.map_err(|error| error.to_string())?;
        Ok(())
    }

    fn surroundings(&self) -> Surroundings {
        Surroundings {
            memory: Arc::clone(self.agent.memory()),
            metrics: Arc::clone(self.agent.metrics()),
            default_owner: (0, 0),
        }
    }

    fn bare(&self, path: &Path, files: &[BareFile]) -> Arc<Volume> {
        Volume::new(VolumeId(path.display().to_string()), bare_spec(files), None, self.surroundings())
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

/// What a volume without a store asks for: a store that nobody can reach.
fn bare_spec(files: &[BareFile]) -> VolumeSpec {
    let request = Request { method: Method::Get, path: "secret/data/none".into(), query: None, args: None };
    let file = |file: &BareFile| FileSpec {
        path: FilePath::parse(&file.path).unwrap(),
        request: request.clone(),
        key: None,
        encoding: Encoding::Utf8,
        ownership: Ownership { uid: file.uid, gid: file.gid, mode: file.mode },
    };
    let connection = Connection::to(vec![Address::parse("http://127.0.0.1:1").unwrap()]);
    let auth = Auth { method: AuthMethod::Token, mount: String::new(), role: String::new(), audience: None };
    VolumeSpec {
        class: "bare".into(),
        identity: Arc::new(Identity { connection, auth, subject: Subject::Local("nobody".into()) }),
        files: files.iter().map(file).collect(),
        freshness: Freshness::default(),
        ownership: Ownership::default(),
    }
}

async fn install(volume: &Volume, contents: &[Content]) -> Result<(), String> {
    let now = Moment::now();
    let file = |content: &Content| NewFile {
        value: content.bytes().map(SecretBytes::new),
        written: now.wall,
        ..NewFile::default()
    };
    let files: Vec<NewFile> = contents.iter().map(file).collect();
    volume.put(&files, now).await.map_err(|error| error.to_string())
}

type Mounts = Arc<Mutex<HashMap<String, OwnedFd>>>;

/// The test that plays the shim, and the mounts that came from there.
struct Linked {
    keeper: Arc<Keeping>,
    mounts: Mounts,
}

/// Deposits with the test.
struct Keeping(Link);

impl Keeper for Keeping {
    fn deposit(
        &self,
        volume: &VolumeId,
        part: Part,
        file: OwnedFd,
        gone: Vec<u32>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>> {
        let message = Message::Deposit(Deposit { volume: volume.0.clone(), part, gone });
        Box::pin(async move {
            match self.0.ask(&message, vec![file], Instant::now() + Duration::from_secs(5)).await {
                Ok(Message::Done(_)) => Ok(()),
                Ok(_) => Err(io::Error::other("refused")),
                Err(error) => Err(io::Error::other(error)),
            }
        })
    }
}

/// Does what the test asks in the shim's place.
async fn obey_link(mut questions: Receiver<Asked>, agent: Arc<Agent>, mounts: Mounts, resend: bool) {
    while let Some(mut asked) = questions.recv().await {
        let mut descriptors = std::mem::take(&mut asked.descriptors).into_iter();
        let done = match (&mut asked.message, descriptors.next()) {
            (Message::Publish(publish), Some(fuse)) => {
                mounts.lock().unwrap().insert(publish.volume.clone(), fuse);
                Ok(())
            }
            (Message::Adopt(adopt), Some(fuse)) => {
                let (id, target) = (VolumeId(adopt.volume.clone()), adopt.target.clone());
                let (parts, suspect) =
                    (adopt.parts.iter().copied().zip(descriptors).collect(), adopt.attempts > 0);
                let estate = Estate { id, target, pod: String::new(), fuse, parts, suspect, resend };
                agent.adopt(estate).await.map(drop).map_err(|error| error.to_string())
            }
            (Message::Drain(drain), None) => {
                agent.drain(&VolumeId(drain.volume.clone())).await.map_err(|error| error.to_string())
            }
            _ => Err("not a question of a test".to_owned()),
        };
        asked.answer(match done {
            Ok(()) => Message::Done(Done::default()),
            Err(text) => Message::Refused(Refused { code: 13, text }),
        });
    }
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
