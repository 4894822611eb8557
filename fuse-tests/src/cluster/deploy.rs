//! The driver on the cluster, from the manifests of this repository.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Cluster;

impl Cluster {
    /// Applies a directory of manifests under a kustomization of the test's own: `kustomization` is its content without `resources`,
    /// `files` what it names beside itself.
    ///
    /// # Panics
    /// It is refused.
    pub fn deploy(&self, manifests: &Path, kustomization: &Value, files: &[(&str, &str)]) {
        let directory = self.directory().join("deploy");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).unwrap();
        for (name, content) in files {
            fs::write(directory.join(name), content).unwrap();
        }
        let mut kustomization = kustomization.clone();
        // A base is named by a path that begins at the kustomization.
        let up = directory.components().skip(1).map(|_| "..").collect::<Vec<_>>().join("/");
        let base = manifests.canonicalize().unwrap();
        kustomization["resources"] = json!([format!("{up}{}", base.display())]);
        fs::write(directory.join("kustomization.yaml"), kustomization.to_string()).unwrap();
        self.kubectl(&["apply", "-k", &directory.display().to_string()]);
    }

    /// Puts the driver on the cluster, if its images are there. Returns when shim and agent run.
    ///
    /// # Panics
    /// They do not in time.
    pub fn install(&self) {
        let manifests = repository().join("deploy");
        let built = ["agent", "csi"].map(|part| self.images().join(format!("fuse-secrets-{part}.tar")));
        if !manifests.join("kustomization.yaml").exists() || !built.iter().all(|archive| archive.exists()) {
            return;
        }
        self.deploy(&manifests, &json!({}), &[]);
        for part in ["csi", "agent"] {
            let name = match part {
                "csi" => "fuse-secrets-csi",
                _ => "fuse-secrets",
            };
            self.wait_rolled_out(name, &format!("daemonset/fuse-secrets-{part}"));
        }
    }
}

/// This repository.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}
