//! Publish 1: class documents to what a volume asks for. A class is a `SecretProviderClass` or a `SecretsStoreImport`; every
//! field of both is honoured or refused by name, and all faults of all documents are reported at once.
//!
//! ```text
//!   text ─▶ YAML documents ─▶ Class ──── into_spec(over, under, subject) ───▶ VolumeSpec
//!           limits, no values   │         what the mount says, what the
//!           in errors           │         configuration says, who asks
//!                               └─ alone good for `check`: no store, no credential needed
//! ```
//! Documents come from people: nothing in them is trusted, and no fault repeats what a field holds.

/// Classes in a directory of files.
pub mod directory;
/// Freshness and ownership, which neither resource has.
pub(crate) mod extras;
/// Walks a mapping and knows what nobody asked for.
pub(crate) mod fields;
/// Rules that files of both kinds share.
pub(crate) mod files;
/// `SecretProviderClass`.
pub(crate) mod provider_class;
/// `SecretsStoreImport`.
pub(crate) mod store_import;

pub use crate::config::fault::{Fault, Faults};

use std::collections::HashSet;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use serde_json::Value;

use crate::class::fields::Fields;
use crate::config::fault::{Sink, broken, collect};
use crate::config::settings::{LoginSettings, Settings};
use crate::config::yaml;
use crate::reference::{AuthMethod, FileSpec, Freshness, Identity, Subject, VolumeSpec};

/// Files of one class: twice what volumes are tested with; a mistake in a generator must not become a flood at the store.
pub const MAX_FILES: usize = 2_000;

/// Which resource a class is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum Kind {
    /// `secrets-store.csi.x-k8s.io/v1` (and its deprecated `v1alpha1`).
    SecretProviderClass,
    /// `deckhouse.io/v1alpha1`.
    SecretsStoreImport,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SecretProviderClass => "SecretProviderClass",
            Self::SecretsStoreImport => "SecretsStoreImport",
        })
    }
}

/// What is understood, works otherwise than its author may think, and is no reason to refuse.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Warning {
    /// The field.
    pub field: String,
    /// What it does not do.
    pub text: String,
}

/// One class document, valid in itself: files with paths that go together, settings within their bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Which resource it is.
    pub kind: Kind,
    /// Its Kubernetes namespace, if the document names one.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// What it says of store, login, freshness and ownership.
    pub settings: Settings,
    /// Its files; never empty.
    pub files: Vec<FileSpec>,
    /// What its author should know.
    pub warnings: Vec<Warning>,
    /// What a `SecretProviderClass` calls its parameters of several spellings: `("Address", "baoAddress")`.
    spelt: Vec<(&'static str, &'static str)>,
}

/// Where the classes of a cluster or a node are found. Asked at each publish, from a thread that may block.
pub trait Classes: Send + Sync + 'static {
    /// A class as it is now; `None`: there is none of this kind and name in the namespace.
    ///
    /// # Errors
    /// [`FindError`]
    fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<Class>, FindError>;

    /// All classes of a namespace that are good, sorted by name: what is told when one is not found.
    ///
    /// # Errors
    /// [`FindError::Unreadable`]
    fn names(&self, namespace: &str) -> Result<Vec<(Kind, String)>, FindError>;

    /// Other namespaces that have a class of this kind and name, sorted: what is told when a pod asks for one that is not its
    /// own. Namespaces that cannot be read are left out. Default: none are known.
    fn elsewhere(&self, _kind: Kind, _namespace: &str, _name: &str) -> Vec<String> {
        Vec::new()
    }

    /// Returns as soon as [`Classes::find`] can tell of this kind, which may be never: who waits has a deadline. Default: at once.
    fn known(&self, _kind: Kind) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// Why a class cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// It is there, and this is wrong with it.
    #[error(transparent)]
    Faults(#[from] Faults),
    /// Nobody can tell now whether it is there.
    #[error("cannot tell whether there is a {class}: {why}")]
    Unknown {
        /// Kind, namespace and name.
        class: String,
        /// Who does not answer, since when.
        why: String,
    },
    /// Where it may be, nothing can be read.
    #[error("cannot read the classes in {place}: {error}")]
    Unreadable {
        /// Where.
        place: String,
        /// Why.
        #[source]
        error: std::io::Error,
    },
}

/// Reads the class documents of one text (YAML or JSON; `kind: List` is unfolded).
///
/// # Errors
/// Every fault of every document.
pub fn parse(text: &str) -> Result<Vec<Class>, Faults> {
    collect(parse_each(text))
}

/// The same, each document for itself; never empty. What is wrong with the text as a whole (not YAML, too large, no
/// document in it) is one error.
#[must_use]
pub fn parse_each(text: &str) -> Vec<Result<Class, Faults>> {
    let sink = Sink::new("text");
    let Some(documents) = sink.take("", yaml::documents(text)) else { return vec![sink.finish(None)] };
    let documents: Vec<_> = documents.iter().flat_map(unfold).collect();
    if documents.is_empty() {
        sink.add("", broken("has no document", "write a SecretProviderClass or a SecretsStoreImport"));
        return vec![sink.finish(None)];
    }
    let mut seen = HashSet::new();
    let mut once = |class: Class| {
        let sink = Sink::new(class.to_string());
        if !seen.insert(class.to_string()) {
            sink.add("metadata.name", broken("is there twice in this text", "keep one of the two"));
        }
        sink.finish(Some(class))
    };
    let read = documents.iter().enumerate().map(|(index, document)| Class::read(document, index + 1));
    read.map(|class| class.and_then(&mut once)).collect()
}

impl Class {
    /// Reads one document; `position` (from 1) stands for its name where it has none.
    ///
    /// # Errors
    /// Every fault of it.
    pub fn read(document: &Value, position: usize) -> Result<Self, Faults> {
        let sink = Sink::new(label(document, position));
        let class = read(document, &sink);
        sink.finish(class)
    }

    /// `namespace/name`, or `name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        self.namespace.as_ref().map_or_else(|| self.name.clone(), |ns| format!("{ns}/{}", self.name))
    }

    /// The field that says something of store or login, by what the provider's parameter ends with: `Address`.
    pub(crate) fn field(&self, of: &'static str) -> String {
        match (self.kind, self.spelt.iter().find(|(known, _)| *known == of)) {
            (Kind::SecretsStoreImport, _) => format!("spec.{}", store_import::spelling(of)),
            (Kind::SecretProviderClass, Some((_, name))) => format!("spec.parameters.{name}"),
            (Kind::SecretProviderClass, None) => format!("spec.parameters.vault{of}"),
        }
    }

    /// How fresh the class alone wants its values, defaults filled in.
    #[must_use]
    pub fn freshness(&self) -> Freshness {
        self.settings.freshness.complete(&Sink::new(""))
    }

    /// Adds what the class leaves open: `over` wins over it, `under` yields to it. Its mount and role are those of a service
    /// account's login; they do not apply where `over` says to log in by token or AppRole.
    ///
    /// # Errors
    /// What still nobody said (address, role), and what does not go together now.
    pub fn into_spec(
        self,
        over: &Settings,
        under: &Settings,
        subject: Subject,
    ) -> Result<VolumeSpec, Faults> {
        let sink = Sink::new(self.to_string());
        let name = self.full_name();
        let mut said = self.settings;
        if matches!(over.login.method, Some(AuthMethod::AppRole | AuthMethod::Token)) {
            said.login = LoginSettings::default();
        }
        let whole = over.clone().or(said).or(under.clone());
        let freshness = whole.freshness.complete(&sink);
        let connection = whole.connection.complete(&sink);
        let auth = whole.login.complete(&sink);
        let spec = connection.zip(auth).map(|(connection, auth)| VolumeSpec {
            class: name,
            identity: Arc::new(Identity { connection, auth, subject }),
            files: self.files,
            freshness,
            ownership: whole.ownership,
        });
        sink.finish(spec)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.full_name())
    }
}

/// What the spec of either kind gives, as in [`Class`].
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) files: Vec<FileSpec>,
    pub(crate) warnings: Vec<Warning>,
    pub(crate) spelt: Vec<(&'static str, &'static str)>,
}

fn read(document: &Value, sink: &Sink) -> Option<Class> {
    let root = Fields::new(document, String::new(), sink)?;
    let kind = kind(&root)?;
    let _ = root.raw("status");
    if root.raw("metadata").is_none() {
        root.fault("metadata", broken("is missing", "write metadata with a name"));
    }
    let metadata = root.mapping("metadata");
    let name = metadata.as_ref().and_then(|metadata| {
        let name = metadata.required("name", "name the class");
        name.and_then(|_| metadata.parse("name", object_name))
    });
    let namespace = metadata.as_ref().and_then(|metadata| metadata.parse("namespace", object_name));
    let annotations = metadata.as_ref().and_then(|metadata| metadata.mapping("annotations"));
    let labels = metadata.as_ref().and_then(|metadata| metadata.mapping("labels"));
    if root.raw("spec").is_none() {
        root.fault("spec", broken("is missing", "write what the volume asks for"));
    }
    let spec = root.mapping("spec")?;
    let Parts { settings, files, warnings, spelt } = match kind {
        Kind::SecretProviderClass => provider_class::read(&spec, labels.as_ref(), annotations.as_ref(), sink),
        Kind::SecretsStoreImport => {
            let (settings, files) = store_import::read(&spec, annotations.as_ref(), sink);
            Parts { settings, files, ..Parts::default() }
        }
    };
    let _ = settings.freshness.complete(sink);
    spec.finish();
    root.finish();
    let mut class = Class { kind, namespace, name: name?, settings, files, warnings, spelt };
    class.warnings.extend(transport_warnings(&class));
    Some(class)
}

fn kind(root: &Fields<'_>) -> Option<Kind> {
    const REMEDY: &str = "this command reads SecretProviderClass and SecretsStoreImport";
    let version = root.required("apiVersion", "write secrets-store.csi.x-k8s.io/v1 or deckhouse.io/v1alpha1");
    let kind = match root.required("kind", REMEDY)? {
        "SecretProviderClass" => Kind::SecretProviderClass,
        "SecretsStoreImport" => Kind::SecretsStoreImport,
        other => {
            let shown: String = other.chars().filter(|c| c.is_ascii_alphanumeric()).take(63).collect();
            root.fault("kind", broken(format!("{shown} is not a class"), REMEDY));
            return None;
        }
    };
    let versions: &[&str] = match kind {
        Kind::SecretProviderClass => {
            &["secrets-store.csi.x-k8s.io/v1", "secrets-store.csi.x-k8s.io/v1alpha1"]
        }
        Kind::SecretsStoreImport => &["deckhouse.io/v1alpha1"],
    };
    if version.is_some_and(|version| !versions.contains(&version)) {
        root.fault("apiVersion", broken(format!("is not one of {kind}"), format!("write {}", versions[0])));
    }
    Some(kind)
}

/// What a fault calls a document: its kind and name where they can be told, else its place.
fn label(document: &Value, position: usize) -> String {
    let text = |pointer| document.pointer(pointer).and_then(Value::as_str).filter(|t| object_name(t).is_ok());
    let kind = document.get("kind").and_then(Value::as_str);
    let kind = kind.filter(|kind| matches!(*kind, "SecretProviderClass" | "SecretsStoreImport"));
    match (kind, text("/metadata/namespace"), text("/metadata/name")) {
        (Some(kind), Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (Some(kind), None, Some(name)) => format!("{kind} {name}"),
        (Some(kind), ..) => format!("document {position} ({kind})"),
        (None, ..) => format!("document {position}"),
    }
}

/// What `kubectl get -o yaml` wraps several objects in.
fn unfold(document: &Value) -> Vec<&Value> {
    match (document.get("kind").and_then(Value::as_str), document.get("items")) {
        (Some("List"), Some(Value::Array(items))) => items.iter().collect(),
        _ => vec![document],
    }
}

/// Name of a Kubernetes object: a DNS subdomain.
pub(crate) fn object_name(text: &str) -> Result<String, crate::config::fault::Broken> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    if bytes.len() <= 253 && bytes.iter().copied().all(legal) && edge(bytes.first()) && edge(bytes.last()) {
        return Ok(text.to_owned());
    }
    Err(broken("is not a Kubernetes name", "use lower-case letters, digits, - and ., at most 253"))
}

fn transport_warnings(class: &Class) -> Vec<Warning> {
    let connection = &class.settings.connection;
    let mut warnings = Vec::new();
    let mut warn = |setting, text: &str| {
        warnings.push(Warning { field: class.field(setting), text: text.to_owned() });
    };
    if connection.skip_verify == Some(true) {
        warn("SkipTLSVerify", "any certificate is accepted: who stands in between reads tokens and secrets");
    }
    if connection.addresses.iter().flatten().any(|address| !address.is_https()) {
        warn("Address", "http: tokens and secrets travel in clear text");
    }
    warnings
}

#[cfg(test)]
mod tests;
