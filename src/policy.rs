//! What a class may say of store and login. A class decides where the tokens of its namespace's pods go, and whoever may write
//! classes is not the operator: so it may name what the agent's own configuration names, what the operator's list allows for its
//! namespace, and nothing else. Asked at each publish, before any token leaves the node. No I/O.
//!
//! ```text
//!   allow:
//!     - namespaces: [shop, "team-*"]                 of pods and classes; * stands for any text
//!       addresses: [https://vault.example:8200]      or "*"
//!       storeNamespaces: [shop, "shop/*"]
//!       authMounts: [kubernetes-b]
//!       serverNames: [vault.internal]
//!       files: ["shop/*"]                            below classFiles
//!       ca: true                                     certificates as text
//!       skipVerify: true
//! ```
//! Role and audience are free: a role is bound to service accounts by the store, and the audiences that there are stand in the
//! CSIDriver, which only an operator may write.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::class::Class;
use crate::class::fields::{Fields, mappings};
use crate::config::fault::{Broken, Faults, Sink, broken};
use crate::config::settings::{Settings, default_mount};
use crate::config::{text, yaml};
use crate::reference::{Address, AuthMethod, Pem};

/// The operator's list, and the directory of files that classes may name. The default allows nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Each entry adds to the others.
    pub allow: Vec<Allowance>,
    /// Where the files lie that classes may name; `None`: they may name none.
    pub files: Option<PathBuf>,
}

/// What some namespaces' classes may say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    namespaces: Vec<Glob>,
    any_address: bool,
    addresses: Vec<Address>,
    store_namespaces: Vec<Glob>,
    auth_mounts: Vec<Glob>,
    server_names: Vec<Glob>,
    files: Vec<Glob>,
    ca: bool,
    skip_verify: bool,
}

impl Policy {
    /// Whether a class of this Kubernetes namespace says only what it may. `under` is what the agent's configuration says, which
    /// every class may repeat.
    ///
    /// # Errors
    /// Every field that says something else.
    pub fn check(&self, class: &Class, namespace: &str, under: &Settings) -> Result<(), Faults> {
        let sink = Sink::new(class.to_string());
        let check = Check {
            class,
            namespace,
            allowed: self.allow.iter().filter(|entry| any(&entry.namespaces, namespace)).collect(),
            files: self.files.as_deref(),
            sink: &sink,
        };
        check.store(under);
        check.files(under);
        sink.finish(Some(()))
    }
}

impl Allowance {
    /// Reads the list, which is YAML or JSON; faults stand below `path`.
    pub(crate) fn read(text: &str, path: &str, sink: &Sink) -> Option<Vec<Self>> {
        let documents = sink.take(path, yaml::documents(text))?;
        let [Value::Array(items)] = documents.as_slice() else {
            sink.add(
                path,
                broken("is not a list", "write entries like {namespaces: [shop], addresses: [...]}"),
            );
            return None;
        };
        let entries = mappings(items, path, sink).into_iter().map(|fields| {
            let entry = Self::entry(&fields, sink);
            fields.finish();
            entry
        });
        Some(entries.collect())
    }

    fn entry(fields: &Fields<'_>, sink: &Sink) -> Self {
        let globs = |name| {
            let each = fields.texts(name).into_iter();
            each.filter_map(|(path, text)| sink.take(&path, Glob::parse(text))).collect::<Vec<_>>()
        };
        if fields.raw("namespaces").is_none() {
            fields.fault(
                "namespaces",
                broken("is missing", "name the Kubernetes namespaces, or write [\"*\"]"),
            );
        }
        let addresses = fields.texts("addresses");
        let named = addresses.iter().filter(|(_, text)| *text != "*");
        Self {
            namespaces: globs("namespaces"),
            any_address: addresses.iter().any(|(_, text)| *text == "*"),
            addresses: named.filter_map(|(path, text)| sink.take(path, address(text))).collect(),
            store_namespaces: globs("storeNamespaces"),
            auth_mounts: globs("authMounts"),
            server_names: globs("serverNames"),
            files: globs("files"),
            ca: fields.boolean("ca").unwrap_or(false),
            skip_verify: fields.boolean("skipVerify").unwrap_or(false),
        }
    }
}

/// One class against what its namespace may say.
struct Check<'a> {
    class: &'a Class,
    namespace: &'a str,
    allowed: Vec<&'a Allowance>,
    files: Option<&'a Path>,
    sink: &'a Sink,
}

impl Check<'_> {
    fn store(&self, under: &Settings) {
        let (said, usual) = (&self.class.settings.connection, &under.connection);
        let known = |address: &Address| usual.addresses.as_ref().is_some_and(|all| all.contains(address));
        let may = |address: &Address| {
            self.allowed.iter().any(|entry| entry.any_address || entry.addresses.contains(address))
        };
        if !said.addresses.iter().flatten().all(|address| known(address) || may(address)) {
            self.refuse("Address", "an address", "addresses");
        }
        let word = |said: Option<&str>, usual: Option<&str>, of: fn(&Allowance) -> &[Glob]| {
            said.is_none_or(|said| {
                usual == Some(said) || self.allowed.iter().any(|entry| any(of(entry), said))
            })
        };
        let namespace = (said.namespace.as_deref(), usual.namespace.as_deref());
        if !word(namespace.0, namespace.1, |entry| &entry.store_namespaces) {
            self.refuse("Namespace", "a namespace of the store", "storeNamespaces");
        }
        let method = under.login.method.unwrap_or(AuthMethod::Kubernetes);
        let mount = under.login.mount.as_deref().unwrap_or(default_mount(method));
        if !word(self.class.settings.login.mount.as_deref(), Some(mount), |entry| &entry.auth_mounts) {
            self.refuse("AuthMountPath", "a login method", "authMounts");
        }
        let name = (said.server_name.as_deref(), usual.server_name.as_deref());
        if !word(name.0, name.1, |entry| &entry.server_names) {
            self.refuse("TLSServerName", "a server name", "serverNames");
        }
        let trusted = |ca: &Pem| usual.ca.as_ref() == Some(ca) || self.allowed.iter().any(|entry| entry.ca);
        if said.ca.as_ref().is_some_and(|ca| matches!(ca, Pem::Text(_)) && !trusted(ca)) {
            self.deny("CACert", "is a CA of its own, which namespace {} may not bring", "set `ca: true`");
        }
        let blind = said.skip_verify == Some(true) && usual.skip_verify != Some(true);
        if blind && !self.allowed.iter().any(|entry| entry.skip_verify) {
            self.deny("SkipTLSVerify", "is true, which namespace {} may not say", "set `skipVerify: true`");
        }
    }

    fn files(&self, under: &Settings) {
        let (said, usual) = (&self.class.settings.connection, &under.connection);
        if said.ca != usual.ca {
            match &said.ca {
                Some(Pem::File(path)) => self.file("CACertPath", path),
                Some(Pem::Directory(path)) => self.file("CADirectory", path),
                Some(Pem::Text(_)) | None => {}
            }
        }
        if let Some(client) =
            said.client_certificate.as_ref().filter(|_| said.client_certificate != usual.client_certificate)
        {
            self.file("TLSClientCertPath", &client.certificate);
            self.file("TLSClientKeyPath", &client.key);
        }
    }

    fn file(&self, setting: &'static str, path: &Path) {
        let fault = |rule: &'static str, remedy: &'static str| {
            self.sink.add(self.class.field(setting), broken(rule, remedy));
        };
        let Some(root) = self.files else {
            let remedy = "ask the operator to set classFiles in the agent's configuration, or remove it";
            return fault("names a file of the agent, and classes may name none", remedy);
        };
        let Some(inside) = below(root, path) else {
            let remedy = "name a file below the agent's classFiles, without ..";
            return fault("names a file outside of the directory for files of classes", remedy);
        };
        if !self.allowed.iter().any(|entry| any(&entry.files, inside)) {
            self.refuse(setting, "a file", "files");
        }
    }

    fn refuse(&self, setting: &'static str, what: &str, key: &str) {
        let rule = format!("is not {what} that namespace {} may use", self.namespace);
        let remedy = format!(
            "ask the operator to add it to `{key}` below `allow` in the agent's configuration, or remove it"
        );
        self.sink.add(self.class.field(setting), broken(rule, remedy));
    }

    fn deny(&self, setting: &'static str, rule: &str, line: &str) {
        let rule = rule.replace("{}", self.namespace);
        let remedy =
            format!("ask the operator to {line} below `allow` in the agent's configuration, or remove it");
        self.sink.add(self.class.field(setting), broken(rule, remedy));
    }
}

/// The part of a path below a directory; `None`: it is not below it, or climbs.
fn below<'a>(root: &Path, path: &'a Path) -> Option<&'a str> {
    let inside = path.strip_prefix(root).ok()?;
    let plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
    inside.to_str().filter(|inside| plain && !inside.is_empty())
}

/// A text in which `*` stands for any text, the empty one too.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Glob(String);

impl Glob {
    fn parse(text: &str) -> Result<Self, Broken> {
        text::word(text).map(Self)
    }

    fn matches(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = text.strip_prefix(first) else { return false };
        let mut parts: Vec<&str> = parts.collect();
        // Without a star all of the text is to be there.
        let Some(last) = parts.pop() else { return rest.is_empty() };
        for part in parts {
            match rest.split_once(part) {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

fn any(globs: &[Glob], text: &str) -> bool {
    globs.iter().any(|glob| glob.matches(text))
}

fn address(text: &str) -> Result<Address, Broken> {
    text::address(text).map_err(|Broken { rule, .. }| {
        broken(rule, "write it like https://vault.example:8200, or write * alone")
    })
}

#[cfg(test)]
mod tests;
