//! `kubectl fuse-secrets mounts`: the volumes of every node, as its agent lists them.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::agents::{Answer, name_silent};
use super::call::CallError;
use super::{Nodes, Whole};
use crate::agent::status::MountStatus;
use crate::cli::exit;
use crate::cli::mounts::{Output, PODS_WIDE, by_pod, pod_row, sum, wide_row};
use crate::cli::table::Table;
use crate::cli::text::columns;

pub(super) const HELP: &str = "\
The table of `fuse-secrets mounts` for all nodes: STATE is fresh, stale or gone, REFRESHED is when the store last answered for \
the secret that waits longest. Nodes that do not answer are named with the reason on standard error, and make the command exit \
with 1.

Examples:
      kubectl fuse-secrets mounts
      kubectl fuse-secrets mounts --node worker-3 -o wide
      kubectl fuse-secrets mounts -n payments
      kubectl fuse-secrets mounts -o json | jq '.[] | select(.state == \"stale\") | .node'";

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    nodes: Nodes,
    /// Only volumes of pods in this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// One mount, and where.
#[derive(Serialize, Deserialize)]
struct Mounted {
    node: String,
    #[serde(flatten)]
    mount: MountStatus,
}

pub(super) fn run(whole: &Whole, options: &Options) -> Result<ExitCode, CallError> {
    let kubectl = whole.kubectl();
    let agents = whole.agents(&kubectl, &options.nodes)?;
    let read = |said: &super::call::Said| serde_json::from_slice::<Vec<MountStatus>>(&said.out).ok();
    let answers = agents.ask(&kubectl, &["mounts", "-o", "json"], read);
    let code = if name_silent(&answers) { exit::FAILED } else { exit::OK };
    let mounts = collect(answers, options.namespace.as_deref());
    let printed = print(&mut io::stdout().lock(), &mounts, options.output, columns(), SystemTime::now());
    Ok(exit::printed(printed, code))
}

/// Sorted by node, then as the node's own table.
fn collect(answers: Vec<Answer<Vec<MountStatus>>>, namespace: Option<&str>) -> Vec<Mounted> {
    let mut mounts: Vec<Mounted> = Vec::new();
    for Answer { node, said, .. } in answers {
        let wanted = |mount: &MountStatus| namespace.is_none() || mount.namespace.as_deref() == namespace;
        let of_node = said.unwrap_or_default().into_iter().filter(wanted);
        mounts.extend(of_node.map(|mount| Mounted { node: node.clone(), mount }));
    }
    mounts.sort_by(|a, b| a.node.cmp(&b.node).then_with(|| by_pod(&a.mount, &b.mount)));
    mounts
}

fn print(
    out: &mut impl Write,
    mounts: &[Mounted],
    output: Output,
    columns: usize,
    now: SystemTime,
) -> io::Result<()> {
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut *out, mounts)?;
        return writeln!(out);
    }
    if mounts.is_empty() {
        return writeln!(out, "nothing is mounted");
    }
    if output == Output::Wide {
        let mut table = Table::new(&[&["NODE"], PODS_WIDE].concat());
        mounts.iter().for_each(|Mounted { node, mount }| {
            table.row([vec![node.clone()], wide_row(mount, now)].concat());
        });
        table.print(out, usize::MAX)?;
    } else {
        let mut table = Table::new(&["NODE", "POD", "CLASS", "FILES", "GEN", "STATE", "REFRESHED"]);
        mounts.iter().for_each(|Mounted { node, mount }| {
            let mut row = [vec![host(node).to_owned()], pod_row(mount, now)].concat();
            row.pop();
            table.row(row);
        });
        table.print_fitted(out, columns, &[(2, 12), (0, 16), (1, 8)])?;
    }
    writeln!(out, "{}", sum(mounts.iter().map(|mounted| &mounted.mount)))
}

/// A node's name without its domain, which tells nobody anything. An address has none.
fn host(node: &str) -> &str {
    let is_address = node.parse::<std::net::IpAddr>().is_ok();
    if is_address { node } else { node.split('.').next().unwrap_or(node) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::mounts::tests::mount;

    fn mounts() -> Vec<Mounted> {
        let answer = |node: &str, numbers: std::ops::Range<usize>| Answer {
            node: node.to_owned(),
            pod: format!("fuse-secrets-agent-{node}"),
            said: Ok(numbers.rev().map(mount).collect()),
        };
        let node = "ip-10-0-12-34.eu-central-1.compute.internal";
        collect(vec![answer(node, 5..10), answer("a", 0..3)], None)
    }

    fn printed(mounts: &[Mounted], output: Output, columns: usize) -> String {
        let now = humantime::parse_rfc3339("2026-01-01T00:00:42Z").unwrap();
        let mut text = Vec::new();
        print(&mut text, mounts, output, columns, now).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn long_names_of_nodes_and_pods_fit_80_and_120_columns_and_stay_apart() {
        for columns in [80, 120] {
            let text = printed(&mounts(), Output::Table, columns);
            println!("{text}");
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{text}");
            let rows: Vec<&str> = text.lines().skip(1).take(8).collect();
            assert!(rows.iter().all(|row| row.ends_with("42s")), "{text}");
            assert!(rows[7].starts_with("ip-10-0-12-34  payments/o"), "{text}");
            let distinct: std::collections::HashSet<_> = rows.iter().collect();
            assert_eq!(distinct.len(), rows.len(), "{text}");
        }
    }

    #[test]
    fn a_node_is_told_without_its_domain_and_an_address_whole() {
        assert_eq!(["w-1.example.org", "w-1", "10.0.0.1"].map(host), ["w-1", "w-1", "10.0.0.1"]);
    }

    #[test]
    fn mounts_are_sorted_by_node_and_pod_and_summed() {
        let text = printed(&mounts(), Output::Wide, 80);
        let nodes: Vec<&str> = text.lines().skip(1).filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(nodes[0], "a");
        assert!(text.find("-00005").unwrap() < text.find("-00006").unwrap(), "{text}");
        assert_eq!(text.lines().last(), Some("8 mounts, 1 stale, 0 gone"));
    }

    #[test]
    fn a_namespace_leaves_only_its_own_and_json_names_the_node() {
        let json = printed(&mounts(), Output::Json, 80);
        let back: Vec<Mounted> = serde_json::from_str(&json).unwrap();
        assert_eq!((back.len(), back[0].node.as_str()), (8, "a"));
        let answer = Answer { node: "a".to_owned(), pod: String::new(), said: Ok(vec![mount(1)]) };
        assert!(collect(vec![answer], Some("other")).is_empty());
    }
}
