//! The driver on the cluster, from the manifests of this repository.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Cluster;
use super::store::AUDIENCE;

/// Where this repository's manifests are.
#[must_use]
pub fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy")
}

/// Namespace and name of the DaemonSets: the shim's, the agent's.
pub const DAEMON_SETS: [(&str, &str); 2] =
    [("fuse-secrets-csi", "fuse-secrets-csi"), ("fuse-secrets", "fuse-secrets-agent")];

impl Cluster {
    /// Whether the images of shim and agent are on the node.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        let images = ["fuse-secrets-agent.tar", "fuse-secrets-csi.tar"];
        images.iter().all(|archive| self.images().join(archive).exists())
    }

    /// Puts the driver on the cluster as an overlay of this repository's manifests, if its images are there: with the cluster's store,
    /// these settings of the agent beside or instead of ours, and these of `deploy/components`. Again with others: rolls out what
    /// has changed. Returns when shim and agent are ready.
    ///
    /// # Panics
    /// They are not in time.
    pub fn install_with(&self, settings: &Value, components: &[&str]) {
        if !self.has_driver() {
            return;
        }
        self.kubectl(&["apply", "-f", &manifests().join("crds").display().to_string()]);
        let mut agent = json!({
            "authMethod": "kubernetes", "authMount": "kubernetes", "audience": AUDIENCE,
        });
        let mut files = vec![("agent.yaml", String::new())];
        if self.has_store() {
            agent["address"] = json!(self.store_url());
            match self.store().ca() {
                Some(ca) => {
                    agent["ca"] = json!("/etc/fuse-secrets/ca.crt");
                    files.push(("ca.crt", fs::read_to_string(ca).unwrap()));
                }
                // The embedded one.
                None => (agent["authMethod"], agent["authMount"]) = (json!("jwt"), json!("jwt")),
            }
        }
        for (name, value) in settings.as_object().into_iter().flatten() {
            agent[name] = value.clone();
        }
        files[0].1 = agent.to_string();
        let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
        let kustomization = json!({
            "configMapGenerator": [{
                "name": "fuse-secrets-agent", "namespace": "fuse-secrets", "behavior": "replace", "files": names,
            }],
        });
        let components: Vec<PathBuf> =
            components.iter().map(|name| manifests().join("components").join(name)).collect();
        self.deploy(&manifests(), &components, kustomization, &files);
        for (namespace, name) in DAEMON_SETS {
            self.wait_daemon(namespace, name);
        }
    }

    /// The same as people find it: with nothing of a test's own.
    ///
    /// # Panics
    /// It is not ready in time.
    pub fn install(&self) {
        self.install_with(&json!({}), &[]);
    }

    /// Applies a directory of manifests, with components, under a kustomization of the test's own: its content without what it is made
    /// of, and files that it names.
    ///
    /// # Panics
    /// It is refused.
    pub fn deploy(
        &self,
        manifests: &Path,
        components: &[PathBuf],
        mut kustomization: Value,
        files: &[(&str, String)],
    ) {
        let directory = self.directory().join("deploy");
        // There is one from the second time on.
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).unwrap();
        for (name, content) in files {
            fs::write(directory.join(name), content).unwrap();
        }
        // A base is named by a path that begins at the kustomization.
        let up = directory.components().skip(1).map(|_| "..").collect::<Vec<_>>().join("/");
        let relative = |path: &Path| format!("{up}{}", path.canonicalize().unwrap().display());
        kustomization["resources"] = json!([relative(manifests)]);
        kustomization["components"] = components.iter().map(|path| relative(path)).collect();
        fs::write(directory.join("kustomization.yaml"), kustomization.to_string()).unwrap();
        self.kubectl(&["apply", "-k", &directory.display().to_string()]);
    }

    /// The pods of the agent, or of the shim, that run now: names.
    ///
    /// # Panics
    /// The API server does not say.
    #[must_use]
    pub fn daemons(&self, (namespace, name): (&str, &str)) -> Vec<String> {
        let pods = self
            .list(&format!("api/v1/namespaces/{namespace}/pods?labelSelector=app.kubernetes.io/name={name}"));
        let alive = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        alive.filter_map(|pod| pod["metadata"]["name"].as_str().map(ToOwned::to_owned)).collect()
    }
}
