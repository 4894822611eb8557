//! `fuse-secrets dev`: the main job on an embedded default. Everything is real but the store, and that answers like one.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::fs::{FlockOperation, flock};
use serde_json::json;

use super::exit;
use super::panics::Panicked;
use super::serving::{End, Signals, allow_other, make, prepare, until_the_end};
use crate::agent::{Agent, Setup, admin, runtime};
use crate::class;
use crate::config::Settings;
use crate::dev::{Embedded, Options as StoreOptions};
use crate::metrics::Metrics;
use crate::reference::{AuthMethod, Subject};
use crate::secret::Token;
use crate::store::Credential;
use crate::store::vault::Vault;

/// How long the embedded store may take for its first answers.
const FIRST: Duration = Duration::from_secs(10);

/// The class that is served: what a developer would write, but for the short interval.
const CLASS: &str = "\
apiVersion: secrets-store.csi.x-k8s.io/v1
kind: SecretProviderClass
metadata:
  name: demo
spec:
  provider: vault
  parameters:
    roleName: demo
    refreshInterval: 1s
    objects: |
      - {objectName: db-password, secretPath: secret/data/demo/db, secretKey: password}
      - {objectName: api-key, secretPath: secret/data/demo/api, secretKey: key}
      - {objectName: app/config.json, secretPath: kv/demo/config}
";

const HELP: &str = "\
It prints what to try: reading a secret, changing it, seeing the change. Nothing outlives it: the store is in its memory, \
and the end (Ctrl-C, SIGTERM, a lost terminal, a fault) unmounts. What a killed one leaves, the next one takes away.

Examples:
      fuse-secrets dev
      fuse-secrets dev --mount ./secrets
      fuse-secrets dev --listen 127.0.0.1:8200 --log debug";

/// Arguments of `dev`.
#[derive(Args)]
#[command(after_long_help = HELP)]
pub struct Options {
    /// Where to mount; made if it is missing [default: dev in the user's runtime directory]
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// Where the embedded store listens: a loopback address, port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// Runs the command.
pub async fn run(options: Options, mut panicked: Panicked) -> ExitCode {
    match serve(options, &mut panicked).await {
        Ok(code) => code,
        Err((code, error)) => exit::report(code, error.as_ref()),
    }
}

type Failure = (u8, Box<dyn std::error::Error>);

fn failed<E: std::error::Error + 'static>(code: u8) -> impl FnOnce(E) -> Failure {
    move |error| (code, Box::new(error))
}

async fn serve(options: Options, panicked: &mut Panicked) -> Result<ExitCode, Failure> {
    let home = runtime::directory();
    runtime::make_private(&home).map_err(failed(exit::FAILED))?;
    let directory = options.mount.unwrap_or_else(|| home.join("dev"));
    make(&directory).map_err(failed(exit::CANNOT_MOUNT))?;
    let directory = prepare(&directory).map_err(failed(exit::CANNOT_MOUNT))?;

    let mut signals = Signals::hear().map_err(failed(exit::FAILED))?;
    let store = StoreOptions { listen: options.listen, root_token: None };
    let store = Embedded::start(store).await.map_err(failed(exit::USAGE))?;
    fill(&store).map_err(failed(exit::SOFTWARE))?;
    let header = Header::write(&home, &store).map_err(failed(exit::FAILED))?;

    let metrics = Arc::new(Metrics::default());
    let vault = Arc::new(Vault::new(Arc::clone(&metrics)));
    let agent = Agent::start(vault, metrics, Setup::default()).map_err(|e| (exit::start(&e), e.into()))?;
    let socket = admin::listen(&agent).map_err(failed(exit::FAILED))?;
    let mut over = Settings::default();
    over.connection.addresses = Some(vec![store.address().clone()]);
    over.login.method = Some(AuthMethod::Token);
    let subject = Subject::Local("embedded store".to_owned());
    let class = class::parse(CLASS).map_err(failed(exit::SOFTWARE))?.remove(0);
    let spec = class.into_spec(&over, &Settings::default(), subject).map_err(failed(exit::SOFTWARE))?;
    let interval = spec.freshness.interval;
    let token = Token::new(store.root_token().expose().to_owned()).map_err(failed(exit::SOFTWARE))?;
    let credential = Arc::new(Credential::Token(token));
    let deadline = Instant::now() + FIRST;
    let served = agent.mount(&directory, spec, None, credential, allow_other(None), deadline).await;
    let code = match served {
        Ok(served) => {
            introduce(&directory, &store, &header, interval).map_err(failed(exit::FAILED))?;
            match until_the_end(&served, &mut signals, panicked).await {
                End::Panic => exit::SOFTWARE,
                End::Failed => exit::FAILED,
                End::Signal | End::Unmounted => exit::OK,
            }
        }
        Err(error) => {
            let code = exit::serve(&error);
            let _ = exit::report(code, &error);
            code
        }
    };
    agent.shutdown().await;
    drop((socket, header));
    store.shutdown().await;
    Ok(ExitCode::from(code))
}

fn fill(store: &Embedded) -> Result<(), crate::dev::Refusal> {
    store.put("secret/demo/db", &json!({ "password": "correct-horse-battery-staple" }))?;
    store.put("secret/demo/api", &json!({ "key": "demo-0000-1111-2222" }))?;
    store.put("kv/demo/config", &json!({ "user": "app", "host": "db.internal", "port": 5432 }))
}

/// The root token as a header file for curl, for this user only; gone with the command. The token is good for the embedded store
/// alone, and for no longer than that lives. The file stays locked while the command runs: one that can be locked is left over.
struct Header {
    path: PathBuf,
    _locked: File,
}

impl Header {
    fn write(home: &Path, store: &Embedded) -> io::Result<Self> {
        Self::clean(home)?;
        let path = home.join(format!("dev-{}.header", std::process::id()));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.write_all(b"X-Vault-Token: ")?;
        file.write_all(store.root_token().expose().as_bytes())?;
        file.write_all(b"\n")?;
        Ok(Self { path, _locked: file })
    }

    /// Removes what killed ones left.
    fn clean(home: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(home)?.flatten() {
            let name = entry.file_name();
            if !name.to_str().is_some_and(|name| name.starts_with("dev-") && name.ends_with(".header")) {
                continue;
            }
            let file = File::open(entry.path())?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Drop for Header {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove the token's file");
        }
    }
}

fn introduce(directory: &Path, store: &Embedded, header: &Header, interval: Duration) -> io::Result<()> {
    let at = |inside: &str| quoted(&directory.join(inside).display().to_string());
    let (root, password) = (quoted(&directory.display().to_string()), at("db-password"));
    let header = quoted(&format!("@{}", header.path.display()));
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "\n{}\n\nMounted at {}. Try, in another terminal:\n\n\
         \x20 ls -lR {root}\n\
         \x20 cat {password}\n\n\
         \x20 # change the secret; the next cat after {} shows it\n\
         \x20 curl -H {header} \\\n\
         \x20   -d '{{\"data\":{{\"password\":\"changed\"}}}}' \\\n\
         \x20   {}/v1/secret/data/demo/db\n\n\
         \x20 fuse-secrets mounts\n\
         \x20 fuse-secrets mounts {root}\n\n\
         Ctrl-C unmounts and ends it.",
        store.banner(),
        directory.display(),
        humantime::format_duration(interval),
        store.address(),
    )?;
    out.flush()
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-@:+,".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_paths_are_one_word_for_a_shell() {
        assert_eq!(quoted("/run/user/1000/fuse-secrets/dev"), "/run/user/1000/fuse-secrets/dev");
        assert_eq!(quoted("/home/a b/it's"), "'/home/a b/it'\\''s'");
    }
}
