//! The shim: kubelet's side of fuse-secrets. Arguments, hardening, the ports, and the way out.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use fuse_secrets_csi::health::{self, Health};
use fuse_secrets_csi::identity::Identity;
use fuse_secrets_csi::node::{Node, Volumes};
use fuse_secrets_csi::registration::Plugin;
use fuse_secrets_csi::rpc;
use fuse_secrets_csi::wire::handover;
use fuse_secrets_csi::wire::message::Handover;
use tokio::signal::unix::{SignalKind, signal};
use tonic::service::Routes;

use keeper::driver::{Keeper, Settings};
use metrics::Metrics;

/// What is kept, and who may read it.
mod keeper;
/// EIO for readers whose agent stays away.
mod gap;
/// Who is on the node socket.
mod peer;
/// Below kubelet's root: where a volume is to be mounted, resolved without following links.
mod target;
/// FUSE mounts: made detached, attached by descriptor, taken away.
mod mount;
/// What is mounted where, as the kernel tells it.
mod mountinfo;
/// Dead mounts in the mount namespaces of running pods get the new mount.
mod heal;
/// What the process gives up before it serves, and what it warns of.
mod start;
/// The counters.
mod metrics;
/// System calls that rustix lacks and the wiping allocator: the only unsafe code.
mod sys;
/// For tests that need a mount namespace of their own.
#[cfg(test)]
mod child;

#[global_allocator]
static ALLOCATOR: sys::Wiping = sys::Wiping;

/// The largest reply that a mount asks for, in bytes: agents have a buffer for it.
const MAX_READ: u32 = 128 << 10;
/// How long a shim that is to end waits until agents hold all that it holds; kubelet kills after 30 s.
const LEAVE: Duration = Duration::from_secs(25);

/// The privileged half of fuse-secrets: mounts volumes for kubelet and keeps them alive while agents come and go.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// CSI socket to make for kubelet
    #[arg(long, env = "FUSE_SECRETS_CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    endpoint: String,
    /// Path of that socket as kubelet sees it, if another
    #[arg(long, env = "FUSE_SECRETS_CSI_KUBELET_ENDPOINT")]
    kubelet_endpoint: Option<String>,
    /// Name of the driver, as pods and the CSIDriver object have it
    #[arg(long, env = "FUSE_SECRETS_CSI_DRIVER_NAME", default_value = "fuse-secrets")]
    driver_name: String,
    /// Name of this node
    #[arg(long, env = "FUSE_SECRETS_CSI_NODE_ID")]
    node_id: String,
    /// kubelet's directory; all targets lie below it
    #[arg(long, env = "FUSE_SECRETS_CSI_KUBELET_ROOT", default_value = "/var/lib/kubelet")]
    kubelet_root: PathBuf,
    /// Directory in which kubelet looks for plugins; without it the shim does not register itself
    #[arg(long, env = "FUSE_SECRETS_CSI_REGISTRATION_DIR")]
    registration_dir: Option<PathBuf>,
    /// Socket to make for agents; its directory becomes root's and the agent's group's
    #[arg(long, env = "FUSE_SECRETS_CSI_NODE_SOCKET", default_value = "/run/fuse-secrets/node/shim.sock")]
    node_socket: PathBuf,
    /// User of the agent's processes
    #[arg(long, env = "FUSE_SECRETS_CSI_AGENT_UID", default_value_t = 65532)]
    agent_uid: u32,
    /// Group that may reach the node socket
    #[arg(long, env = "FUSE_SECRETS_CSI_AGENT_GID", default_value_t = 65532)]
    agent_gid: u32,
    /// Cgroup of the agent, as the shim sees it. Without it, an agent is the first process of a container
    #[arg(long, env = "FUSE_SECRETS_CSI_AGENT_CGROUP")]
    agent_cgroup: Option<String>,
    /// Memory that an agent may lock: RLIMIT_MEMLOCK is raised to it, in bytes or with KiB, MiB, GiB
    #[arg(long, env = "FUSE_SECRETS_CSI_AGENT_MEMLOCK", default_value = "256MiB", value_parser = start::bytes)]
    agent_memlock: u64,
    /// What becomes of requests that an agent had read when it died: sent again to the next, or ended with an error
    #[arg(long, env = "FUSE_SECRETS_CSI_HANDOVER", value_enum, default_value = "auto")]
    handover: Mode,
    /// How long readers wait for an agent before they get EIO
    #[arg(long, env = "FUSE_SECRETS_CSI_GAP_DEADLINE", default_value = "30s", value_parser = humantime::parse_duration)]
    gap_deadline: Duration,
    /// Address of /healthz, /readyz and /metrics, for example 0.0.0.0:9809; without it there is no port
    #[arg(long, env = "FUSE_SECRETS_CSI_HEALTH_ADDRESS")]
    health_address: Option<SocketAddr>,
    /// SELinux context of every file, if the policy's own for FUSE does not suit
    #[arg(long, env = "FUSE_SECRETS_CSI_SELINUX_CONTEXT")]
    selinux_context: Option<String>,
    /// Most volumes on this node
    #[arg(long, env = "FUSE_SECRETS_CSI_MAX_VOLUMES", default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=1000))]
    max_volumes: u16,
    /// How much is logged of the shim itself
    #[arg(long, env = "FUSE_SECRETS_CSI_LOG", default_value_t = tracing::Level::INFO)]
    log: tracing::Level,
    /// How it is logged
    #[arg(long, env = "FUSE_SECRETS_CSI_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: start::Format,
}

/// `--handover`
#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Sent again where the kernel does it safely
    Auto,
    /// Sent again, whatever the kernel
    Resend,
    /// Ended with ECONNABORTED
    Clone,
}

impl Mode {
    fn decide(self) -> Handover {
        match self {
            Self::Auto => handover::suits(&rustix::system::uname().release().to_string_lossy()),
            Self::Resend => Handover::Resend,
            Self::Clone => Handover::Clone,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start::log(arguments.log, arguments.log_format);
    let build = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let run = |runtime: tokio::runtime::Runtime| {
        let ended = runtime.block_on(run(arguments));
        // A thread that hangs in the kernel is left to itself.
        runtime.shutdown_background();
        ended
    };
    match start::harden().and_then(|()| build()).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the shim ends");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> std::io::Result<()> {
    let metrics = Arc::new(Metrics::default());
    let settings = Settings {
        kubelet_root: arguments.kubelet_root,
        node_socket: arguments.node_socket,
        agents: peer::Rule { uid: arguments.agent_uid, cgroup: arguments.agent_cgroup },
        agent_gid: arguments.agent_gid,
        memlock: arguments.agent_memlock,
        handover: arguments.handover.decide(),
        gap_deadline: arguments.gap_deadline,
        mount: mount::Options { max_read: MAX_READ, selinux_context: arguments.selinux_context },
        max_volumes: arguments.max_volumes.into(),
    };
    tracing::info!(handover = ?settings.handover, version = env!("CARGO_PKG_VERSION"), "the shim starts");
    let (mut ended, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let keeper = Keeper::start(settings, metrics.clone())?;
    let socket = arguments.endpoint.strip_prefix("unix://").unwrap_or(&arguments.endpoint).to_owned();
    let plugin = Plugin::new(&arguments.driver_name, arguments.kubelet_endpoint.as_ref().unwrap_or(&socket));
    if let Some(address) = arguments.health_address {
        let listener = tokio::net::TcpListener::bind(address).await?;
        let told = Told { keeper: keeper.clone(), plugin: plugin.clone(), metrics };
        drop(tokio::spawn(health::serve(listener, Arc::new(told))));
    }
    let services = Routes::new(Identity::server(arguments.driver_name, keeper.clone()))
        .add_service(Node::server(arguments.node_id, keeper.clone()));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let listener = rpc::listen(Path::new(&socket))?;
    let mut calls = tokio::spawn(rpc::serve(listener, services, async move { drop(stopped.await) }));
    let registered = async {
        match arguments.registration_dir {
            Some(directory) => plugin.register(&directory).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = ended.recv() => {}
        _ = interrupted.recv() => {}
        served = &mut calls => return served?.map_err(std::io::Error::other),
        Err(error) = registered => return Err(error),
    }
    tracing::info!("leaving as soon as agents hold every volume");
    drop(stop);
    let leave = async {
        // A call that fails has told its caller.
        let _ = calls.await;
        keeper.safe(Instant::now() + LEAVE).await
    };
    tokio::select! {
        safe = tokio::time::timeout(LEAVE, leave) => if safe != Ok(true) {
            tracing::warn!("left although no agent holds some volumes: their mounts are dead until the next publish");
        },
        _ = ended.recv() => tracing::warn!("left at once"),
        _ = interrupted.recv() => tracing::warn!("left at once"),
    }
    Ok(())
}

/// What the health port tells.
struct Told {
    keeper: Keeper,
    plugin: Plugin,
    metrics: Arc<Metrics>,
}

impl Health for Told {
    fn healthy(&self) -> Result<(), String> {
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        self.keeper.ready().and_then(|()| self.plugin.ready())
    }

    fn metrics(&self) -> String {
        self.metrics.text()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_unit_starts_the_shim_with_flags_that_exist() {
        let unit = include_str!("../../deploy/systemd/fuse-secrets-csi.service").replace("\\\n", " ");
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let arguments = Arguments::try_parse_from(line.split_whitespace()).unwrap();
        assert_eq!(arguments.agent_cgroup.as_deref(), Some("/system.slice/fuse-secrets-agent.service"));
    }

    #[test]
    fn the_configuration_document_has_every_flag_of_the_shim_with_its_default() {
        let command = Arguments::command();
        let row = |argument: &clap::Arg| {
            let default = argument.get_default_values().first().map(|default| default.to_string_lossy());
            let default = default.map_or("none".to_owned(), |default| format!("`{default}`"));
            Some(format!("| `--{}` | {default} |", argument.get_long()?))
        };
        let flags: Vec<_> = command.get_arguments().filter_map(row).collect();
        assert!(flags.len() > 10, "{flags:?}");
        let document = include_str!("../../docs/configuration.md");
        let (_, section) = document.split_once("## Shim").unwrap();
        let section = section.split("\n## ").next().unwrap();
        let listed: Vec<_> = section.lines().filter(|line| line.starts_with("| `--")).collect();
        assert_eq!(listed.len(), flags.len());
        for (listed, flag) in listed.iter().zip(&flags) {
            assert!(listed.starts_with(flag.as_str()), "{listed}\nis not\n{flag}");
        }
    }
}
