//! `kubectl fuse-secrets doctor`: what of the cluster concerns the driver, then `fuse-secrets doctor` of every agent. Of many nodes
//! only what is not good is told, each finding once with the nodes that have it; of one node, everything.
//!
//! The shims are asked nothing: nothing can be run in their image, and what `/readyz` says to kubelet's probe is whether a pod of
//! theirs is ready.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::agents::{Agents, Answer, name_silent};
use super::call::{CallError, Kubectl, Said};
use super::cluster::{Asked, DEFINITIONS, Facts, several};
use super::{Nodes, Whole};
use crate::cli::doctor::{Check, Report, Verdict};
use crate::cli::text::{harmless, wrap};
use crate::cli::{Print, exit};

/// Lines below the table are no longer than this.
const COLUMNS: usize = 80;

pub(super) const HELP: &str = "\
First the cluster: the CSIDriver and its fields, the definitions of classes, both DaemonSets, on which nodes the driver is \
registered, and images that differ. Then what each agent finds on its node; of all nodes only what is not good, with the nodes \
that have it. A shim counts as ready when kubelet's probe of its /readyz succeeds. Exit codes: 0 all is there or only less than \
it could be (note), 1 something is lost that matters (LOST), could not be looked at, or a node did not answer.

Examples:
      kubectl fuse-secrets doctor
      kubectl fuse-secrets doctor --node worker-3
      kubectl fuse-secrets doctor -o json | jq '.nodes[] | select(.why) | .node'";

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    nodes: Nodes,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Print,
}

/// One node's report.
#[derive(Serialize)]
struct Node {
    node: String,
    agent: String,
    /// Absent: it did not answer.
    checks: Option<Vec<Check>>,
    /// Why not.
    why: Option<String>,
}

pub(super) fn run(whole: &Whole, options: &Options) -> Result<ExitCode, CallError> {
    let kubectl = whole.kubectl();
    let facts = facts(whole, &kubectl);
    let cluster = Report { checks: facts.judge() };
    // A cluster without an agent has facts all the same.
    let answers = match whole.agents(&kubectl, &options.nodes) {
        Ok(agents) => ask(&agents, &kubectl),
        Err(error) => {
            super::complain(&error.to_string());
            Vec::new()
        }
    };
    let silent = name_silent(&answers) || answers.is_empty();
    let nodes: Vec<Node> = answers.into_iter().map(Node::from).collect();
    let lost = cluster.exit_code() != exit::OK
        || nodes.iter().flat_map(|node| node.checks.iter().flatten()).any(|c| c.verdict == Verdict::Lost);
    let text = match options.output {
        Print::Table => table(&cluster, nodes, options.nodes.node.is_some()),
        Print::Json => {
            format!("{:#}\n", serde_json::json!({ "cluster": cluster.checks, "nodes": nodes }))
        }
    };
    let code = if silent || lost || !facts.is_whole() { exit::FAILED } else { exit::OK };
    Ok(exit::printed(io::stdout().lock().write_all(text.as_bytes()), code))
}

fn facts(whole: &Whole, kubectl: &Kubectl) -> Facts {
    fn told<T>(asked: Result<T, CallError>) -> Asked<T> {
        asked.map_err(|error| error.short())
    }
    let set = |name: &'static str, namespace: &str, set: &str| {
        let what = |verb: &str, of: &str| format!("{verb} {of} in namespace {namespace}");
        let label = format!("app.kubernetes.io/name={set}");
        (
            name,
            told(kubectl.find(&what("get", "daemonsets"), &["get", "daemonset", "-n", namespace, set])),
            told(kubectl.get(&what("list", "pods"), &["get", "pods", "-n", namespace, "-l", &label])),
        )
    };
    Facts {
        driver: whole.driver.clone(),
        csi_driver: told(kubectl.find("get csidrivers", &["get", "csidriver", &whole.driver])),
        definitions: DEFINITIONS.map(|(name, _)| {
            told(kubectl.find("get customresourcedefinitions", &["get", "customresourcedefinition", name]))
        }),
        sets: [
            set("agent", &whole.driver_namespace, "fuse-secrets-agent"),
            set("shim", &whole.shim_namespace, "fuse-secrets-csi"),
        ],
        csi_nodes: told(kubectl.get("list csinodes", &["get", "csinode"])),
    }
}

fn ask(agents: &Agents, kubectl: &Kubectl) -> Vec<Answer<Report>> {
    agents.ask(kubectl, &["doctor", "--agent-pid", "1", "-o", "json"], |said: &Said| {
        serde_json::from_slice(&said.out).ok()
    })
}

impl From<Answer<Report>> for Node {
    fn from(answer: Answer<Report>) -> Self {
        let Answer { node, pod, said } = answer;
        let (checks, why) = match said {
            Ok(report) => (Some(report.checks), None),
            Err(why) => (None, Some(why)),
        };
        Self { node, agent: pod, checks, why }
    }
}

fn table(cluster: &Report, nodes: Vec<Node>, whole: bool) -> String {
    let mut text = format!("the cluster\n{cluster}");
    if whole {
        for Node { node, agent, checks, .. } in nodes {
            if let Some(checks) = checks {
                let _ = write!(
                    text,
                    "\nnode {}, agent {}\n{}",
                    harmless(&node),
                    harmless(&agent),
                    Report { checks }
                );
            }
        }
        return text;
    }
    let answered = nodes.iter().filter(|node| node.checks.is_some()).count();
    if answered == 0 {
        return text;
    }
    let mut good = 0;
    let mut findings: Vec<(Check, Vec<String>)> = Vec::new();
    for Node { node, checks, .. } in nodes {
        let Some(checks) = checks else { continue };
        let bad: Vec<_> = checks.into_iter().filter(|check| check.verdict != Verdict::Good).collect();
        good += usize::from(bad.is_empty());
        for check in bad {
            match findings.iter_mut().find(|(known, _)| *known == check) {
                Some((_, nodes)) => nodes.push(node.clone()),
                None => findings.push((check, vec![node.clone()])),
            }
        }
    }
    let _ = writeln!(text, "\nall is good on {good} of {answered} nodes that answered");
    for (check, nodes) in findings {
        let names = harmless(&several(nodes.iter().map(String::as_str)));
        text.push('\n');
        let heading = format!("on {} of {answered} nodes: {names}", nodes.len());
        wrap(&heading, COLUMNS).iter().for_each(|line| {
            let _ = writeln!(text, "{line}");
        });
        let _ = write!(text, "{check}");
    }
    text
}
