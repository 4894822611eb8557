//! What an agent is told: the settings that yield to classes, and those of the node it serves.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::cache::Limits;
use crate::config::fault::{Broken, Sink, broken};
use crate::config::layer::{Command, Layer};
use crate::config::settings::Settings;
use crate::config::{FUSE_THREADS, Faults, Parsed, Values, text};
use crate::policy::{Allowance, Policy};
use crate::reference::AuthMethod;
use crate::store::Reach;

/// Where the shim listens.
pub const NODE_SOCKET: &str = "/run/fuse-secrets/node/shim.sock";
/// Every address of the node; the number is nobody's at IANA.
const HEALTH_ADDRESS: &str = "[::]:9810";
/// A first answer takes milliseconds; kubelet gives up after two minutes and asks again.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(20);
/// Shorter would refuse at each hiccup of a store; longer, and the shim gives up first.
const PUBLISH_DEADLINES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(90);

/// What is done with volume attributes that nobody knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownAttributes {
    /// The volume is refused.
    #[default]
    Reject,
    /// They have no effect, and the pod's owner is told.
    Ignore,
}

/// All of an agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentConfig {
    /// What holds where a class says nothing.
    pub under: Settings,
    /// Bounds of the cache.
    pub limits: Limits,
    /// Bytes of secret pages; `None`: what `RLIMIT_MEMLOCK` gives.
    pub memory_limit: Option<usize>,
    /// Threads that answer the kernel, per volume. Default 1.
    pub fuse_threads: usize,
    /// Where the shim listens. Default [`NODE_SOCKET`].
    pub node_socket: PathBuf,
    /// Directory of classes; `None`: those of the API server.
    pub classes: Option<PathBuf>,
    /// Where health and metrics are told; `None`: nowhere. Default `[::]:9810`.
    pub health_address: Option<SocketAddr>,
    /// How long a volume's first answers may take, all together. 1 s to 5 min, default 20 s.
    pub publish_deadline: Duration,
    /// Default: [`UnknownAttributes::Reject`].
    pub unknown_attributes: UnknownAttributes,
    /// Which of what a class says of store and login counts. Default: what repeats `under`, and nothing else.
    pub policy: Policy,
    /// Whom and which files the store's client may reach. Default: no local address, every file of `under`.
    pub reach: Reach,
    /// Whether it serves as root too. Default false.
    pub allow_root: bool,
}

impl AgentConfig {
    /// Reads and folds the three sources: flags, all environment variables, and the configuration file's text.
    ///
    /// # Errors
    /// Every fault of all of them.
    pub fn read(
        flags: Layer,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
        file: Option<&str>,
    ) -> Result<Self, Faults> {
        super::read(flags, variables, file, Self::resolve)
    }

    /// Folds the three sources.
    ///
    /// # Errors
    /// Every value that breaks its rule, in every source, and what nobody said.
    pub fn resolve(flags: Layer, environment: Layer, file: Layer) -> Result<Self, Faults> {
        let parsed = Parsed::read_all(Command::Agent, flags, environment, file)?;
        let sink = Sink::new("configuration");
        let (mut under, mut rest, mut method) = (Settings::default(), Parsed::default(), None);
        for layer in parsed {
            under = under.or(layer.settings.clone());
            method = method.or(layer.method);
            rest.take_limits(&layer);
            rest.agent = rest.agent.or(layer.agent);
        }
        if matches!(method, Some(AuthMethod::AppRole | AuthMethod::Token)) {
            sink.add("login", broken("is none of a service account", "choose kubernetes or jwt"));
        }
        under.login.method = method;
        let said = rest.agent.clone();
        let config = Self {
            under,
            limits: rest.limits(),
            memory_limit: rest.memory_limit,
            fuse_threads: rest.fuse_threads.unwrap_or(FUSE_THREADS),
            node_socket: said.node_socket.unwrap_or_else(|| NODE_SOCKET.into()),
            classes: said.classes,
            health_address: said.health_address.unwrap_or_else(|| HEALTH_ADDRESS.parse().ok()),
            publish_deadline: said.publish_deadline.unwrap_or(PUBLISH_DEADLINE),
            unknown_attributes: said.unknown_attributes.unwrap_or_default(),
            policy: Policy { allow: said.allow.unwrap_or_default(), files: said.class_files.clone() },
            reach: Reach {
                local_addresses: said.allow_local_addresses.unwrap_or(false),
                beneath: said.class_files,
            },
            allow_root: said.allow_root.unwrap_or(false),
        };
        sink.finish(Some(config))
    }
}

/// What one source says of the node.
#[derive(Clone, Default)]
pub(super) struct Said {
    node_socket: Option<PathBuf>,
    classes: Option<PathBuf>,
    /// `Some(None)`: nowhere.
    health_address: Option<Option<SocketAddr>>,
    publish_deadline: Option<Duration>,
    unknown_attributes: Option<UnknownAttributes>,
    allow: Option<Vec<Allowance>>,
    class_files: Option<PathBuf>,
    allow_local_addresses: Option<bool>,
    allow_root: Option<bool>,
}

impl Said {
    pub(super) fn read(reader: &Values<'_>, layer: &mut Layer) -> Self {
        Self {
            node_socket: reader.read("node_socket", layer.node_socket.take(), text::absolute),
            classes: reader.read("classes", layer.classes.take(), reader.path()),
            health_address: reader.read("health_address", layer.health_address.take(), health_address),
            publish_deadline: reader.read("publish_deadline", layer.publish_deadline.take(), |t| {
                text::duration(t, PUBLISH_DEADLINES)
            }),
            unknown_attributes: reader.read(
                "unknown_attributes",
                layer.unknown_attributes.take(),
                unknown_attributes,
            ),
            allow: layer
                .allow
                .take()
                .and_then(|text| Allowance::read(&text, &reader.source.spell("allow"), reader.sink)),
            class_files: reader.read("class_files", layer.class_files.take(), text::absolute),
            allow_local_addresses: reader.read(
                "allow_local_addresses",
                layer.allow_local_addresses.take(),
                text::switch,
            ),
            allow_root: reader.read("allow_root", layer.allow_root.take(), text::switch),
        }
    }

    fn or(self, wider: Self) -> Self {
        Self {
            node_socket: self.node_socket.or(wider.node_socket),
            classes: self.classes.or(wider.classes),
            health_address: self.health_address.or(wider.health_address),
            publish_deadline: self.publish_deadline.or(wider.publish_deadline),
            unknown_attributes: self.unknown_attributes.or(wider.unknown_attributes),
            allow: self.allow.or(wider.allow),
            class_files: self.class_files.or(wider.class_files),
            allow_local_addresses: self.allow_local_addresses.or(wider.allow_local_addresses),
            allow_root: self.allow_root.or(wider.allow_root),
        }
    }
}

fn health_address(text: &str) -> Result<Option<SocketAddr>, Broken> {
    if text == "none" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        broken("is not an address with a port", "write it like [::]:9810 or 127.0.0.1:9810, or write none")
    })
}

fn unknown_attributes(text: &str) -> Result<UnknownAttributes, Broken> {
    match text {
        "reject" => Ok(UnknownAttributes::Reject),
        "ignore" => Ok(UnknownAttributes::Ignore),
        _ => Err(broken("is neither reject nor ignore", "write reject or ignore")),
    }
}
