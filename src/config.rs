//! What an operator sets for a mount, typed. Flags win over the environment; both win over the volume's class; the class wins
//! over the configuration file; the file wins over the defaults. So what is said *at* a mount decides, and what is written
//! down for all mounts yields to what a class says of its own store. An agent has many volumes: whatever is said to it yields to
//! their classes.
//!
//! ```text
//!   mount   flags ─▶ environment ─▶ class ─▶ file ─▶ default       the first that says something wins, field by field
//!           └── Config::over ──┘             └ Config::under
//!   agent   class ─▶ flags ─▶ environment ─▶ file ─▶ default
//!                    └────── AgentConfig::under ──┘
//! ```
//! Every fault of all sources is reported at once, by the source's own spelling of the setting and never with the value.
//! No secret comes by flag or variable: credentials are named by file.

/// What an agent is told.
pub mod agent;
/// Faults: document, field, rule, remedy.
pub mod fault;
/// The settings of one source, as text.
pub mod layer;
/// What flags, class and file may say about one volume.
pub mod settings;
/// From text to types.
pub(crate) mod text;
/// YAML with limits.
pub(crate) mod yaml;

pub use agent::{AgentConfig, UnknownAttributes};
pub use fault::{Fault, Faults};
pub use layer::{AgentFlags, Layer, MountFlags};
pub use settings::Settings;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cache::Limits;
use crate::config::fault::{Broken, Sink, broken, collect};
use crate::config::layer::{Command, Source};
use crate::config::settings::{INTERVAL, OPEN_DEADLINE};
use crate::reference::{AuthMethod, ClientCertificate, Pem, Subject};
use crate::store::Credential;

/// All of a mount's configuration but its class and its directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What wins over the class: flags, then environment. Always names the login method.
    pub over: Settings,
    /// What yields to the class: the file.
    pub under: Settings,
    /// Where the login's secret half lies.
    pub credential: CredentialFile,
    /// Whether other users may see the mount; `None`: where the system permits.
    pub allow_other: Option<bool>,
    /// Bounds of the cache.
    pub limits: Limits,
    /// Bytes of secret pages; `None`: what `RLIMIT_MEMLOCK` gives.
    pub memory_limit: Option<usize>,
    /// Threads that answer the kernel. Default 1.
    pub fuse_threads: usize,
}

/// No handler waits for anything, so one thread answers as fast as its core can. A second one is woken for requests that the
/// first would have taken on its next turn: half as much CPU again for each small read.
const FUSE_THREADS: usize = 1;

/// A login's secret half, by file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialFile {
    /// A store token.
    Token(PathBuf),
    /// A JWT.
    Jwt(PathBuf),
    /// AppRole's secret id; `None` for a role that binds none.
    SecretId(Option<PathBuf>),
}

impl Config {
    /// Reads and folds the three sources: flags, all environment variables, and the configuration file's text.
    ///
    /// # Errors
    /// Every fault of all of them.
    pub fn read(
        flags: Layer,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
        file: Option<&str>,
    ) -> Result<Self, Faults> {
        read(flags, variables, file, Self::resolve)
    }

    /// Folds the three sources.
    ///
    /// # Errors
    /// Every value that breaks its rule, in every source, and a login that is not whole.
    pub fn resolve(flags: Layer, environment: Layer, file: Layer) -> Result<Self, Faults> {
        let parsed = Parsed::read_all(Command::Mount, flags, environment, file)?;
        let sink = Sink::new("configuration");
        let config = Parsed::fold(parsed, &sink);
        sink.finish(config)
    }

    /// On whose behalf a mount without Kubernetes logs in: named by where its credential lies, so that two mounts with
    /// the same file share one login and others do not.
    #[must_use]
    pub fn subject(&self) -> Subject {
        let (kind, path) = match &self.credential {
            CredentialFile::Token(path) => ("token-file", Some(path)),
            CredentialFile::Jwt(path) => ("jwt-file", Some(path)),
            CredentialFile::SecretId(path) => ("secret-id-file", path.as_ref()),
        };
        Subject::Local(
            path.map_or_else(|| "no-secret-id".to_owned(), |path| format!("{kind}:{}", path.display())),
        )
    }

    /// The login's secret half, as the store takes it.
    #[must_use]
    pub fn credential(&self) -> Credential {
        match &self.credential {
            CredentialFile::Token(path) => Credential::TokenFile(path.clone()),
            CredentialFile::Jwt(path) => Credential::JwtFile(path.clone()),
            CredentialFile::SecretId(path) => Credential::SecretIdFile(path.clone()),
        }
    }
}

/// Reads the sources that are not flags, and folds all three.
fn read<C>(
    flags: Layer,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
    file: Option<&str>,
    resolve: impl FnOnce(Layer, Layer, Layer) -> Result<C, Faults>,
) -> Result<C, Faults> {
    let sinks = [Source::Environment, Source::File].map(|source| Sink::new(source.document()));
    let environment = Layer::read_environment(variables, &sinks[0]);
    let file = file.map(|text| Layer::read_yaml(text, &sinks[1])).unwrap_or_default();
    match (collect(sinks.map(|sink| sink.finish(Some(())))), resolve(flags, environment, file)) {
        (Ok(_), config) => config,
        (Err(unknown), Ok(_)) => Err(unknown),
        (Err(unknown), Err(wrong)) => Err(unknown.and(wrong)),
    }
}

/// One source, typed.
#[derive(Default)]
struct Parsed {
    settings: Settings,
    /// The method that this source says or implies by its credential.
    method: Option<AuthMethod>,
    /// Whether it says it in so many words; an implied `kubernetes` yields to a `jwt` said below.
    explicit: bool,
    role_id: Option<String>,
    token_file: Option<PathBuf>,
    jwt_file: Option<PathBuf>,
    secret_id_file: Option<PathBuf>,
    allow_other: Option<Option<bool>>,
    cache_size: Option<usize>,
    cache_entries: Option<usize>,
    in_flight: Option<usize>,
    memory_limit: Option<usize>,
    fuse_threads: Option<usize>,
    agent: agent::Said,
}

impl Parsed {
    /// The three sources, the one that wins first.
    fn read_all(
        command: Command,
        flags: Layer,
        environment: Layer,
        file: Layer,
    ) -> Result<Vec<Self>, Faults> {
        let sources = [(Source::Flags, flags), (Source::Environment, environment), (Source::File, file)];
        collect(sources.into_iter().map(|(source, layer)| Self::read(command, source, layer)))
    }

    fn read(command: Command, source: Source, mut layer: Layer) -> Result<Self, Faults> {
        let sink = Sink::new(source.document());
        let reader = Values { source, sink: &sink };
        for name in layer.foreign(command) {
            let (not, other) = match command {
                Command::Mount => ("is no setting of a single mount", "remove it: only an agent has it"),
                Command::Agent => {
                    ("is no setting of an agent", "remove it: its volumes bring their own tokens")
                }
            };
            reader.fault(name, not, other);
        }
        let path = reader.path();
        let agent = agent::Said::read(&reader, &mut layer);
        let mut parsed = Self {
            role_id: reader.read("role_id", layer.role_id, text::word),
            token_file: reader.read("token_file", layer.token_file, path),
            jwt_file: reader.read("jwt_file", layer.jwt_file, path),
            secret_id_file: reader.read("secret_id_file", layer.secret_id_file, path),
            allow_other: reader.read("allow_other", layer.allow_other, when),
            cache_size: reader.read("cache_size", layer.cache_size, |t| text::size(t, 64 << 10..=16 << 30)),
            cache_entries: reader
                .read("cache_entries", layer.cache_entries, |t| text::count(t, 1..=1_000_000)),
            in_flight: reader.read("in_flight", layer.in_flight, |t| text::count(t, 1..=1_024)),
            memory_limit: reader
                .read("memory_limit", layer.memory_limit, |t| text::size(t, 64 << 10..=64 << 30)),
            fuse_threads: reader.read("fuse_threads", layer.fuse_threads, |t| text::count(t, 1..=64)),
            agent,
            ..Self::default()
        };

        let connection = &mut parsed.settings.connection;
        connection.addresses = reader.read("address", layer.address, addresses);
        connection.namespace = reader.read("namespace", layer.namespace, text::word);
        connection.server_name = reader.read("server_name", layer.server_name, text::word);
        connection.skip_verify = reader.read("skip_verify", layer.skip_verify, text::switch);
        connection.proxy = reader.read("proxy", layer.proxy, proxy);
        connection.ca = match (layer.ca, layer.ca_directory) {
            (Some(_), Some(_)) => {
                reader.fault("ca_directory", "stands beside a single file", "keep one of the two");
                None
            }
            (file, None) => reader.read("ca", file, |t| path(t).map(Pem::File)),
            (None, directory) => reader.read("ca_directory", directory, |t| path(t).map(Pem::Directory)),
        };
        let certificate = reader.read("client_cert", layer.client_cert, path);
        let key = reader.read("client_key", layer.client_key, path);
        connection.client_certificate = match (certificate, key) {
            (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
            (Some(_), None) => {
                reader.fault("client_cert", "has no key", "name the key's file too");
                None
            }
            (None, Some(_)) => {
                reader.fault("client_key", "has no certificate", "name the certificate's file too");
                None
            }
            (None, None) => None,
        };

        let login = &mut parsed.settings.login;
        login.mount = reader.read("auth_mount", layer.auth_mount, text::mount);
        login.role = reader.read("role", layer.role, text::word);
        login.audience = reader.read("audience", layer.audience, text::word);

        let freshness = &mut parsed.settings.freshness;
        freshness.interval =
            reader.read("refresh_interval", layer.refresh_interval, |t| text::duration(t, INTERVAL));
        freshness.max_age = reader.read("max_age", layer.max_age, |t| text::duration(t, INTERVAL));
        freshness.open_deadline =
            reader.read("open_deadline", layer.open_deadline, |t| text::duration(t, OPEN_DEADLINE));
        freshness.stale_grace = reader.read("stale_grace", layer.stale_grace, text::grace);

        let ownership = &mut parsed.settings.ownership;
        ownership.uid = reader.read("uid", layer.uid, text::id);
        ownership.gid = reader.read("gid", layer.gid, text::id);
        ownership.mode = reader.read("mode", layer.mode, text::mode);

        let said = reader.read("auth_method", layer.auth_method, method);
        parsed.explicit = said.is_some();
        parsed.method = parsed.login_method(said, &reader);
        sink.finish(Some(parsed))
    }

    /// The method said, or the one that the credential implies; a source gives one credential at most.
    fn login_method(&self, said: Option<AuthMethod>, reader: &Values<'_>) -> Option<AuthMethod> {
        let given = [
            ("token_file", AuthMethod::Token, self.token_file.is_some()),
            ("role_id", AuthMethod::AppRole, self.role_id.is_some() || self.secret_id_file.is_some()),
            ("jwt_file", AuthMethod::Kubernetes, self.jwt_file.is_some()),
        ];
        let mut implied = given.iter().filter(|(.., given)| *given).map(|(name, method, _)| (*name, *method));
        let first = implied.next();
        for (name, _) in implied {
            reader.fault(name, "is a second way to log in", "keep one of token file, JWT file and role id");
        }
        match (said, first) {
            (Some(said), Some((name, implied))) if !same_credential(said, implied) => {
                reader.fault(
                    name,
                    "does not belong to the login method that is set",
                    "change one of the two",
                );
                None
            }
            (said, first) => said.or(first.map(|(_, method)| method)),
        }
    }

    fn fold(layers: Vec<Self>, sink: &Sink) -> Option<Config> {
        let chosen = layers.iter().find_map(|layer| layer.method);
        let Some(first) = chosen else {
            let remedy = "give --token-file, --jwt-file with --role, or --role-id with --secret-id-file";
            sink.add("login", broken("is not given", remedy));
            return None;
        };
        let fits = |method: Option<AuthMethod>| method.is_none_or(|method| same_credential(method, first));
        let explicit =
            layers.iter().find(|layer| layer.explicit && fits(layer.method)).and_then(|layer| layer.method);
        let method = explicit.unwrap_or(first);

        let (mut over, mut under, mut rest) = (Settings::default(), Settings::default(), Self::default());
        for (index, mut layer) in layers.into_iter().enumerate() {
            rest.take_limits(&layer);
            // What a wider source says of another way to log in does not mix with this one.
            if fits(layer.method) {
                rest.role_id = rest.role_id.or(layer.role_id);
                rest.token_file = rest.token_file.or(layer.token_file);
                rest.jwt_file = rest.jwt_file.or(layer.jwt_file);
                rest.secret_id_file = rest.secret_id_file.or(layer.secret_id_file);
            } else {
                layer.settings.login = settings::LoginSettings::default();
            }
            rest.allow_other = rest.allow_other.or(layer.allow_other);
            let side = if index < 2 { &mut over } else { &mut under };
            *side = std::mem::take(side).or(layer.settings);
        }
        over.login.method = Some(method);
        let limits = rest.limits();
        let credential = match method {
            AuthMethod::Token => rest.token_file.map(CredentialFile::Token),
            AuthMethod::Kubernetes | AuthMethod::Jwt => rest.jwt_file.map(CredentialFile::Jwt),
            AuthMethod::AppRole => {
                over.login.role = rest.role_id;
                if over.login.role.is_none() {
                    sink.add("login", broken("has no role id", "give --role-id"));
                }
                Some(CredentialFile::SecretId(rest.secret_id_file))
            }
        };
        if credential.is_none() {
            let remedy = if method == AuthMethod::Token { "give --token-file" } else { "give --jwt-file" };
            sink.add("login", broken("has no credential", remedy));
        }
        Some(Config {
            over,
            under,
            credential: credential?,
            allow_other: rest.allow_other.flatten(),
            limits,
            memory_limit: rest.memory_limit,
            fuse_threads: rest.fuse_threads.unwrap_or(FUSE_THREADS),
        })
    }
}

impl Parsed {
    /// Limits that are still open are those of a wider source.
    fn take_limits(&mut self, wider: &Self) {
        self.cache_size = self.cache_size.or(wider.cache_size);
        self.cache_entries = self.cache_entries.or(wider.cache_entries);
        self.in_flight = self.in_flight.or(wider.in_flight);
        self.memory_limit = self.memory_limit.or(wider.memory_limit);
        self.fuse_threads = self.fuse_threads.or(wider.fuse_threads);
    }

    /// The cache's bounds, with defaults.
    fn limits(&self) -> Limits {
        let defaults = Limits::default();
        Limits {
            bytes: self.cache_size.unwrap_or(defaults.bytes),
            entries: self.cache_entries.unwrap_or(defaults.entries),
            in_flight: self.in_flight.unwrap_or(defaults.in_flight),
        }
    }
}

/// Reads one source's values; faults are spelt as that source spells the setting.
struct Values<'a> {
    source: Source,
    sink: &'a Sink,
}

impl Values<'_> {
    fn read<T>(
        &self,
        name: &str,
        text: Option<String>,
        parse: impl Fn(&str) -> Result<T, Broken>,
    ) -> Option<T> {
        self.sink.take(&self.source.spell(name), parse(&text?))
    }

    /// A relative path in a file would mean something else in each working directory.
    fn path(&self) -> fn(&str) -> Result<PathBuf, Broken> {
        if self.source == Source::File { text::absolute } else { text::any_path }
    }

    fn fault(&self, name: &str, rule: &'static str, remedy: &'static str) {
        self.sink.add(self.source.spell(name), broken(rule, remedy));
    }
}

/// Kubernetes and JWT logins present the same kind of credential.
fn same_credential(a: AuthMethod, b: AuthMethod) -> bool {
    let presents_jwt = |method| matches!(method, AuthMethod::Kubernetes | AuthMethod::Jwt);
    a == b || presents_jwt(a) && presents_jwt(b)
}

fn addresses(text: &str) -> Result<Vec<crate::reference::Address>, Broken> {
    text.split(',').map(|address| text::address(address.trim())).collect()
}

fn method(text: &str) -> Result<AuthMethod, Broken> {
    match text {
        "kubernetes" => Ok(AuthMethod::Kubernetes),
        "jwt" => Ok(AuthMethod::Jwt),
        "approle" => Ok(AuthMethod::AppRole),
        "token" => Ok(AuthMethod::Token),
        _ => Err(broken("is unknown", "choose one of kubernetes, jwt, approle, token")),
    }
}

fn when(text: &str) -> Result<Option<bool>, Broken> {
    if text == "auto" {
        return Ok(None);
    }
    text::switch(text)
        .map(Some)
        .map_err(|_| broken("is none of auto, true, false", "write auto, true or false"))
}

/// A proxy is set where others can read it, so it carries no password.
fn proxy(text: &str) -> Result<url::Url, Broken> {
    const REMEDY: &str = "write it like http://proxy.example:3128, without user and password";
    let Ok(url) = url::Url::parse(text) else { return Err(broken("is not a URL", REMEDY)) };
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err(broken("is not an http or https URL with a host", REMEDY));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(broken("carries a user or password", REMEDY));
    }
    Ok(url)
}

#[cfg(test)]
mod tests;
