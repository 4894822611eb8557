//! `kubectl fuse-secrets check --pod`: the mount of a pod's volumes repeated by hand. What kubelet would send is put together here and
//! piped to an agent; what that one finds is printed. A right that is missing is named, and whatever can be told without it is told.
//!
//! ```text
//!   pod ─▶ its volumes of our driver ─┐
//!   CSIDriver ─▶ audiences ─▶ tokens ─┼─▶ one document per volume ─▶ exec agent: check --publish - ─▶ Diagnosis
//!   node ─▶ its agent ────────────────┘
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use fuse_secrets_csi::wire::message::Publish;
use fuse_secrets_csi::wire::{Count, Secret};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::agents::{Agents, Csi, List, Pod, exec};
use super::call::{CallError, Kubectl, failure};
use super::cluster::{CsiDriver, CsiNode};
use super::{Nodes, Whole, complain};
use crate::cli::check::publish::{Diagnosis, Step, Verdict};
use crate::cli::text::{columns, harmless};
use crate::cli::{Print, exit};

/// An agent's publish deadline is at most 90 s, and it gives its login back afterwards.
const PATIENCE: Duration = Duration::from_secs(120);
/// The shortest that the API server gives.
const LIFETIME: &str = "10m";
/// Asked for where the CSIDriver may not be read: what the manifests of `deploy/` say.
const AUDIENCE: &str = "vault";
/// Events that are shown.
const EVENTS: usize = 3;

pub(super) const HELP: &str = "\
Puts together what kubelet sends for each of the pod's volumes of this driver, with a token of the pod's service account that \
lives for 10 minutes, and has the agent on the pod's node resolve the class, log in and read every file, without mounting. \
Prints the steps that went well (✓), what should be known (!), where it ends (✗) with the text that the pod is told, what was \
not tried (-), then names, lengths and versions of the files, never a value, and the pod's latest events of kind FailedMount.

The store sees a login and reads as those of the pod; the login is given back. A file whose request is a POST or PUT is asked \
for as well.

Examples:
      kubectl fuse-secrets check --pod payments/orders-0
      kubectl fuse-secrets check --pod payments/orders-0 -o json | jq '.volumes[].refused.text'";

#[derive(Args)]
pub(super) struct Options {
    /// The pod
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = full_name)]
    pod: FullName,
    /// The agent's configuration file, in its container
    #[arg(long, value_name = "PATH", default_value = "/etc/fuse-secrets/agent.yaml")]
    agent_config: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Print,
}

/// `namespace/name`.
#[derive(Clone)]
struct FullName {
    namespace: String,
    name: String,
}

fn full_name(text: &str) -> Result<FullName, &'static str> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(FullName { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err("is not NAMESPACE/NAME; write it like payments/orders-0"),
    }
}

/// All that is found out.
#[derive(Default, Serialize)]
struct Finding {
    /// What holds for all volumes.
    steps: Vec<Step>,
    volumes: Vec<VolumeFinding>,
    /// What kubelet told the pod, newest first.
    events: Vec<Event>,
    #[serde(skip)]
    exit_code: u8,
}

#[derive(Serialize)]
struct VolumeFinding {
    volume: String,
    #[serde(flatten)]
    diagnosis: Diagnosis,
}

#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Event {
    message: String,
    count: Option<u32>,
    last_timestamp: Option<String>,
    event_time: Option<String>,
    series: Option<Series>,
}

#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Series {
    count: Option<u32>,
    last_observed_time: Option<String>,
}

impl Event {
    /// When it was seen last; all forms are RFC 3339 in UTC, and so in order as text.
    fn time(&self) -> &str {
        let series = self.series.as_ref().and_then(|series| series.last_observed_time.as_deref());
        series.or(self.last_timestamp.as_deref()).or(self.event_time.as_deref()).unwrap_or_default()
    }

    fn times(&self) -> u32 {
        self.series.as_ref().and_then(|series| series.count).or(self.count).unwrap_or(1)
    }
}

pub(super) fn run(whole: &Whole, options: &Options) -> Result<ExitCode, CallError> {
    let kubectl = whole.kubectl();
    let FullName { namespace, name } = &options.pod;
    let what = format!("get pods in namespace {namespace}");
    let pod: Pod = kubectl.get(&what, &["get", "pod", "-n", namespace, name])?;
    let mut finding = Finding::default();
    diagnose(&mut finding, whole, &kubectl, &pod, &options.agent_config)?;
    finding.events = match events(&kubectl, &pod) {
        Ok(events) => events,
        Err(error) => {
            complain(&error.to_string());
            Vec::new()
        }
    };
    let mut out = io::stdout().lock();
    let printed = match options.output {
        Print::Table => finding.print(&mut out, columns()),
        Print::Json => writeln!(out, "{:#}", serde_json::json!(finding)),
    };
    Ok(exit::printed(printed, finding.exit_code))
}

impl Finding {
    fn step(&mut self, step: &str, verdict: Verdict, found: impl Into<String>) {
        self.steps.push(Step::new(step, verdict, found));
    }

    /// The first code that is none of success counts.
    fn ends_with(&mut self, code: u8) {
        if self.exit_code == exit::OK {
            self.exit_code = code;
        }
    }

    fn print(&self, out: &mut impl Write, columns: usize) -> io::Result<()> {
        Diagnosis { steps: self.steps.clone(), ..Diagnosis::default() }.print(out, columns)?;
        for VolumeFinding { volume, diagnosis } in &self.volumes {
            writeln!(out, "\nvolume {}", harmless(volume))?;
            diagnosis.print(out, columns)?;
        }
        let Some(newest) = self.events.first() else { return Ok(()) };
        let noun = if self.events.len() == 1 { "event" } else { "events" };
        writeln!(
            out,
            "\n{} {noun} FailedMount, the newest at {}",
            self.events.len(),
            harmless(newest.time())
        )?;
        for event in self.events.iter().take(EVENTS) {
            writeln!(out, "  {} ({} times)", harmless(event.time()), event.times())?;
            for line in event.message.lines() {
                writeln!(out, "    {}", harmless(line))?;
            }
        }
        Ok(())
    }
}

fn diagnose(
    finding: &mut Finding,
    whole: &Whole,
    kubectl: &Kubectl,
    pod: &Pod,
    agent_config: &str,
) -> Result<(), CallError> {
    let node = pod.spec.node_name.as_str();
    let place = if node.is_empty() { "on no node yet".to_owned() } else { format!("on node {node}") };
    finding.step("pod", Verdict::Good, format!("{}, {place}, {}", pod.full_name(), pod.state()));
    let ours = |csi: &&Csi| csi.driver == whole.driver;
    let volumes: Vec<(&str, &Csi)> = (pod.spec.volumes.iter())
        .filter_map(|volume| Some((volume.name.as_str(), volume.csi.as_ref().filter(ours)?)))
        .collect();
    if volumes.is_empty() {
        let found =
            format!("the pod has no volume of the driver {}; see spec.volumes[].csi.driver", whole.driver);
        finding.step("volume", Verdict::Refused, found);
        finding.ends_with(exit::DATA);
        return Ok(());
    }
    let Some(driver) = csi_driver(finding, whole, kubectl) else { return Ok(()) };
    registered(finding, whole, kubectl, node);
    let nodes = Nodes { node: None, all_nodes: true };
    let agents = whole.agents(kubectl, &nodes)?;
    let Some(agent) = agent(finding, &agents, node) else { return Ok(()) };
    for (name, csi) in volumes {
        let mut steps = Vec::new();
        if csi.read_only != Some(true) {
            let found = "readOnly is not true: writes are refused all the same, and a pod with hostUsers: false does not start";
            steps.push(Step::new("volume", Verdict::Note, found));
        }
        let (tokens, missing) = tokens(kubectl, pod, &driver);
        let without = missing.is_some();
        steps.extend(missing);
        let document = document(pod, csi, &driver, tokens);
        let mut diagnosis = match ask(kubectl, agent, agent_config, document, without) {
            Ok(diagnosis) => diagnosis,
            Err(error) => {
                complain(&error.to_string());
                let exit_code = error.code();
                steps.push(Step::new("agent", Verdict::Untried, "it did not answer, for the reason above"));
                Diagnosis { exit_code, ..Diagnosis::default() }
            }
        };
        steps.append(&mut diagnosis.steps);
        diagnosis.steps = steps;
        finding.ends_with(diagnosis.exit_code);
        finding.volumes.push(VolumeFinding { volume: name.to_owned(), diagnosis });
    }
    Ok(())
}

/// What of the CSIDriver decides what kubelet sends.
struct Driver {
    pod_info: bool,
    audiences: Vec<String>,
}

fn csi_driver(finding: &mut Finding, whole: &Whole, kubectl: &Kubectl) -> Option<Driver> {
    let name = &whole.driver;
    match kubectl.find::<CsiDriver>("get csidrivers", &["get", "csidriver", name]) {
        Ok(Some(driver)) => {
            let audiences: Vec<String> = driver.audiences().into_iter().map(ToOwned::to_owned).collect();
            let told = audiences.iter().map(|one| format!("{one:?}")).collect::<Vec<_>>().join(", ");
            let told = if told.is_empty() { "no tokens".to_owned() } else { format!("tokens for {told}") };
            finding.step("CSIDriver", Verdict::Good, format!("{name}, {told}"));
            Some(Driver { pod_info: driver.spec.pod_info_on_mount == Some(true), audiences })
        }
        Ok(None) => {
            finding.step(
                "CSIDriver",
                Verdict::Refused,
                format!("no CSIDriver {name}; apply the manifests of deploy/"),
            );
            finding.ends_with(exit::DATA);
            None
        }
        Err(error) => {
            let found = format!("taken to ask for a token for {AUDIENCE:?}: {error}");
            finding.step("CSIDriver", Verdict::Note, found);
            Some(Driver { pod_info: true, audiences: vec![AUDIENCE.to_owned()] })
        }
    }
}

fn registered(finding: &mut Finding, whole: &Whole, kubectl: &Kubectl, node: &str) {
    if node.is_empty() {
        return;
    }
    let (verdict, found) = match kubectl.find::<CsiNode>("get csinodes", &["get", "csinode", node]) {
        Ok(Some(there)) if there.has(&whole.driver) => (Verdict::Good, format!("on {node}")),
        Ok(_) => {
            finding.ends_with(exit::UNAVAILABLE);
            let found = format!(
                "{} is not registered on {node}: kubelet mounts nothing of it there; see the shim's pod on that node",
                whole.driver
            );
            (Verdict::Note, found)
        }
        Err(error) => (Verdict::Untried, error.to_string()),
    };
    finding.step("registered", verdict, found);
}

fn agent<'a>(finding: &mut Finding, agents: &'a Agents, node: &str) -> Option<&'a Pod> {
    let Some(agent) = agents.one(node) else {
        let states: Vec<String> =
            agents.pods().iter().map(|pod| format!("{} is {}", pod.metadata.name, pod.state())).collect();
        let found = format!("none is ready: {}", super::cluster::several(states.iter().map(String::as_str)));
        finding.step("agent", Verdict::Refused, found);
        finding.ends_with(exit::UNAVAILABLE);
        return None;
    };
    let found = format!("{} on {}", agent.metadata.name, agent.spec.node_name);
    if agent.spec.node_name == node {
        finding.step("agent", Verdict::Good, found);
    } else if node.is_empty() {
        finding.step("agent", Verdict::Note, format!("{found}, since the pod has no node yet"));
    } else {
        finding.step(
            "agent",
            Verdict::Note,
            format!("{found}, since none is ready on {node}: the pod waits for that"),
        );
        finding.ends_with(exit::UNAVAILABLE);
    }
    Some(agent)
}

/// A token for each audience that kubelet would ask one for; or why there is none.
fn tokens(kubectl: &Kubectl, pod: &Pod, driver: &Driver) -> (BTreeMap<String, Secret>, Option<Step>) {
    let mut tokens = BTreeMap::new();
    for audience in &driver.audiences {
        match token(kubectl, pod, audience) {
            Ok(token) => drop(tokens.insert(audience.clone(), token)),
            Err(error) => {
                return (BTreeMap::new(), Some(Step::new("token", Verdict::Untried, error.to_string())));
            }
        }
    }
    (tokens, None)
}

fn token(kubectl: &Kubectl, pod: &Pod, audience: &str) -> Result<Secret, CallError> {
    let (account, namespace) = (&pod.spec.service_account_name, &pod.metadata.namespace);
    let (name, uid) = (&pod.metadata.name, &pod.metadata.uid);
    let mut arguments = vec![
        "create",
        "token",
        account,
        "-n",
        namespace,
        "--bound-object-kind",
        "Pod",
        "--bound-object-name",
        name,
        "--bound-object-uid",
        uid,
        "--duration",
        LIFETIME,
    ];
    // The empty one is the API server's own.
    if !audience.is_empty() {
        arguments.extend(["--audience", audience]);
    }
    let what = format!("create serviceaccounts/token for {account} in namespace {namespace}");
    let said = kubectl.ask(&what, &arguments)?;
    match std::str::from_utf8(&said.out).map(str::trim) {
        Ok(token) if !token.is_empty() => Ok(Secret::new(token.to_owned())),
        _ => Err(CallError::Failed { what, said: "kubectl printed no token".to_owned() }),
    }
}

/// What kubelet would send, as the shim passes it on. Written into a buffer that does not grow, and is wiped.
fn document(
    pod: &Pod,
    csi: &Csi,
    driver: &Driver,
    tokens: BTreeMap<String, Secret>,
) -> serde_json::Result<Zeroizing<Vec<u8>>> {
    let context = [
        ("pod.name", &pod.metadata.name),
        ("pod.namespace", &pod.metadata.namespace),
        ("pod.uid", &pod.metadata.uid),
        ("serviceAccount.name", &pod.spec.service_account_name),
        ("ephemeral", &"true".to_owned()),
    ];
    let context = context.map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value.clone()));
    let publish = Publish {
        volume: "check".to_owned(),
        target: "check".to_owned(),
        pod: if driver.pod_info { context.into() } else { BTreeMap::new() },
        secret_ref: csi.node_publish_secret_ref.is_some(),
        attributes: csi.volume_attributes.clone(),
        group: pod.spec.security_context.fs_group,
        tokens,
    };
    let mut count = Count::default();
    serde_json::to_writer(&mut count, &publish)?;
    let mut document = Zeroizing::new(Vec::with_capacity(count.0));
    serde_json::to_writer(&mut *document, &publish).inspect_err(|_| document.zeroize())?;
    Ok(document)
}

fn ask(
    kubectl: &Kubectl,
    agent: &Pod,
    config: &str,
    document: serde_json::Result<Zeroizing<Vec<u8>>>,
    without_token: bool,
) -> Result<Diagnosis, CallError> {
    let what = "run a check in the agent's container";
    let failed = |said: String| CallError::Failed { what: what.to_owned(), said };
    let document = document.map_err(|_| failed("the pod's volume cannot be written as JSON".to_owned()))?;
    let mut arguments = vec!["check", "--publish", "-", "--config", config, "-o", "json"];
    if without_token {
        arguments.push("--without-token");
    }
    let said = exec(kubectl, agent, &arguments, Some(document), Some(PATIENCE))?;
    if let Ok(diagnosis) = serde_json::from_slice(&said.out) {
        return Ok(diagnosis);
    }
    if said.err.contains("unexpected argument '--publish'") {
        return Err(failed(
            "its program is older than this one and knows no check --publish; update the agents".to_owned(),
        ));
    }
    Err(failure(what, &said))
}

fn events(kubectl: &Kubectl, pod: &Pod) -> Result<Vec<Event>, CallError> {
    let (namespace, name) = (&pod.metadata.namespace, &pod.metadata.name);
    let what = format!("list events in namespace {namespace}");
    let uid = &pod.metadata.uid;
    let selector = format!(
        "involvedObject.kind=Pod,involvedObject.name={name},involvedObject.uid={uid},reason=FailedMount"
    );
    let arguments = ["get", "events", "-n", namespace, "--field-selector", &selector];
    let found: List<Event> = kubectl.get(&what, &arguments)?;
    let mut events = found.items;
    events.sort_by(|a, b| b.time().cmp(a.time()));
    Ok(events)
}

#[cfg(test)]
mod tests;
