//! The embedded store in this process, with what the measures ask of it.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use fuse_secrets::dev::{Counts, Embedded, Options};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::Error;
use crate::wire::Wire;

/// The role id that agents log in with.
pub(crate) const ROLE: &str = "bench";
/// Size of the file `large`.
pub(crate) const LARGE: usize = 1 << 20;
/// Size of the file `small`.
pub(crate) const SMALL: usize = 64;
/// Names of the files of a volume of three small secrets.
pub(crate) const THREE: [&str; 3] = ["database/password", "api-key", "tls.key"];

/// A running store.
pub(crate) struct Store {
    // Dropped before the runtime that serves it.
    embedded: Embedded,
    wire: Wire,
    _runtime: Runtime,
    scratch: PathBuf,
    made: AtomicU32,
}

impl Store {
    /// Starts it with a role that may read everything.
    pub(crate) fn start(scratch: &Path) -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (embedded, wire) = runtime.block_on(async {
            let embedded = Embedded::start(Options::default()).await?;
            let port = embedded.address().url().port().ok_or("a port")?;
            let wire = Wire::lay(port).await?;
            Ok::<_, Error>((embedded, wire))
        })?;
        let refused = |refusal| format!("embedded store: {refusal:?}");
        let write = |path: &str, body| embedded.write(path, &body).map_err(refused);
        write(
            "sys/policies/acl/bench",
            json!({ "policy": "path \"secret/*\" { capabilities = [\"read\"] }" }),
        )?;
        write("sys/auth/approle", json!({ "type": "approle" }))?;
        write(
            "auth/approle/role/bench",
            json!({ "token_policies": "bench", "token_ttl": "1h", "role_id": ROLE }),
        )?;
        write("auth/approle/role/bench/custom-secret-id", json!({ "secret_id": "bench-secret-id" }))?;
        let secret_id = scratch.join("secret-id");
        std::fs::write(&secret_id, "bench-secret-id")?;
        std::fs::set_permissions(&secret_id, std::fs::Permissions::from_mode(0o600))?;
        let made = AtomicU32::new(0);
        Ok(Self { embedded, wire, _runtime: runtime, scratch: scratch.to_owned(), made })
    }

    /// Where agents reach it.
    pub(crate) fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.wire.port())
    }

    /// The times of its answers.
    pub(crate) fn wire(&self) -> &Wire {
        &self.wire
    }

    /// What was asked of it.
    pub(crate) fn counts(&self) -> Counts {
        self.embedded.counts()
    }

    /// The file with the secret id.
    pub(crate) fn secret_id_file(&self) -> PathBuf {
        self.scratch.join("secret-id")
    }

    /// Writes the secret `secret/NAME` with one key, `value`.
    pub(crate) fn put(&self, name: &str, value: &str) -> Result<(), Error> {
        let put = self.embedded.put(&format!("secret/{name}"), &json!({ "value": value }));
        Ok(put.map_err(|refusal| format!("embedded store: {refusal:?}"))?)
    }

    /// A class of files, each with the secret that it is cut from.
    pub(crate) fn class(&self, interval: &str, files: &[(&str, String)]) -> Result<PathBuf, Error> {
        let mut text = format!(
            "apiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\nmetadata:\n  name: bench\n\
             spec:\n  provider: vault\n  parameters:\n    roleName: bench\n    refreshInterval: {interval}\n    \
             objects: |\n"
        );
        for (file, secret) in files {
            writeln!(
                text,
                "      - {{objectName: {file}, secretPath: secret/data/{secret}, secretKey: value}}"
            )?;
        }
        let path = self.scratch.join(format!("class-{}.yaml", self.made.fetch_add(1, Ordering::Relaxed)));
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// A class of three small secrets, `secret/OWNER/0` to `2`, which are written too.
    pub(crate) fn three(&self, interval: &str, owner: &str) -> Result<PathBuf, Error> {
        let files: Vec<_> = THREE.iter().zip(0..).map(|(file, n)| (*file, format!("{owner}/{n}"))).collect();
        for (file, secret) in &files {
            self.put(secret, &format!("value of {file}, first version"))?;
        }
        self.class(interval, &files)
    }

    /// A new directory to mount on.
    pub(crate) fn directory(&self) -> Result<PathBuf, Error> {
        let path = self.scratch.join(format!("mnt-{}", self.made.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path)?;
        Ok(path)
    }
}
