//! The first processes of a cluster for tests, and a cluster that stays for a person.
//!
//! | arguments | what it is |
//! |---|---|
//! | `world` | the first process of a cluster's pid namespace: ends when standard input does |
//! | `boot PLAN`, `init PLAN` | who makes a node's namespaces, and its first process |
//! | `sweep DIRECTORY` | removes a cluster's directory and cgroups when standard input ends |
//! | `stay` | a cluster as the environment describes it, with the driver and what its example asks of the store: prints one line of JSON when it is ready, ends on SIGTERM or SIGINT |

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, reason = "a program of the tests")]

use std::path::Path;
use std::process::ExitCode;

use fuse_tests::cluster::{Cluster, Options, init, scratch, world};
use serde_json::json;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["world"] => world::first_process(),
        ["boot", plan] => return init::boot(Path::new(plan)),
        ["init", plan] => init::first_process(Path::new(plan)),
        ["sweep", directory] => {
            if let Err(why) = scratch::sweep_at_end(Path::new(directory)) {
                eprintln!("{why}");
                return ExitCode::FAILURE;
            }
        }
        ["stay"] => stay(),
        _ => {
            eprintln!("test-cluster: `cargo xtask cluster up` starts what a person may want");
            return ExitCode::from(64);
        }
    }
    ExitCode::SUCCESS
}

fn stay() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // Before the start, which a signal then ends in an orderly way as soon as it is over.
    let (mut terminate, mut interrupt) = runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        (signal(SignalKind::terminate()).unwrap(), signal(SignalKind::interrupt()).unwrap())
    });
    let cluster = Cluster::start(Options::from_env().unwrap());
    cluster.install();
    let mut state = json!({
        "driver": cluster.has_driver(),
        "pid": std::process::id(),
        "node": cluster.node_pid(),
        "directory": cluster.directory(),
        "kubeconfig": cluster.kubeconfig(),
        "hyperkube": Options::from_env().unwrap().programs.join("hyperkube"),
    });
    if cluster.has_store() {
        cluster.ready_example();
        let store = cluster.store();
        state["store"] = json!({"address": store.address(), "ca": store.ca(), "token": store.root_token()});
    }
    println!("{state}");
    runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    drop(cluster);
}
