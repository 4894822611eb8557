//! Logging: what happens, as text or JSON lines on standard error.

use std::io::IsTerminal as _;

use clap::{Args, ValueEnum};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

use crate::secret::harden::{Measure, Outcome};

/// Libraries that would log what goes over the wire, headers and bodies with tokens and secrets. Whatever filter is asked for,
/// they are heard from warnings up only. So is fuser, which would tell of the made-up INIT of [`crate::fuse::session`] as if it were
/// the kernel's.
const WIRE: [&str; 10] = [
    "h2",
    "hyper",
    "hyper_util",
    "hyper_rustls",
    "reqwest",
    "rustls",
    "tower",
    "tower_http",
    "axum",
    "fuser",
];

/// The client of the API server, which logs whole answers that it cannot read, and each attempt. What fails there is told by
/// [`crate::kubernetes`].
const MUTE: &str = "kube_client";

/// Where fuser tells, as an error, that a session was drained. How one ends is told by [`crate::fuse::session`].
const REQUESTS: &str = "fuser::request";

/// How to log.
#[derive(Args)]
pub struct Options {
    /// What to log: error, warn, info, debug, trace, or a filter such as info,fuse_secrets::cache=debug
    #[arg(
        long,
        global = true,
        env = "FUSE_SECRETS_LOG",
        value_name = "FILTER",
        default_value = "info",
        help_heading = "Logging"
    )]
    pub log: String,
    /// How to write the log
    #[arg(
        long,
        global = true,
        env = "FUSE_SECRETS_LOG_FORMAT",
        value_name = "FORMAT",
        value_enum,
        default_value_t,
        help_heading = "Logging"
    )]
    pub log_format: Format,
}

/// How to write the log.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Format {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

/// A filter that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "--log or FUSE_SECRETS_LOG: not a level or filter; write info, debug, or info,fuse_secrets::store=debug"
)]
pub struct FilterError;

/// Starts logging.
///
/// # Errors
/// [`FilterError`]
pub fn start(options: &Options) -> Result<(), FilterError> {
    let filter = filter(&options.log)?;
    let quiet = filter_fn(|event| {
        let root = event.target().split("::").next().unwrap_or_default();
        (*event.level() <= Level::WARN || !WIRE.contains(&root)) && root != MUTE && event.target() != REQUESTS
    });
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match options.log_format {
        Format::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter).with_filter(quiet)).init();
    Ok(())
}

/// A word that is no level would be taken for a target, of which there is none: `inof` would log nothing, for ever.
fn filter(text: &str) -> Result<EnvFilter, FilterError> {
    let meant = |part: &str| {
        let target = part.split(['=', '[']).next().unwrap_or_default();
        part.parse::<LevelFilter>().is_ok() || part != target || target.starts_with("fuse_secrets")
    };
    // Set but empty is as good as not set.
    let text = if text.trim().is_empty() { "info" } else { text };
    if text.split(',').all(meant) {
        EnvFilter::try_new(text).map_err(|_| FilterError)
    } else {
        Err(FilterError)
    }
}

/// Tells how a hardening measure went.
pub fn measure(measure: &Measure) {
    match &measure.outcome {
        Outcome::Done => tracing::debug!(measure = measure.name, "in force"),
        Outcome::Lost { loss, source } => tracing::warn!(measure = measure.name, %source, "{loss}"),
    }
}
