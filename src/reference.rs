//! What a volume asks for: who it is at which store, which secrets it wants as which files, how fresh.
//!
//! Every type here is validated where it is made (by [`crate::class`] or by the command line), holds no secret, and may be
//! printed. The layers below compare and hash them: two volumes whose `Key`s are equal share one read.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A store's base address: `https://host:port` (or `http://`), no path, query or user.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(url::Url);

/// Why an address is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("address must be https://host[:port] or http://host[:port]: {reason}")]
pub struct AddressError {
    reason: &'static str,
}

impl AddressError {
    /// The broken rule alone.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.reason
    }
}

impl Address {
    /// Parses `https://host[:port]`; a single trailing `/` is accepted.
    ///
    /// # Errors
    /// [`AddressError`] with the rule that is broken, never the text (it may carry a password).
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let refuse = |reason| Err(AddressError { reason });
        let Ok(url) = url::Url::parse(text) else { return refuse("this is not a URL") };
        if !matches!(url.scheme(), "https" | "http") {
            return refuse("the scheme is neither https nor http");
        }
        if !url.username().is_empty() || url.password().is_some() {
            return refuse("it must not carry a user or password");
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return refuse("it must not carry a path or query");
        }
        if url.host_str().is_none_or(str::is_empty) {
            return refuse("the host is missing");
        }
        Ok(Self(url))
    }

    /// The address as a URL with the path `/`.
    #[must_use]
    pub fn url(&self) -> &url::Url {
        &self.0
    }

    /// Whether traffic to it is encrypted.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.0.scheme() == "https"
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        Self::parse(&text)
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

fn text_of<S: Serializer>(url: &Option<url::Url>, serializer: S) -> Result<S::Ok, S::Error> {
    url.as_ref().map(url::Url::as_str).serialize(serializer)
}

fn url_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<url::Url>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| url::Url::parse(&text)).transpose().map_err(serde::de::Error::custom)
}

/// Certificates as PEM: a file, every file of a directory, or the text itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pem {
    /// One file, read when a connection pool is made.
    File(PathBuf),
    /// All files of one directory.
    Directory(PathBuf),
    /// The PEM text.
    Text(String),
}

/// A client certificate for mutual TLS: both as PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClientCertificate {
    /// The certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Where a store is and how it is trusted. Equal connections share one pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Connection {
    /// Members of one cluster in order of preference; never empty.
    pub addresses: Vec<Address>,
    /// Value of `X-Vault-Namespace`.
    pub namespace: Option<String>,
    /// Who may have signed the store's certificate; `None`: the system's roots.
    pub ca: Option<Pem>,
    /// Name expected in the certificate, if not the address's host.
    pub server_name: Option<String>,
    /// Certificate shown to the store.
    pub client_certificate: Option<ClientCertificate>,
    /// Accept any certificate. For throw-away stores only.
    #[serde(default)]
    pub skip_verify: bool,
    /// Proxy for all requests; the environment's proxy variables are never read.
    #[serde(default, serialize_with = "text_of", deserialize_with = "url_of")]
    pub proxy: Option<url::Url>,
}

impl Connection {
    /// A connection to these members of one cluster (at least one), with nothing else said.
    #[must_use]
    pub fn to(addresses: Vec<Address>) -> Self {
        Self {
            addresses,
            namespace: None,
            ca: None,
            server_name: None,
            client_certificate: None,
            skip_verify: false,
            proxy: None,
        }
    }
}

/// How a volume proves itself to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthMethod {
    /// `auth/<mount>/login` with a service account's token and a role.
    Kubernetes,
    /// `auth/<mount>/login` with any JWT and a role.
    Jwt,
    /// `auth/<mount>/login` with a role id and a secret id.
    AppRole,
    /// A token that somebody else got.
    Token,
}

/// The login at a store, without its secret half (see [`crate::store::Credential`]).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Auth {
    /// The method.
    pub method: AuthMethod,
    /// Where the method is mounted, without `auth/`: `kubernetes`, `jwt`, `approle`. Empty for [`AuthMethod::Token`].
    pub mount: String,
    /// The role (`approle`: the role id). Empty for [`AuthMethod::Token`].
    pub role: String,
    /// Audience that the presented token must carry.
    pub audience: Option<String>,
}

/// On whose behalf a login is made. Different subjects never share anything.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// A pod's service account.
    ServiceAccount {
        /// The pod's namespace.
        namespace: String,
        /// The service account's name.
        name: String,
        /// The service account's uid: a re-created account is another one.
        uid: String,
    },
    /// A mount without Kubernetes: where its credential comes from, such as `token-file:/run/token`.
    Local(String),
}

/// Who asks whom. One identity has one login, whoever shares it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The store.
    pub connection: Connection,
    /// The login.
    pub auth: Auth,
    /// On whose behalf.
    pub subject: Subject,
}

/// HTTP method of a read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A plain read; the only method whose answers are shared.
    #[default]
    Get,
    /// A write that answers a secret, such as `pki/issue/web`.
    Post,
    /// The same, for stores that ask for PUT.
    Put,
}

/// One request to the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Request {
    /// The method.
    #[serde(default)]
    pub method: Method,
    /// Path below `/v1/`, without leading slash: `secret/data/app`.
    pub path: String,
    /// Query without `?`: `version=3`.
    pub query: Option<String>,
    /// JSON body of a POST or PUT, as canonical text.
    pub args: Option<String>,
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.path)?;
        self.query.as_ref().map_or(Ok(()), |query| write!(f, "?{query}"))
    }
}

/// Name of a volume on this node: kubelet's volume handle, or the mount point of a local mount.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VolumeId(pub String);

/// What one value is cached under (DESIGN section 8): equal keys are one read and one value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who asks whom.
    pub identity: Arc<Identity>,
    /// For what.
    pub request: Request,
    /// Set if the value belongs to one volume only (any answer to something other than GET).
    pub volume: Option<VolumeId>,
}

/// How the text of a value becomes the bytes of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// As it is.
    #[default]
    Utf8,
    /// Standard base64 with padding; newlines inside are ignored.
    Base64,
    /// Hexadecimal digits of either case.
    Hex,
}

/// A file's path inside a volume: relative, 1 to 4,096 bytes, each part 1 to 255 bytes, no part `.` or `..`, no part that
/// begins with `..`, no NUL. (The rules of the kubelet's atomic writer.)
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilePath(String);

/// Why a file's path is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("file path {path:?} {rule}")]
pub struct FilePathError {
    path: String,
    rule: &'static str,
}

impl FilePathError {
    /// The broken rule, without the path.
    #[must_use]
    pub fn rule(&self) -> &'static str {
        self.rule
    }
}

impl FilePath {
    /// Checks a path.
    ///
    /// # Errors
    /// [`FilePathError`] with the broken rule.
    pub fn parse(path: &str) -> Result<Self, FilePathError> {
        let rule = if path.is_empty() {
            "must not be empty"
        } else if path.len() > 4096 {
            "must not be longer than 4096 bytes"
        } else if path.starts_with('/') {
            "must be relative: remove the leading /"
        } else if path.contains('\0') {
            "must not contain NUL"
        } else if path.split('/').any(|part| part.is_empty() || part == ".") {
            "must not have an empty part or a part that is \".\""
        } else if path.split('/').any(|part| part.starts_with("..")) {
            "must not have a part that begins with \"..\": such names belong to the driver"
        } else if path.split('/').any(|part| part.len() > 255) {
            "must not have a part longer than 255 bytes"
        } else {
            return Ok(Self(path.to_owned()));
        };
        Err(FilePathError { path: path.chars().take(300).collect(), rule })
    }

    /// The path's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its parts: directories first, the file last.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

impl TryFrom<String> for FilePath {
    type Error = FilePathError;

    fn try_from(path: String) -> Result<Self, FilePathError> {
        Self::parse(&path)
    }
}

impl From<FilePath> for String {
    fn from(path: FilePath) -> Self {
        path.0
    }
}

impl std::fmt::Display for FilePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Owner, group and permission bits; what is `None` falls to the next wider setting (file, class, driver).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Ownership {
    /// Owner; the driver's default is root (0), as an ordinary user that user.
    pub uid: Option<u32>,
    /// Group; the driver's default is the pod's fsGroup, else 0.
    pub gid: Option<u32>,
    /// Permission bits, 0 to 0o666: never execute or set-id bits.
    pub mode: Option<u16>,
}

impl Ownership {
    /// This setting, and `wider` where this one is silent.
    #[must_use]
    pub fn or(self, wider: Self) -> Self {
        Self { uid: self.uid.or(wider.uid), gid: self.gid.or(wider.gid), mode: self.mode.or(wider.mode) }
    }
}

/// One file of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileSpec {
    /// Where it appears.
    pub path: FilePath,
    /// What is asked.
    pub request: Request,
    /// Which key of the answer; `None`: the whole answer as JSON.
    pub key: Option<String>,
    /// How its text becomes bytes.
    #[serde(default)]
    pub encoding: Encoding,
    /// Who owns it.
    #[serde(default)]
    pub ownership: Ownership,
}

/// How fresh a volume's values are. `max_age` ≥ `interval`, so that in a healthy system no `open` ever waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Freshness {
    /// A value is read again this long after it was read (jittered downwards, so never later). 1 s to 1 day, default 60 s.
    pub interval: Duration,
    /// An `open` of an older value waits for a refresh. Default: `interval`.
    pub max_age: Duration,
    /// For at most this long; then the last known value is served and counted as stale. 0 to 5 s, default 2 s.
    pub open_deadline: Duration,
    /// For how long a value may be served that could not be refreshed. Default `None`: without limit.
    pub stale_grace: Option<Duration>,
}

impl Default for Freshness {
    fn default() -> Self {
        let interval = Duration::from_secs(60);
        Self { interval, max_age: interval, open_deadline: Duration::from_secs(2), stale_grace: None }
    }
}

/// All that is needed to serve one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// The class it came from, as `namespace/name` or `name`, for people.
    pub class: String,
    /// Who asks whom.
    pub identity: Arc<Identity>,
    /// Its files; never empty, no path twice, no path that is another's directory.
    pub files: Vec<FileSpec>,
    /// How fresh.
    pub freshness: Freshness,
    /// Owner, group and mode where a file says nothing.
    #[serde(default)]
    pub ownership: Ownership,
}
