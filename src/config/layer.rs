//! One source's settings as text. This list is the only place that names a setting: its flag is `--max-age`, its variable
//! `FUSE_SECRETS_MAX_AGE`, its key in the file `maxAge`. Some belong to one command alone.

use std::ffi::OsString;

use serde_json::Value;

use crate::config::fault::{Faults, Sink, broken};
use crate::config::{text, yaml};

/// Begins every variable.
const PREFIX: &str = "FUSE_SECRETS_";
/// Variables of the command line itself, not settings of a mount.
const COMMAND_LINE: [&str; 3] = ["CONFIG", "LOG", "LOG_FORMAT"];

macro_rules! layer {
    (
        shared { $($(#[doc = $sd:literal])+ #[arg($($sa:tt)+)] $shared:ident,)+ }
        mount { $($(#[doc = $md:literal])+ #[arg($($ma:tt)+)] $mount:ident,)+ }
        agent { $($(#[doc = $ad:literal])+ #[arg($($aa:tt)+)] $agent:ident,)+ }
    ) => {
        /// What one source says, as text: flags, environment or file. `None`: nothing.
        #[derive(Clone, Default, PartialEq, Eq)]
        pub struct Layer {
            $($(#[doc = $sd])+ pub $shared: Option<String>,)+
            $($(#[doc = $md])+ pub $mount: Option<String>,)+
            $($(#[doc = $ad])+ pub $agent: Option<String>,)+
        }

        /// The settings of `mount` as flags.
        #[derive(Clone, Default, clap::Args)]
        pub struct MountFlags {
            $($(#[doc = $sd])+ #[arg($($sa)+)] pub $shared: Option<String>,)+
            $($(#[doc = $md])+ #[arg($($ma)+)] pub $mount: Option<String>,)+
        }

        /// The settings of `agent` as flags.
        #[derive(Clone, Default, clap::Args)]
        pub struct AgentFlags {
            $($(#[doc = $sd])+ #[arg($($sa)+)] pub $shared: Option<String>,)+
            $($(#[doc = $ad])+ #[arg($($aa)+)] pub $agent: Option<String>,)+
        }

        impl From<MountFlags> for Layer {
            fn from(flags: MountFlags) -> Self {
                Self { $($shared: flags.$shared,)+ $($mount: flags.$mount,)+ ..Self::default() }
            }
        }

        impl From<AgentFlags> for Layer {
            fn from(flags: AgentFlags) -> Self {
                Self { $($shared: flags.$shared,)+ $($agent: flags.$agent,)+ ..Self::default() }
            }
        }

        impl Layer {
            /// The settings in `snake_case`, in the order of the documentation.
            pub const NAMES: &'static [&'static str] =
                &[$(stringify!($shared),)+ $(stringify!($mount),)+ $(stringify!($agent),)+];

            /// What is said here and is no setting of this command.
            pub(super) fn foreign(&self, command: Command) -> Vec<&'static str> {
                let others: &[(&str, &Option<String>)] = match command {
                    Command::Mount => &[$((stringify!($agent), &self.$agent)),+],
                    Command::Agent => &[$((stringify!($mount), &self.$mount)),+],
                };
                others.iter().filter(|(_, said)| said.is_some()).map(|(name, _)| *name).collect()
            }

            fn field(&mut self, name: &str) -> Option<&mut Option<String>> {
                match name {
                    $(stringify!($shared) => Some(&mut self.$shared),)+
                    $(stringify!($mount) => Some(&mut self.$mount),)+
                    $(stringify!($agent) => Some(&mut self.$agent),)+
                    _ => None,
                }
            }
        }
    };
}

layer! {
    shared {
        /// The store's address, or several of one cluster separated by commas
        ///
        /// Set it for every mount whose class names none.
        #[arg(long, value_name = "URL", help_heading = "Store")]
        address,
        /// The store's namespace (Vault Enterprise, OpenBao, Stronghold)
        #[arg(long, value_name = "NAME", help_heading = "Store")]
        namespace,
        /// PEM file with the CA of the store's certificate; default: the system's roots
        ///
        /// Set it for a store with a private CA.
        #[arg(long, value_name = "FILE", help_heading = "Store")]
        ca,
        /// Directory of such files, instead of --ca
        #[arg(long, value_name = "DIR", help_heading = "Store")]
        ca_directory,
        /// Name expected in the store's certificate; default: the address's host
        ///
        /// Set it when the address is an IP address or an alias.
        #[arg(long, value_name = "NAME", help_heading = "Store")]
        server_name,
        /// PEM file with the certificate to show to the store; needs --client-key
        #[arg(long, value_name = "FILE", help_heading = "Store")]
        client_cert,
        /// PEM file with that certificate's key
        #[arg(long, value_name = "FILE", help_heading = "Store")]
        client_key,
        /// Accept any certificate (true, false; default false)
        ///
        /// Only for a store that is thrown away: whoever is on the way can read all secrets.
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Store")]
        skip_verify,
        /// HTTP proxy for all requests; proxy variables of the environment are not read
        #[arg(long, value_name = "URL", help_heading = "Store")]
        proxy,
        /// How to log in: kubernetes, jwt, approle or token; default: what the given credential says
        ///
        /// Needed only for jwt, which has the same credential as kubernetes.
        #[arg(long, value_name = "METHOD", help_heading = "Login")]
        auth_method,
        /// Where that method is mounted, without auth/; default: the method's name
        #[arg(long, value_name = "PATH", help_heading = "Login")]
        auth_mount,
        /// The role to log in to (kubernetes, jwt); default: the class's
        #[arg(long, value_name = "ROLE", help_heading = "Login")]
        role,
        /// Audience that the presented JWT must carry
        #[arg(long, value_name = "AUDIENCE", help_heading = "Login")]
        audience,
        /// How often each secret is read again (1s to 1d, default 60s)
        ///
        /// Shorten it when rotations must show sooner, lengthen it to spare the store.
        #[arg(long, value_name = "DURATION", help_heading = "Freshness")]
        refresh_interval,
        /// Opening an older value waits for a refresh (refresh interval to 1d; default: the refresh interval)
        #[arg(long, value_name = "DURATION", help_heading = "Freshness")]
        max_age,
        /// For at most this long, then the last known value is served (0s to 5s, default 2s)
        #[arg(long, value_name = "DURATION", help_heading = "Freshness")]
        open_deadline,
        /// How long values are served that cannot be refreshed (0s to 365d or unlimited; default unlimited)
        ///
        /// Limit it where an outdated secret is worse than none.
        #[arg(long, value_name = "DURATION", help_heading = "Freshness")]
        stale_grace,
        /// Numeric owner of the files (default: root, or the user who mounts)
        ///
        /// Set it for programs that insist, such as ssh.
        #[arg(long, value_name = "UID", help_heading = "Files")]
        uid,
        /// Numeric group of the files
        #[arg(long, value_name = "GID", help_heading = "Files")]
        gid,
        /// Permission bits in octal, without execute bits (0000 to 0666, default 0444)
        #[arg(long, value_name = "OCTAL", help_heading = "Files")]
        mode,
        /// Bytes of all cached answers (64KiB to 16GiB, default 64MiB)
        #[arg(long, value_name = "SIZE", help_heading = "Limits")]
        cache_size,
        /// Number of cached answers (1 to 1000000, default 10000)
        #[arg(long, value_name = "COUNT", help_heading = "Limits")]
        cache_entries,
        /// Requests in flight to stores (1 to 1024, default 32)
        #[arg(long, value_name = "COUNT", help_heading = "Limits")]
        in_flight,
        /// Bytes of secret pages (64KiB to 64GiB; default: what RLIMIT_MEMLOCK gives)
        #[arg(long, value_name = "SIZE", help_heading = "Limits")]
        memory_limit,
        /// Threads that answer the kernel (1 to 64; default: 1)
        #[arg(long, value_name = "COUNT", help_heading = "Limits")]
        fuse_threads,
    }
    mount {
        /// File with the JWT to log in with (kubernetes, jwt); read at each login
        #[arg(long, value_name = "FILE", help_heading = "Login")]
        jwt_file,
        /// The role id (approle)
        #[arg(long, value_name = "ID", help_heading = "Login")]
        role_id,
        /// File with the secret id (approle); without it the role must not ask for one
        #[arg(long, value_name = "FILE", help_heading = "Login")]
        secret_id_file,
        /// File with a store token; read at each login, so a rewritten file is picked up
        #[arg(long, value_name = "FILE", help_heading = "Login")]
        token_file,
        /// Whether other users see the mount (auto, true, false; default auto: where root or fuse.conf permits)
        #[arg(long, value_name = "WHEN", help_heading = "Files")]
        allow_other,
    }
    agent {
        /// The shim's node socket (default /run/fuse-secrets/node/shim.sock)
        #[arg(long, value_name = "PATH", help_heading = "Node")]
        node_socket,
        /// Directory of classes, DIR/NAMESPACE/*.yaml, instead of those of the API server
        #[arg(long, value_name = "DIR", help_heading = "Node")]
        classes,
        /// Where /healthz, /readyz and /metrics are answered, or none (default: port 9810 of every address)
        #[arg(long, value_name = "ADDRESS", help_heading = "Node")]
        health_address,
        /// How long a volume's first answers may take, all together (1s to 90s, default 20s)
        #[arg(long, value_name = "DURATION", help_heading = "Node")]
        publish_deadline,
        /// What to do with volume attributes that nobody knows: reject or ignore (default reject)
        ///
        /// Ignored ones have no effect; the pod's events name them.
        #[arg(long, value_name = "WHAT", help_heading = "Node")]
        unknown_attributes,
        /// What classes may say of store and login, as a YAML list of entries by namespace (default: nothing)
        ///
        /// Better said in the configuration file; what the agent's own settings name is always allowed.
        #[arg(long, value_name = "LIST", help_heading = "Node")]
        allow,
        /// Directory of the certificate files that classes may name, as far as --allow permits (default: none)
        #[arg(long, value_name = "DIR", help_heading = "Node")]
        class_files,
        /// Ask stores at loopback, link-local and metadata addresses too (true, false; default false)
        ///
        /// Set it where the store runs beside the agent.
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Node")]
        allow_local_addresses,
        /// Serve although this is root (true, false; default false)
        ///
        /// The agent needs none of root's rights and drops every capability; as root it could still open root's files.
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Node")]
        allow_root,
    }
}

/// Whose settings are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// `fuse-secrets mount`.
    Mount,
    /// `fuse-secrets agent`.
    Agent,
}

/// Where a layer comes from: how its faults spell a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Flags,
    Environment,
    File,
}

impl Source {
    pub(crate) fn document(self) -> &'static str {
        match self {
            Self::Flags => "command line",
            Self::Environment => "environment",
            Self::File => "configuration file",
        }
    }

    /// `max_age` as this source spells it.
    pub(crate) fn spell(self, name: &str) -> String {
        match self {
            Self::Flags => format!("--{}", name.replace('_', "-")),
            Self::Environment => format!("{PREFIX}{}", name.to_ascii_uppercase()),
            Self::File => camel(name),
        }
    }
}

impl Layer {
    /// Reads the variables that begin with `FUSE_SECRETS_`; `std::env::vars_os()` is the caller's.
    ///
    /// # Errors
    /// Every unknown or undecodable variable.
    pub fn from_environment(
        variables: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, Faults> {
        let sink = Sink::new(Source::Environment.document());
        let layer = Self::read_environment(variables, &sink);
        sink.finish(Some(layer))
    }

    /// The same; what is wrong is left out.
    pub(super) fn read_environment(
        variables: impl IntoIterator<Item = (OsString, OsString)>,
        sink: &Sink,
    ) -> Self {
        let mut layer = Self::default();
        for (variable, value) in variables {
            let variable = variable.to_string_lossy().into_owned();
            let Some(name) = variable.strip_prefix(PREFIX) else { continue };
            if COMMAND_LINE.contains(&name) || name.starts_with("TEST_") || is_service_link(name) {
                continue;
            }
            match (layer.field(&name.to_ascii_lowercase()), value.into_string()) {
                (Some(field), Ok(value)) if name == name.to_ascii_uppercase() => *field = Some(value),
                (Some(_), Err(_)) => sink.add(variable, broken("is not UTF-8", "write it as UTF-8 text")),
                _ => {
                    let known: Vec<_> =
                        Self::NAMES.iter().map(|name| Source::Environment.spell(name)).collect();
                    sink.add(&variable, text::unknown(&variable, known.iter().map(String::as_str)));
                }
            }
        }
        layer
    }

    /// Reads a configuration file's text: one YAML mapping of settings.
    ///
    /// # Errors
    /// Every unknown key and every value that is neither text, number nor switch (`address` may be a list).
    pub fn from_yaml(text: &str) -> Result<Self, Faults> {
        let sink = Sink::new(Source::File.document());
        let layer = Self::read_yaml(text, &sink);
        sink.finish(Some(layer))
    }

    /// The same; what is wrong is left out.
    pub(super) fn read_yaml(text: &str, sink: &Sink) -> Self {
        let mut layer = Self::default();
        let Some(mut documents) = sink.take("", yaml::documents(text)) else { return layer };
        let map = match (documents.pop(), documents.is_empty()) {
            (None, _) => return layer,
            (Some(Value::Object(map)), true) => map,
            _ => {
                sink.add(
                    "",
                    broken("is not one mapping of settings", "write one document of lines like maxAge: 5m"),
                );
                return layer;
            }
        };
        for (key, value) in map {
            let known: Vec<_> = Self::NAMES.iter().map(|name| camel(name)).collect();
            let name = Self::NAMES.iter().find(|name| camel(name) == key);
            let Some(field) = name.and_then(|name| layer.field(name)) else {
                sink.add(&key, text::unknown(&key, known.iter().map(String::as_str)));
                continue;
            };
            *field = match value {
                Value::Null => None,
                Value::String(text) => Some(text),
                Value::Number(number) => Some(number.to_string()),
                Value::Bool(switch) => Some(switch.to_string()),
                Value::Array(items) if key == "address" && items.iter().all(Value::is_string) => {
                    Some(items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","))
                }
                // JSON is YAML: the list is read where flags and variables are.
                Value::Array(_) if key == "allow" => Some(value.to_string()),
                Value::Array(_) | Value::Object(_) => {
                    sink.add(
                        &key,
                        broken("is not a single value", "write one text, number or true or false"),
                    );
                    None
                }
            };
        }
        layer
    }
}

/// Kubernetes puts `FUSE_SECRETS_SERVICE_HOST` and `FUSE_SECRETS_METRICS_PORT_9090_TCP` into every pod beside a Service named
/// `fuse-secrets` or `fuse-secrets-metrics`.
fn is_service_link(name: &str) -> bool {
    name.ends_with("SERVICE_HOST") || name.split('_').any(|part| part == "PORT")
}

fn camel(name: &str) -> String {
    let mut parts = name.split('_');
    let mut camel = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (first, rest) = part.split_at(1);
        camel.push_str(&first.to_ascii_uppercase());
        camel.push_str(rest);
    }
    camel
}
