//! `fuse-secrets mount`: one class of a real store, without Kubernetes: on a laptop, a VM, in a systemd unit.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use super::exit;
use super::panics::Panicked;
use super::serving::{End, Signals, allow_other, prepare, until_the_end};
use crate::agent::{Agent, Setup, admin};
use crate::class::{self, Class};
use crate::config::{Config, Faults, MountFlags};
use crate::metrics::Metrics;
use crate::reference::VolumeSpec;
use crate::store::vault::Vault;

/// How long a store may take for the first answer to everything.
const FIRST: Duration = Duration::from_secs(30);

/// Arguments of `mount`.
#[derive(Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Options {
    /// The directory to mount on; it must exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// File with the class: a SecretProviderClass or SecretsStoreImport document
    #[arg(long, value_name = "FILE")]
    class: PathBuf,
    /// Which class, if the file holds several: its name, or namespace/name
    #[arg(long, value_name = "NAME")]
    class_name: Option<String>,
    /// YAML file with the settings below, spelt like maxAge: 5m
    #[arg(long, env = "FUSE_SECRETS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Stay in the foreground; this is what it always does
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    settings: MountFlags,
}

const EXAMPLES: &str = "\
A flag wins over its environment variable (--max-age: FUSE_SECRETS_MAX_AGE), both win over the class, the class wins \
over the configuration file. Durations have a unit: 30s, 5m. Secrets come by file, never by flag or variable.

Examples:
  With a token:
      fuse-secrets mount --class app.yaml --address https://vault:8200 \\
          --token-file ~/.vault-token /mnt/app
  With a JWT, against a private CA:
      fuse-secrets mount --class app.yaml --address https://vault:8200 \\
          --ca ca.pem --auth-method jwt --role app --jwt-file app.jwt /mnt/app
  With AppRole:
      fuse-secrets mount --class app.yaml --address https://vault:8200 \\
          --role-id 6f1e... --secret-id-file /run/secret-id /mnt/app

Ctrl-C, SIGTERM, or `umount DIR` from elsewhere ends it. Under systemd it tells when it is ready (Type=notify).";

/// What stops a mount before it asks the store anything.
#[derive(Debug, thiserror::Error)]
enum BeforeError {
    #[error("cannot read {path}: {error}")]
    Read {
        path: PathBuf,
        #[source]
        error: std::io::Error,
    },
    #[error(transparent)]
    Settings(Faults),
    #[error("{path}: {faults}")]
    Class { path: PathBuf, faults: Faults },
    #[error("{path} holds several such classes; say which with --class-name, one of {names}")]
    Which { path: PathBuf, names: String },
    #[error("{path} holds no class of that name; give --class-name one of {names}")]
    NoSuch { path: PathBuf, names: String },
}

impl BeforeError {
    fn code(&self) -> u8 {
        match self {
            Self::Read { .. } => exit::NO_INPUT,
            Self::Settings(_) | Self::Which { .. } | Self::NoSuch { .. } => exit::USAGE,
            Self::Class { .. } => exit::DATA,
        }
    }
}

/// Runs the command.
pub async fn run(options: Options, mut panicked: Panicked) -> ExitCode {
    let (config, spec) = match before(&options) {
        Ok(ready) => ready,
        Err(errors) => {
            let codes: Vec<_> = errors.iter().map(|error| exit::report(error.code(), error)).collect();
            return codes.first().copied().unwrap_or(ExitCode::FAILURE);
        }
    };
    let directory = match prepare(&options.directory) {
        Ok(directory) => directory,
        Err(error) => return exit::report(exit::CANNOT_MOUNT, &error),
    };
    let mut signals = match Signals::hear() {
        Ok(signals) => signals,
        Err(error) => return exit::report(exit::FAILED, &error),
    };
    let metrics = Arc::new(Metrics::default());
    let setup = Setup { limits: config.limits, memory: config.memory_limit, threads: config.fuse_threads };
    let agent = match Agent::start(Arc::new(Vault::new(Arc::clone(&metrics))), metrics, setup) {
        Ok(agent) => agent,
        Err(error) => return exit::report(exit::start(&error), &error),
    };
    let socket = match admin::listen(&agent) {
        Ok(socket) => socket,
        Err(error) => return exit::report(exit::FAILED, &error),
    };
    let credential = Arc::new(config.credential());
    let publishing = agent.publish(&directory, spec, None, credential, Instant::now() + FIRST);
    // Waiting for a store may be given up, mounting may not.
    let published = tokio::select! {
        result = publishing => Some(result),
        () = signals.came() => None,
    };
    let served = match published {
        Some(Ok(volume)) => Some(agent.serve(&directory, volume, allow_other(config.allow_other)).await),
        Some(Err(error)) => Some(Err(error)),
        None => None,
    };
    let code = match served {
        Some(Ok(served)) => {
            notify(&[sd_notify::NotifyState::Ready]);
            match until_the_end(&served, &mut signals, &mut panicked).await {
                End::Panic => ExitCode::from(exit::SOFTWARE),
                End::Failed => ExitCode::from(exit::FAILED),
                End::Signal | End::Unmounted => ExitCode::from(exit::OK),
            }
        }
        Some(Err(error)) => exit::report(exit::serve(&error), &error),
        None => ExitCode::from(exit::OK),
    };
    notify(&[sd_notify::NotifyState::Stopping]);
    agent.shutdown().await;
    drop(socket);
    code
}

/// Reads settings and class; asks nobody. What is wrong is told of all of them at once.
fn before(options: &Options) -> Result<(Config, VolumeSpec), Vec<BeforeError>> {
    let file = options.config.as_deref().map(read).transpose();
    let config = file.and_then(|file| {
        let flags = options.settings.clone();
        Config::read(flags.into(), std::env::vars_os(), file.as_deref()).map_err(BeforeError::Settings)
    });
    let class = read(&options.class).and_then(|text| {
        let wrong = |faults| BeforeError::Class { path: options.class.clone(), faults };
        choose(class::parse(&text).map_err(wrong)?, options)
    });
    let (config, class) = match (config, class) {
        (Ok(config), Ok(class)) => (config, class),
        (config, class) => return Err(config.err().into_iter().chain(class.err()).collect()),
    };
    for warning in &class.warnings {
        tracing::warn!(class = %class, field = %warning.field, "{}", warning.text);
    }
    let spec = class.into_spec(&config.over, &config.under, config.subject());
    Ok((config, spec.map_err(|faults| vec![BeforeError::Settings(faults)])?))
}

fn choose(mut classes: Vec<Class>, options: &Options) -> Result<Class, BeforeError> {
    let path = options.class.clone();
    let list = |classes: &[Class]| classes.iter().map(Class::full_name).collect::<Vec<_>>().join(", ");
    let mut names = list(&classes);
    if let Some(wanted) = &options.class_name {
        classes.retain(|class| class.name == *wanted || class.full_name() == *wanted);
        if classes.is_empty() {
            return Err(BeforeError::NoSuch { path, names });
        }
        // A namespace that is left out stands for none, where there is one such.
        if classes.iter().any(|class| class.full_name() == *wanted) {
            classes.retain(|class| class.full_name() == *wanted);
        }
        names = list(&classes);
    }
    match classes.pop() {
        Some(class) if classes.is_empty() => Ok(class),
        _ => Err(BeforeError::Which { path, names }),
    }
}

fn read(path: &Path) -> Result<String, BeforeError> {
    std::fs::read_to_string(path).map_err(|error| BeforeError::Read { path: path.to_owned(), error })
}

/// Tells systemd, if it asked to be told (sd_notify(3)).
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
