//! The connection to the API server: found as every client finds it, with a deadline for whatever is asked, and errors in words that
//! fit a pod's event.

use std::time::Duration;

use futures_util::Stream;
use kube::api::{GetParams, ListParams, PostParams, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{Request, WatchEvent};
use kube::{Client, Config, Error};
use serde::de::DeserializeOwned;

/// For a connection, with TLS.
const CONNECT: Duration = Duration::from_secs(5);
/// For one answer; a page of classes is the longest.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest text of an error.
const LONGEST: usize = 300;

/// A connection to the API server. A clone shares it.
#[derive(Clone)]
pub struct Api {
    client: Client,
    address: String,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Neither of the two ways to find it.
    #[error(
        "no API server is known: {0}; give --classes with a directory of classes, start the agent in a pod with its service \
         account's token mounted, or set KUBECONFIG"
    )]
    Nowhere(String),
    /// It was found, and cannot be used.
    #[error("cannot use {place}: {error}; correct it, or give --classes with a directory of classes")]
    Unusable {
        /// What says where it is.
        place: &'static str,
        /// Why.
        error: String,
    },
}

/// Why the API server did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct ApiError {
    /// The HTTP status, if it answered.
    pub status: Option<u16>,
    /// What came back: its own words, or those of the connection.
    pub text: String,
}

impl Api {
    /// Where the API server is and who we are there: by the variable `KUBECONFIG`, else as a pod. Reads files, asks nobody.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub async fn find() -> Result<Config, ConnectError> {
        let place = "the file that KUBECONFIG names";
        let unusable = |error: String| ConnectError::Unusable { place, error: brief(error) };
        if std::env::var_os("KUBECONFIG").is_none_or(|paths| paths.is_empty()) {
            return Config::incluster().map_err(|error| ConnectError::Nowhere(brief(error.to_string())));
        }
        let file = Kubeconfig::from_env().map_err(|error| unusable(error.to_string()))?;
        let Some(file) = file else { return Err(unusable("it is not there".to_owned())) };
        let read = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        read.map_err(|error| unusable(error.to_string()))
    }

    /// Makes ready to connect, which the first request does; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`ConnectError::Unusable`]: a certificate or key that is none.
    pub fn connect(mut config: Config) -> Result<Self, ConnectError> {
        config.connect_timeout = Some(CONNECT);
        config.write_timeout = Some(ANSWER);
        // Reads have deadlines of their own here, by what is read. What fails is asked again by whoever knows how urgent it is.
        config.read_timeout = None;
        config.default_retry = false;
        let address = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let unusable = |error: Error| ConnectError::Unusable {
            place: "the configuration of the API server",
            error: brief(innermost(&error)),
        };
        Ok(Self { client: Client::try_from(config).map_err(unusable)?, address })
    }

    /// Its address, for people.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// One document.
    ///
    /// # Errors
    /// [`ApiError`]; no answer within 15 s is one, here and below.
    pub(super) async fn get(&self, directory: &str, name: &str) -> Result<String, ApiError> {
        let request = Request::new(directory).get(name, &GetParams::default()).map_err(Error::BuildRequest);
        self.within(async { self.client.request_text(request?).await }).await
    }

    /// One page of a list.
    ///
    /// # Errors
    /// [`ApiError`]
    pub(super) async fn list(&self, path: &str, parameters: &ListParams) -> Result<String, ApiError> {
        let request = Request::new(path).list(parameters).map_err(Error::BuildRequest);
        self.within(async { self.client.request_text(request?).await }).await
    }

    /// What happens from a version on; connected when this returns.
    ///
    /// # Errors
    /// [`ApiError`]
    pub(super) async fn watch<T: Clone + DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        version: &str,
    ) -> Result<impl Stream<Item = Result<WatchEvent<T>, Error>> + Send + use<T>, ApiError> {
        let parameters = WatchParams { bookmarks: true, ..WatchParams::default() };
        let request = Request::new(path).watch(&parameters, version).map_err(Error::BuildRequest);
        self.within(async { self.client.request_events(request?).await }).await
    }

    /// Makes an object.
    ///
    /// # Errors
    /// [`ApiError`]
    pub(super) async fn create(&self, path: &str, object: Vec<u8>) -> Result<(), ApiError> {
        let request = Request::new(path).create(&PostParams::default(), object).map_err(Error::BuildRequest);
        self.within(async { self.client.request_text(request?).await }).await.map(drop)
    }

    async fn within<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, ApiError> {
        match tokio::time::timeout(ANSWER, asked).await {
            Ok(answer) => answer.map_err(|error| self.error(&error)),
            Err(_) => Err(self.nonsense(&format!("no answer within {} s", ANSWER.as_secs()))),
        }
    }

    /// In our own words.
    pub(super) fn error(&self, error: &Error) -> ApiError {
        let (status, text) = match error {
            Error::Api(status) => (Some(status.code), format!("{}: {}", status.code, status.message)),
            error => (None, innermost(error)),
        };
        ApiError { status, text: brief(format!("{}: {text}", self.address)) }
    }

    /// Something that is no answer to what was asked.
    pub(super) fn nonsense(&self, what: &str) -> ApiError {
        ApiError { status: None, text: format!("{}: {what}", self.address) }
    }
}

/// The cause below all others: those above it only say that something failed.
fn innermost(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// One line, not too long.
fn brief(text: String) -> String {
    let mut chars = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let shown: String = chars.by_ref().take(LONGEST).collect();
    if chars.next().is_some() { shown + "…" } else { shown }
}
