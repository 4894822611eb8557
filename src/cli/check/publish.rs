//! `fuse-secrets check --publish`: one publish repeated in the agent's container, with the agent's settings, as far as a pod's owner
//! can be told of it: resolved, logged in, every file read; nothing mounted, nothing served, no value printed.
//!
//! ```text
//!   document (attributes, pod, tokens) ─▶ node::publish::resolve ─▶ Agent::publish ─▶ sizes and versions, or the refusal
//!                                             tells each step           the store, as a pod's volume asks it
//! ```
//! The login is given back at the end, and with it what was leased. A file whose request is a POST or PUT is asked for all the same:
//! the store makes what it would make for a pod.

use std::io::{self, Read as _, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use fuse_secrets_csi::wire::LONGEST;
use fuse_secrets_csi::wire::message::Publish;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{COLUMNS, Format};
use crate::agent::{Agent, ServeError, Setup};
use crate::class::Classes;
use crate::class::directory::Directory;
use crate::cli::exit;
use crate::cli::table::Table;
use crate::cli::text::{harmless, wrap};
use crate::config::{AgentConfig, Layer};
use crate::kubernetes::api::{Api, ConnectError};
use crate::kubernetes::classes::Watched;
use crate::kubernetes::issuer::{Issuer, Verdict as Signed};
use crate::metrics::Metrics;
use crate::node::publish::{self, Resolved, resolve_told, resolve_without_token};
use crate::node::refusal::{Refusal, event, forged};
use crate::node::worker::UNKNOWN;
use crate::reference::VolumeSpec;
use crate::secret::Token;
use crate::store::vault::Vault;
use crate::store::{Credential, ErrorKind, StoreError};
use crate::volume::{BuildError, PublishError, Volume};

/// What a step is called is no longer than this.
const STEP_COLUMNS: usize = 12;

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Well.
    Good,
    /// Well, and its owner should know something.
    Note,
    /// Here it ends.
    Refused,
    /// It was not tried.
    Untried,
}

/// One step of the way from a pod's volume to its secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which.
    pub step: String,
    /// How it went.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
}

impl Step {
    /// One that went like this.
    pub fn new(step: impl Into<String>, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { step: step.into(), verdict, found: found.into() }
    }
}

/// What became of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAnswer {
    /// Its path in the volume.
    pub path: String,
    /// Its length; absent where the volume was refused.
    pub bytes: Option<usize>,
    /// The store's version of the secret.
    pub version: Option<u64>,
    /// What the store said instead.
    pub refused: Option<String>,
}

/// What a pod is told instead of its volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The name of the gRPC code: `NotFound`.
    pub code: String,
    /// The text, word for word as kubelet shows it.
    pub text: String,
}

/// All that is found out of one volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// The steps in their order; after one that was refused comes none.
    pub steps: Vec<Step>,
    /// The files, as far as the store was asked for them.
    pub files: Vec<FileAnswer>,
    /// Why the volume is refused, if it is.
    pub refused: Option<Refused>,
    /// What the command exits with.
    pub exit_code: u8,
}

/// Runs `check --publish`.
pub(super) async fn run(
    document: &Path,
    config: Option<&Path>,
    without_token: bool,
    output: Format,
) -> ExitCode {
    let (publish, config) = match before(document, config) {
        Ok(ready) => ready,
        Err((code, text)) => {
            exit::complain(&text);
            return ExitCode::from(code);
        }
    };
    let diagnosis = match diagnose(publish, config, without_token).await {
        Ok(diagnosis) => diagnosis,
        Err((code, text)) => {
            exit::complain(&text);
            return ExitCode::from(code);
        }
    };
    let mut out = io::stdout().lock();
    let printed = match output {
        Format::Table => diagnosis.print(&mut out, COLUMNS),
        Format::Json => writeln!(out, "{:#}", serde_json::json!(diagnosis)),
    };
    exit::printed(printed, diagnosis.exit_code)
}

impl Diagnosis {
    /// Prints it in so many columns; what a pod is told is never wrapped.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn print(&self, out: &mut impl Write, columns: usize) -> io::Result<()> {
        for Step { step, verdict, found } in &self.steps {
            let mark = match verdict {
                Verdict::Good => '✓',
                Verdict::Note => '!',
                Verdict::Refused => '✗',
                Verdict::Untried => '-',
            };
            let mut lines = wrap(&harmless(found), columns - STEP_COLUMNS - 5).into_iter();
            let first = lines.next().unwrap_or_default();
            writeln!(out, "{}", format!("  {mark} {step:<STEP_COLUMNS$} {first}").trim_end())?;
            for line in lines {
                writeln!(out, "{:1$}{line}", "", STEP_COLUMNS + 5)?;
            }
        }
        if let Some(Refused { code, text }) = &self.refused {
            writeln!(out, "\n  what the pod is told:")?;
            for line in format!("rpc error: code = {code} desc = {text}").lines() {
                writeln!(out, "    {}", harmless(line))?;
            }
        }
        if self.files.is_empty() {
            return Ok(());
        }
        writeln!(out)?;
        let mut table = Table::new(&["  FILE", "BYTES", "VERSION", "STORE"]);
        for FileAnswer { path, bytes, version, refused } in &self.files {
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            table.row(vec![
                format!("  {path}"),
                or_dash(bytes.map(|bytes| bytes.to_string())),
                or_dash(version.map(|version| version.to_string())),
                if refused.is_some() { "refused" } else { "answered" }.to_owned(),
            ]);
        }
        table.print_fitted(out, columns, &[(0, 8)])
    }

    /// Ends the way here.
    fn refuse(&mut self, step: &str, refusal: &Refusal) {
        self.steps.push(Step::new(step, Verdict::Refused, format!("{:?}", refusal.code)));
        self.refused = Some(Refused { code: format!("{:?}", refusal.code), text: event(&refusal.text) });
        self.exit_code = exit::refusal(refusal.code);
    }
}

/// What stops a diagnosis before it begins, with its exit code.
type Before = (u8, String);

fn before(document: &Path, config: Option<&Path>) -> Result<(Publish, AgentConfig), Before> {
    let unreadable = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| (exit::NO_INPUT, format!("cannot read {path}: {error}"))
    };
    let file = config.map(|path| std::fs::read_to_string(path).map_err(unreadable(path))).transpose()?;
    let config = AgentConfig::read(Layer::default(), std::env::vars_os(), file.as_deref());
    let config = config.map_err(|faults| (exit::USAGE, faults.to_string()))?;
    let text = read(document).map_err(unreadable(document))?;
    // The parser's own errors quote what they read, which may be a token.
    let wrong = |_| {
        let text = "the document is not a publish: JSON with attributes, pod and tokens; let `kubectl fuse-secrets check` \
                    write it";
        (exit::DATA, text.to_owned())
    };
    Ok((serde_json::from_slice(&text).map_err(wrong)?, config))
}

/// What an agent asks beside the store.
struct Sources {
    classes: Arc<dyn Classes>,
    /// Who knows whether a token is the issuer's; `None`: nobody here does.
    issuer: Option<Arc<Issuer>>,
}

impl Sources {
    /// Those of this agent.
    async fn open(config: &AgentConfig, metrics: &Arc<Metrics>) -> Result<Self, Before> {
        if let Some(path) = &config.classes {
            let unreadable = |error| (exit::NO_INPUT, format!("cannot read {}: {error}", path.display()));
            let classes = Arc::new(Directory::open(path).map_err(unreadable)?);
            return Ok(Self { classes, issuer: None });
        }
        let unreachable = |error: ConnectError| (exit::USAGE, error.to_string());
        let api = Api::connect(Api::find().await.map_err(unreachable)?).map_err(unreachable)?;
        let classes = Watched::start(api.clone(), Arc::clone(metrics));
        Ok(Self { classes, issuer: Some(Issuer::start(api, Arc::clone(metrics))) })
    }
}

/// As long as a message between shim and agent may be, and wiped.
fn read(document: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::with_capacity(LONGEST + 1));
    let limit = LONGEST as u64 + 1;
    if document == Path::new("-") {
        io::stdin().take(limit).read_to_end(&mut text)?;
    } else {
        std::fs::File::open(document)?.take(limit).read_to_end(&mut text)?;
    }
    if text.len() > LONGEST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {LONGEST} bytes")));
    }
    Ok(text)
}

async fn diagnose(publish: Publish, config: AgentConfig, without_token: bool) -> Result<Diagnosis, Before> {
    let deadline = Instant::now() + config.publish_deadline;
    let metrics = Arc::new(Metrics::default());
    let Sources { classes, issuer } = Sources::open(&config, &metrics).await?;
    if let Some(kind) = publish::kind(&publish.attributes) {
        // As the agent waits for them at its start. Whether they are known by then is told by who looks for one.
        let _ = tokio::time::timeout(UNKNOWN.min(config.publish_deadline), classes.known(kind)).await;
    }
    let resolving = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || resolve(publish, classes.as_ref(), &config, without_token))
    };
    let fault = |_| (exit::SOFTWARE, "a fault of this program; its log tells where".to_owned());
    let (mut diagnosis, resolved) = resolving.await.map_err(fault)?;
    let Some(Resolved { spec, pod, token, .. }) = resolved else { return Ok(diagnosis) };
    if let Some(issuer) = issuer
        && !diagnosis.verified(&issuer, &spec, &token).await
    {
        return Ok(diagnosis);
    }
    let store = Arc::new(Vault::within(Arc::clone(&metrics), config.reach.clone()));
    let setup = Setup { limits: config.limits, memory: config.memory_limit, threads: 1 };
    let agent = Agent::start(store, metrics, setup);
    let agent = agent.map_err(|error| (exit::start(&error), error.to_string()))?;
    let credential = Arc::new(Credential::Jwt(token));
    let publishing = agent.publish(Path::new("check"), spec.clone(), Some(pod), credential, deadline);
    match publishing.await {
        Ok(volume) => diagnosis.answered(&spec, &volume),
        Err(error) => diagnosis.failed(&spec, error),
    }
    if diagnosis.exit_code == exit::LIMIT {
        let limit = agent.memory().limit();
        let note = format!("this check may lock {limit} bytes; the agent beside it may be allowed more");
        diagnosis.steps.push(Step::new("memory", Verdict::Note, note));
    }
    // Gives the login back.
    agent.shutdown().await;
    Ok(diagnosis)
}

/// Goes as far as no store is needed; `None`: no further.
fn resolve(
    publish: Publish,
    classes: &dyn Classes,
    config: &AgentConfig,
    without_token: bool,
) -> (Diagnosis, Option<Resolved>) {
    let mut diagnosis = Diagnosis::default();
    let mut next = 0;
    // In the order in which `resolve` takes them.
    let way = [
        (publish::Step::Attributes, "attributes"),
        (publish::Step::Pod, "pod"),
        (publish::Step::Class, "class"),
        (publish::Step::Policy, "policy"),
        (publish::Step::Token, "token"),
        (publish::Step::Account, "account"),
        (publish::Step::Settings, "settings"),
    ];
    let steps = &mut diagnosis.steps;
    let mut tell = |step, found: String| {
        let at = way.iter().position(|(known, _)| *known == step).unwrap_or(0);
        next = at + 1;
        steps.push(Step::new(way[at].1, Verdict::Good, found));
    };
    let warn = |warnings: Vec<String>, steps: &mut Vec<Step>| {
        steps.extend(warnings.into_iter().map(|text| Step::new("warning", Verdict::Note, text)));
    };
    if without_token {
        match resolve_without_token(&publish, classes, config, &mut tell) {
            Ok((_, warnings)) => {
                warn(warnings, &mut diagnosis.steps);
                let untried = "not tried: they need a token of the pod's service account";
                diagnosis.steps.push(Step::new("login, read", Verdict::Untried, untried));
                diagnosis.exit_code = exit::FAILED;
            }
            Err(refusal) => {
                // Nobody asked for a token or an account.
                let at = if next == 4 { 6 } else { next };
                diagnosis.refuse(way.get(at).map_or("", |(_, name)| name), &refusal);
            }
        }
        return (diagnosis, None);
    }
    match resolve_told(publish, classes, config, &mut tell) {
        Ok(mut resolved) => {
            warn(std::mem::take(&mut resolved.warnings), &mut diagnosis.steps);
            (diagnosis, Some(resolved))
        }
        Err(refusal) => {
            diagnosis.refuse(way.get(next).map_or("", |(_, name)| name), &refusal);
            (diagnosis, None)
        }
    }
}

impl Diagnosis {
    /// Whether the token is good, as far as that can be told.
    async fn verified(&mut self, issuer: &Issuer, spec: &VolumeSpec, token: &Token) -> bool {
        let audience = spec.identity.auth.audience.as_deref().unwrap_or_default();
        match issuer.verify(token, audience).await {
            Ok(verdict) => {
                self.steps.push(match verdict {
                    Signed::Signed => {
                        Step::new("signature", Verdict::Good, "with a key of the API server's issuer")
                    }
                    Signed::Unknown => {
                        let found = "the issuer's keys are not to be had; the login has to prove the token";
                        Step::new("signature", Verdict::Note, found)
                    }
                });
                true
            }
            Err(why) => {
                self.refuse("signature", &forged(audience, &why));
                false
            }
        }
    }

    fn answered(&mut self, spec: &VolumeSpec, volume: &Volume) {
        self.steps.push(Step::new("login", Verdict::Good, login(spec)));
        self.steps.push(Step::new("read", Verdict::Good, "every file"));
        let Some(current) = volume.generations().current() else { return };
        self.files.extend(current.snapshot.files().iter().map(|record| FileAnswer {
            path: record.path.clone(),
            bytes: record.size(),
            version: record.version,
            refused: None,
        }));
    }

    fn failed(&mut self, spec: &VolumeSpec, error: ServeError) {
        let mut files: Vec<FileAnswer> = Vec::new();
        let step = match &error {
            ServeError::Publish(PublishError::Store(errors)) => {
                let asked = format!("/v1/auth/{}/login", spec.identity.auth.mount);
                let of_login = |error: &StoreError| error.asked.contains(&asked);
                // A store that is silent to the end does not say to what.
                let silent = |error: &StoreError| error.kind == ErrorKind::Deadline;
                if errors.iter().any(|(_, error)| of_login(error)) {
                    "login"
                } else if errors.iter().all(|(_, error)| silent(error)) {
                    "store"
                } else {
                    self.steps.push(Step::new("login", Verdict::Good, login(spec)));
                    files = answers(spec, errors);
                    "read"
                }
            }
            ServeError::Publish(PublishError::Build(BuildError::Extract(errors))) => {
                self.steps.push(Step::new("login", Verdict::Good, login(spec)));
                files = answers(spec, errors);
                "read"
            }
            _ => "store",
        };
        self.files = files;
        self.refuse(step, &Refusal::from(error));
    }
}

/// What stands in the line of a login that went well.
fn login(spec: &VolumeSpec) -> String {
    let auth = &spec.identity.auth;
    format!("at auth/{} with role {}", auth.mount, auth.role)
}

/// Each file of the volume, and what was said of it. One error may be about several files.
fn answers(spec: &VolumeSpec, errors: &[(String, impl std::fmt::Display)]) -> Vec<FileAnswer> {
    let answer = |path: &str| {
        let about = |files: &str| files == path || files.split(", ").any(|file| file == path);
        let error = errors.iter().find(|(files, _)| about(files));
        let refused = error.map(|(_, error)| error.to_string());
        FileAnswer { path: path.to_owned(), bytes: None, version: None, refused }
    };
    spec.files.iter().map(|file| answer(file.path.as_str())).collect()
}
