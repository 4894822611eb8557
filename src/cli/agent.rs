//! `fuse-secrets agent`: serves the volumes of a node's pods, for the shim `fuse-secrets-csi`. Two processes, of which this is the
//! first, and with a hidden flag the second.

use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use fuse_secrets_csi::health;

use super::exit;
use super::panics::Panicked;
use super::serving::Signals;
use crate::agent::{Agent, Setup, admin};
use crate::class::Classes;
use crate::class::directory::Directory;
use crate::config::{AgentConfig, AgentFlags, Faults};
use crate::kubernetes::Cluster;
use crate::kubernetes::api::{Api, ConnectError};
use crate::kubernetes::events::refresh;
use crate::metrics::Metrics;
use crate::node::confine::{self, Bounding};
use crate::node::health::Serving;
use crate::node::supervisor::{Ended, Supervisor, listen, wait_for_go};
use crate::node::worker::{Attachment, Worker};
use crate::store::vault::Vault;

/// Arguments of `agent`.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Options {
    /// YAML file with the settings below, spelt like publishDeadline: 30s
    #[arg(long, env = "FUSE_SECRETS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Be the second process; for the first one to say
    #[arg(long, hide = true)]
    worker: bool,
    #[command(flatten)]
    settings: AgentFlags,
}

const EXAMPLES: &str = "\
A class wins over what is said here, a flag over its environment variable (--publish-deadline: \
FUSE_SECRETS_PUBLISH_DEADLINE), both over the configuration file. Each volume logs in with its pod's own service-account \
token; the agent has none. Without --classes they are those of the API server.

Examples:
  In a pod of a cluster:
      fuse-secrets agent --config /etc/fuse-secrets/agent.yaml
  Beside a shim on this machine, as a user of its own:
      fuse-secrets agent --classes /etc/fuse-secrets/classes \\
          --address https://vault:8200
  Another one beside it, which takes over all volumes:
      fuse-secrets agent --classes /etc/fuse-secrets/classes \\
          --address https://vault:8200 --health-address none

SIGTERM ends it in order: what was read is answered, then the volumes wait for the next agent.";

/// `max_read` of the shim's mounts, in bytes.
const LARGEST_REPLY: usize = 128 << 10;
/// A restart changes nothing about these.
const HOPELESS: &[u8] = &[exit::USAGE, exit::NO_INPUT, exit::LIMIT];

/// What stops an agent before it begins.
#[derive(Debug, thiserror::Error)]
enum BeforeError {
    #[error("cannot read {path}: {error}")]
    Read {
        path: PathBuf,
        #[source]
        error: std::io::Error,
    },
    #[error(transparent)]
    Settings(Faults),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(
        "the agent runs as root, and needs none of root's rights; start it as a user of its own, or give --allow-root"
    )]
    Root,
}

impl BeforeError {
    fn code(&self) -> u8 {
        match self {
            Self::Read { .. } => exit::NO_INPUT,
            Self::Settings(_) | Self::Root | Self::Connect(_) => exit::USAGE,
        }
    }
}

impl Options {
    /// Whether this is the process that serves, and so needs threads.
    pub(super) fn serves(&self) -> bool {
        self.worker
    }

    /// Takes what limits allow, then gives up every right, before there is a second thread.
    pub(super) fn confine(&self) -> Result<(), ExitCode> {
        let tied = if self.worker { confine::end_with_parent() } else { Ok(()) };
        match tied.and_then(|()| confine::raise_descriptors()).and_then(|()| confine::drop_capabilities()) {
            Ok(Bounding::Empty) => tracing::info!("every capability is dropped, the bounding set is empty"),
            Ok(Bounding::Inert) => tracing::info!(
                "every capability is dropped; an ordinary user cannot empty the bounding set, which no_new_privs makes \
                 ineffective"
            ),
            Err(error) => {
                exit::complain(&format!("cannot drop capabilities: {error}"));
                return Err(ExitCode::from(exit::FAILED));
            }
        }
        Ok(())
    }
}

/// Runs the command.
pub async fn run(options: Options, panicked: Panicked) -> ExitCode {
    let (config, source) = match before(&options).await {
        Ok(ready) => ready,
        Err(error) => return exit::report(error.code(), &error),
    };
    let signals = match Signals::hear() {
        Ok(signals) => signals,
        Err(error) => return exit::report(exit::FAILED, &error),
    };
    if options.worker {
        work(config, source, signals, panicked).await
    } else {
        drop(source);
        supervise(&config, signals, panicked).await
    }
}

async fn supervise(config: &AgentConfig, mut signals: Signals, mut panicked: Panicked) -> ExitCode {
    let health = match config.health_address.map(|address| (address, listen(address))) {
        None => None,
        Some((_, Ok(listener))) => Some(listener),
        Some((address, Err(error))) => {
            exit::complain(&format!(
                "cannot listen on {address}: {error}; give another --health-address, or none"
            ));
            return ExitCode::from(exit::FAILED);
        }
    };
    // This very program, also if another version lies at its path by now.
    let mut command = std::process::Command::new("/proc/self/exe");
    let mut arguments = std::env::args_os();
    command.arg0(arguments.next().unwrap_or_else(|| "fuse-secrets".into())).args(arguments).arg("--worker");
    let supervisor = Supervisor { command, health, hopeless: HOPELESS };
    let running = supervisor.run(&config.node_socket, signals.came());
    tokio::select! {
        ended = running => ExitCode::from(match ended {
            Ended::Told => exit::OK,
            Ended::Stuck => exit::FAILED,
            Ended::Hopeless(code) => code,
        }),
        // The worker ends with this process, and the next agent takes over.
        () = panicked.happened() => ExitCode::from(exit::SOFTWARE),
    }
}

async fn work(config: AgentConfig, source: Source, mut signals: Signals, mut panicked: Panicked) -> ExitCode {
    let go = tokio::task::spawn_blocking(|| wait_for_go(std::io::stdin().as_fd()));
    let listener = tokio::select! {
        go = go => match go {
            Ok(Ok(listener)) => listener,
            Ok(Err(error)) => return exit::report(exit::FAILED, &error),
            Err(_) => return ExitCode::from(exit::SOFTWARE),
        },
        () = signals.came() => return ExitCode::from(exit::OK),
    };
    let metrics = Arc::new(Metrics::default());
    let attachment = Attachment::new(Arc::clone(&metrics));
    let setup = Setup { limits: config.limits, memory: config.memory_limit, threads: config.fuse_threads };
    let store = Arc::new(Vault::within(Arc::clone(&metrics), config.reach.clone()));
    let keeper = Arc::clone(&attachment);
    let agent = match Agent::start_lending(store, Arc::clone(&metrics), setup, keeper) {
        Ok(agent) => agent,
        Err(error) => return exit::report(exit::start(&error), &error),
    };
    // A mount of the shim's is made for replies of this size, and the next agent must serve it as well.
    if agent.largest_reply() < LARGEST_REPLY {
        exit::complain(&format!(
            "too little memory may be locked: replies of {LARGEST_REPLY} bytes do not fit a quarter of {} bytes; raise \
             RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=, the shim: --agent-memlock) or memoryLimit to 8 MiB or more",
            agent.memory().limit()
        ));
        return ExitCode::from(exit::LIMIT);
    }
    if let Some(listener) = listener {
        let serving = Arc::new(Serving { attachment: Arc::clone(&attachment), metrics });
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => drop(tokio::spawn(health::serve(listener, serving))),
            Err(error) => return exit::report(exit::FAILED, &error),
        }
    }
    // For people, who can also ask the shim: where there is no place for it, the agent serves without.
    let socket = admin::listen(&agent);
    if let Err(error) = &socket {
        tracing::warn!(%error, "`fuse-secrets mounts` cannot ask this agent");
    }
    let (classes, cluster) = match source {
        Source::Directory(directory) => (Arc::new(directory) as Arc<dyn Classes>, None),
        Source::Cluster(api) => match Api::connect(*api) {
            Ok(api) => {
                let cluster = Cluster::start(&api, agent.metrics());
                tracing::info!(api = api.address(), "classes are those of the API server");
                tokio::spawn(refresh::watch(Arc::downgrade(&agent), cluster.events.clone()));
                (Arc::clone(&cluster.classes) as Arc<dyn Classes>, Some(cluster))
            }
            Err(error) => return exit::report(exit::USAGE, &error),
        },
    };
    let worker = Worker::new(Arc::clone(&agent), classes, cluster, config, attachment);
    let serving = tokio::spawn(Arc::clone(&worker).run());
    tokio::select! {
        () = signals.came() => {}
        // What it holds cannot be trusted any more; the shim gives it to the next worker.
        () = panicked.happened() => return ExitCode::from(exit::SOFTWARE),
    }
    worker.leave().await;
    serving.abort();
    agent.shutdown().await;
    ExitCode::from(exit::OK)
}

/// Where classes come from.
enum Source {
    Directory(Directory),
    Cluster(Box<kube::Config>),
}

/// Reads settings, and opens the directory of classes or finds the API server; asks nobody.
async fn before(options: &Options) -> Result<(AgentConfig, Source), BeforeError> {
    let unreadable = |path: &Path, error| BeforeError::Read { path: path.to_owned(), error };
    let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(|error| unreadable(path, error));
    let file = options.config.as_ref().map(read).transpose()?;
    let config = AgentConfig::read(options.settings.clone().into(), std::env::vars_os(), file.as_deref());
    let config = config.map_err(BeforeError::Settings)?;
    if rustix::process::geteuid().is_root() && !config.allow_root {
        return Err(BeforeError::Root);
    }
    let source = match &config.classes {
        Some(path) => Source::Directory(Directory::open(path).map_err(|error| unreadable(path, error))?),
        None => Source::Cluster(Box::new(Api::find().await?)),
    };
    Ok((config, source))
}
