//! kubectl in the cluster's network, as its administrator. It ends with the cluster, and after `LONGEST`.

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::Cluster;

/// How long one command may take, in seconds.
const LONGEST: &str = "120";

impl Cluster {
    /// Runs kubectl; returns what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn kubectl(&self, words: &[&str]) -> String {
        self.try_kubectl(words).unwrap_or_else(|why| panic!("kubectl {}: {why}", words.join(" ")))
    }

    /// The same.
    ///
    /// # Errors
    /// What it printed on standard error, or that it took too long.
    ///
    /// # Panics
    /// It does not start.
    pub fn try_kubectl(&self, words: &[&str]) -> Result<String, String> {
        self.kubectl_with(words, "")
    }

    /// The same with something on its standard input.
    ///
    /// # Errors
    /// What it printed on standard error, or that it took too long.
    ///
    /// # Panics
    /// It does not start.
    pub fn kubectl_with(&self, words: &[&str], input: &str) -> Result<String, String> {
        let mut child = self.world.spawn(self.kubectl_command(words));
        // kubectl reads all of it before it prints much.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        said(&child.wait_with_output().unwrap())
    }

    /// kubectl as a command for [`super::World::spawn`], with pipes.
    #[must_use]
    pub fn kubectl_command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", LONGEST]).arg(self.options.programs.join("hyperkube")).arg("kubectl");
        command.arg(format!("--kubeconfig={}", self.kubeconfig().display()));
        command.arg(format!("--cache-dir={}", self.directory().join("cache").display()));
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A program that runs `kubectl` as its administrator, for [`super::World::spawn`], with pipes: the real one is found in `directory`,
    /// which is put before PATH.
    ///
    /// # Panics
    /// The directory cannot be written.
    #[must_use]
    pub fn with_kubectl(&self, directory: &Path, program: &Path) -> Command {
        // One program with the parts of Kubernetes, of which this is one.
        let hyperkube = self.options.programs.join("hyperkube");
        let kubectl = directory.join("kubectl");
        fs::write(&kubectl, format!("#!/bin/sh\nexec {} kubectl \"$@\"\n", hyperkube.display())).unwrap();
        fs::set_permissions(&kubectl, Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", directory.display()));
        command.env("KUBECONFIG", self.kubeconfig()).env("KUBECACHEDIR", self.directory().join("cache"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Applies a manifest: YAML, or a JSON value.
    ///
    /// # Panics
    /// It is refused.
    pub fn apply(&self, manifest: &impl Display) {
        let done = self.kubectl_with(&["apply", "-f", "-"], &manifest.to_string());
        done.unwrap_or_else(|why| panic!("apply: {why}"));
    }

    /// Deletes what a manifest names, and waits until it is gone.
    ///
    /// # Panics
    /// It is refused, or stays.
    pub fn delete(&self, manifest: &impl Display) {
        let done = self.kubectl_with(&["delete", "-f", "-"], &manifest.to_string());
        done.unwrap_or_else(|why| panic!("delete: {why}"));
    }

    /// Runs a command in a container (`None`: the pod's first), and returns what it printed on standard output.
    ///
    /// # Errors
    /// What it printed on standard error, and how it ended.
    pub fn exec(
        &self,
        namespace: &str,
        pod: &str,
        container: Option<&str>,
        words: &[&str],
    ) -> Result<String, String> {
        let mut command = vec!["exec", "--namespace", namespace, pod];
        command.extend(container.iter().flat_map(|container| ["--container", container]));
        command.push("--");
        command.extend(words);
        self.try_kubectl(&command)
    }

    /// What a container (`None`: the pod's first) printed so far.
    ///
    /// # Panics
    /// There is no such container, or it has not started.
    #[must_use]
    pub fn logs(&self, namespace: &str, pod: &str, container: Option<&str>) -> String {
        let mut command = vec!["logs", "--namespace", namespace, pod];
        command.extend(container.iter().flat_map(|container| ["--container", container]));
        self.kubectl(&command)
    }
}

fn said(output: &Output) -> Result<String, String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    let late =
        if output.status.code() == Some(124) { format!(", not within {LONGEST} s") } else { String::new() };
    Err(format!(
        "{}{}{late}",
        error.trim(),
        if text.is_empty() { String::new() } else { format!(" (after {text})") }
    ))
}
