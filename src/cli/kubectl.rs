//! `kubectl fuse-secrets`: the tables of `fuse-secrets` for a whole cluster. It has no client of its own: the person's `kubectl` asks
//! the API server, with the person's contexts, credentials and rights, and runs `fuse-secrets` in the agents' containers.
//!
//! ```text
//!   kubectl fuse-secrets ─▶ kubectl get pods ─▶ agents by node ─▶ kubectl exec … fuse-secrets mounts, doctor  (8 at a time)
//!                        └▶ kubectl get pod, csidriver, create token ─▶ kubectl exec … fuse-secrets check --publish -
//! ```

/// Agents by node, and asking them all.
mod agents;
/// One call of `kubectl`, with its deadline and its bounds.
mod call;
/// `check --pod`.
mod check;
/// What of the cluster concerns the driver.
mod cluster;
/// `doctor`.
mod doctor;
/// `mounts`.
mod mounts;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::exit;
use crate::config::text;
use agents::Agents;
use call::{CallError, Kubectl};

/// Mounts, health and diagnoses of fuse-secrets, for a cluster
///
/// Runs your own kubectl, so contexts, credentials and plugins are those that kubectl has. Names what it may not ask.
#[derive(Parser)]
#[command(name = "kubectl fuse-secrets", bin_name = "kubectl fuse-secrets", version, after_long_help = EXAMPLES)]
#[command(max_term_width = 100)]
pub struct Arguments {
    #[command(flatten)]
    whole: Whole,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Rights, as `kubectl auth can-i` asks for them:
  mounts, doctor, check   get, list pods and create pods/exec in the driver's namespace
  doctor                  get, list daemonsets and pods in both namespaces of the driver; get csidrivers,
                          get customresourcedefinitions, list csinodes
  check                   get pods, list events and create serviceaccounts/token in the pod's namespace;
                          get csidrivers, get csinodes
What is not allowed is named, and the rest is done.

Examples:
  Every volume of the cluster, and of one node:
      kubectl fuse-secrets mounts
      kubectl fuse-secrets mounts --node worker-3 -o wide
  Those of one namespace that are not fresh:
      kubectl fuse-secrets mounts -n payments -o json | jq '.[] | select(.state != \"fresh\")'
  Is the driver installed as it must be, on every node:
      kubectl fuse-secrets doctor
  A pod hangs in ContainerCreating:
      kubectl fuse-secrets check --pod payments/orders-0

Exit codes:
  0   done
  1   a node did not answer, something is lost that matters, or something could not be tried
  64  the command line is wrong
  65  the pod, its class or its secret must change
  69  the API server or the store cannot be reached, or does not answer
  70  a fault of this program (please report it)
  75  a limit of the node is reached
  77  the API server or the store refused";

/// What holds for every command.
#[derive(Args)]
struct Whole {
    /// The kubeconfig context to use
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// The kubeconfig file to use
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The namespace of the agents
    #[arg(long, global = true, value_name = "NAMESPACE", default_value = "fuse-secrets")]
    driver_namespace: String,
    /// The namespace of the shims
    #[arg(long, global = true, value_name = "NAMESPACE", default_value = "fuse-secrets-csi")]
    shim_namespace: String,
    /// The name of the driver, as pods and the CSIDriver write it
    #[arg(long, global = true, value_name = "NAME", default_value = "fuse-secrets")]
    driver: String,
    /// How long one answer may take: 1s to 5m
    #[arg(long, global = true, value_name = "DURATION", default_value = "15s", value_parser = patience)]
    timeout: Duration,
}

#[derive(Subcommand)]
enum Command {
    /// List what is mounted on the nodes: freshness, generations, opens, errors; never a value
    #[command(after_long_help = mounts::HELP)]
    Mounts(mounts::Options),
    /// Tell how the driver is installed, and what each node gives
    #[command(after_long_help = doctor::HELP)]
    Doctor(doctor::Options),
    /// Repeat the mount of a pod's volumes and tell where it ends, word for word as the pod is told
    #[command(after_long_help = check::HELP)]
    Check(check::Options),
}

/// Which nodes.
#[derive(Args)]
struct Nodes {
    /// Only this node
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// All nodes, which is also what is done without --node
    #[arg(short = 'A', long, conflicts_with = "node")]
    all_nodes: bool,
}

impl Arguments {
    /// Runs the command to its end.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let done = match self.command {
            Command::Mounts(options) => mounts::run(&self.whole, &options),
            Command::Doctor(options) => doctor::run(&self.whole, &options),
            Command::Check(options) => check::run(&self.whole, &options),
        };
        done.unwrap_or_else(|error| {
            complain(&error.to_string());
            ExitCode::from(error.code())
        })
    }
}

impl Whole {
    fn kubectl(&self) -> Kubectl {
        Kubectl::new(self.context.as_deref(), self.kubeconfig.as_deref(), self.timeout)
    }

    /// The agents of these nodes.
    fn agents(&self, kubectl: &Kubectl, nodes: &Nodes) -> Result<Agents, CallError> {
        let node = nodes.node.as_deref().filter(|_| !nodes.all_nodes);
        Agents::find(kubectl, &self.driver_namespace, node)
    }
}

/// A line on standard error, with what others wrote made harmless.
fn complain(text: &str) {
    text.lines().for_each(|line| exit::complain(&super::text::harmless(line)));
}

/// Whole numbers with a unit, so that one answer is waited for as long as a person would.
fn patience(text: &str) -> Result<Duration, String> {
    text::duration(text, Duration::from_secs(1)..=Duration::from_secs(300))
        .map_err(|fault| format!("{}; {}", fault.rule, fault.remedy))
}
