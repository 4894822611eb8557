//! A cluster of one node for a person: the same as the tests', held by a process that stays.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bench::built;
use crate::command::{self, Error};
use crate::images::{self, Architecture};
use crate::{kubernetes, setup, tools, vault};

/// A real Kubernetes cluster of one node, in namespaces of its own (needs root)
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Which,
}

#[derive(clap::Subcommand)]
enum Which {
    /// Builds what is missing, starts the cluster with Vault and the driver, and says what to try; it stays until `down`
    Up,
    /// Ends it, and removes everything that it made
    Down,
    /// Runs kubectl on it
    #[command(disable_help_flag = true)]
    Kubectl {
        /// As kubectl has them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    match &args.which {
        Which::Up => up(),
        Which::Down => down(),
        Which::Kubectl { arguments } => kubectl(arguments),
    }
}

/// A shell and its commands, the only image of pods that is there.
const TOOLS: &str = "localhost/tools:1";

/// What is said of a cluster that stays.
fn state_file() -> PathBuf {
    tools::target().join("cluster.json")
}

fn up() -> Result<ExitCode, Error> {
    if let Some(state) = running()? {
        println!("it is up already\n");
        explain(&state);
        return Ok(ExitCode::SUCCESS);
    }
    let program = built(&[], &["test-cluster"])?.join("debug/test-cluster");
    let log = state_file().with_extension("log");
    let mut command = Command::new(program);
    command.arg("stay").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log)?);
    provide(&mut command)?;
    // Ctrl-C in this terminal is not for it.
    command.process_group(0);
    let mut child = command.spawn()?;
    let output = child.stdout.take().ok_or("the cluster prints nothing")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    let Ok(state) = serde_json::from_str::<Value>(&line) else {
        return Err(format!("the cluster did not start; {} says why", log.display()).into());
    };
    fs::write(state_file(), &line)?;
    explain(&state);
    Ok(ExitCode::SUCCESS)
}

/// Builds what is missing of a cluster, and names it to a program that starts one.
pub(crate) fn provide(command: &mut Command) -> Result<(), Error> {
    if let Some(why) = setup::lacking_cluster() {
        return Err(format!("a cluster cannot run here: {why}").into());
    }
    kubernetes::images()?;
    images::build(Architecture::HOST, "localhost")?;
    let vault =
        std::env::var_os("FUSE_SECRETS_TEST_VAULT").map_or_else(vault::binary, |path| Ok(path.into()))?;
    command.env("FUSE_SECRETS_TEST_KUBERNETES", kubernetes::programs()?);
    command.env("FUSE_SECRETS_TEST_IMAGES", tools::images()).env("FUSE_SECRETS_TEST_VAULT", vault);
    Ok(())
}

fn down() -> Result<ExitCode, Error> {
    let Some(state) = running()? else {
        println!("no cluster is up");
        return Ok(ExitCode::SUCCESS);
    };
    let pid = state["pid"].to_string();
    command::run(Command::new("kill").arg(&pid))?;
    let end = Instant::now() + Duration::from_secs(60);
    while running()?.is_some() {
        if Instant::now() > end {
            return Err(format!("process {pid} does not end within a minute").into());
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    println!("the cluster is gone");
    Ok(ExitCode::SUCCESS)
}

fn kubectl(arguments: &[String]) -> Result<ExitCode, Error> {
    let state = running()?.ok_or("no cluster is up: cargo xtask cluster up")?;
    let text = |name: &str| state[name].as_str().unwrap_or_default();
    let mut nsenter = Command::new("nsenter");
    nsenter.arg(format!("--target={}", state["node"])).args(["--net", "--"]);
    nsenter
        .args([text("hyperkube"), "kubectl", &format!("--kubeconfig={}", text("kubeconfig"))])
        .args(arguments);
    let status = nsenter.status().map_err(|error| format!("cannot run nsenter: {error}"))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is said of the cluster that is up, if one is.
fn running() -> Result<Option<Value>, Error> {
    let Ok(text) = fs::read_to_string(state_file()) else { return Ok(None) };
    let state: Value = serde_json::from_str(&text)?;
    // Its number may be another process's by now.
    let line = fs::read(format!("/proc/{}/cmdline", state["pid"])).unwrap_or_default();
    let is_ours = String::from_utf8_lossy(&line).contains("test-cluster");
    if !is_ours {
        fs::remove_file(state_file())?;
    }
    Ok(is_ours.then_some(state))
}

fn explain(state: &Value) {
    let text = |name: &str| state[name].as_str().unwrap_or_default();
    println!("A cluster of one node is up. To try:\n");
    println!("  cargo xtask cluster kubectl get pods -A");
    if state["driver"] == true {
        // The image that is on the node, as there is no registry.
        println!(
            "  sed 's|image: busybox|image: {TOOLS}|' deploy/examples/pod.yaml | cargo xtask cluster kubectl apply -f -"
        );
        println!("  cargo xtask cluster kubectl -n shop get pods");
        println!("  cargo xtask cluster kubectl -n shop exec files -- cat /mnt/secrets/password");
    } else {
        println!("  cargo xtask cluster kubectl run hello --image {TOOLS} -- sleep 1000");
        println!("  cargo xtask cluster kubectl exec -it hello -- sh");
    }
    println!("\nIn its network, with its kubeconfig:\n");
    println!("  nsenter --target={} --net env KUBECONFIG={} bash", state["node"], text("kubeconfig"));
    let store = |name: &str| state["store"][name].as_str();
    if let (Some(address), Some(ca), Some(token)) = (store("address"), store("ca"), store("token")) {
        println!("  export VAULT_ADDR={address} VAULT_CACERT={ca} VAULT_TOKEN={token}");
    }
    println!("\nLogs: {}/log. To end it: cargo xtask cluster down", text("directory"));
}
