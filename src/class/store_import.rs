//! `SecretsStoreImport` of Deckhouse's secrets-store-integration. What its schema accepts and its controller can serve is
//! accepted; what the schema lets through and the mount then refuses is refused here.

use crate::class::fields::Fields;
use crate::class::{extras, files};
use crate::config::fault::{Broken, Sink, broken};
use crate::config::settings::{ConnectionSettings, LoginSettings, Settings};
use crate::config::text;
use crate::reference::{Encoding, FilePath, FileSpec, Method, Ownership, Request};

/// Reads the spec. `annotations` are the document's.
pub(crate) fn read(
    spec: &Fields<'_>,
    annotations: Option<&Fields<'_>>,
    sink: &Sink,
) -> (Settings, Vec<FileSpec>) {
    if spec.required("type", "write CSI").is_some_and(|kind| kind != "CSI") {
        spec.fault("type", broken("is not CSI", "write CSI: there is no other type"));
    }
    let role = spec.required("role", "name the store's role to log in to");
    let role = role.and_then(|_| spec.parse("role", |t| letters(t, "-_.")));
    let (freshness, ownership) = extras::read(annotations, None);
    let settings = Settings {
        connection: ConnectionSettings {
            addresses: spec.parse("address", text::address).map(|address| vec![address]),
            namespace: spec.parse("namespace", |t| letters(t, "-_./")),
            ca: spec.parse("caCert", text::certificates),
            skip_verify: spec.boolean("skipTLSVerify"),
            ..ConnectionSettings::default()
        },
        login: LoginSettings {
            method: None,
            mount: spec.parse("authPath", text::mount),
            role,
            audience: spec.parse("audience", text::word),
        },
        freshness,
        ownership,
    };
    (settings, file_list(spec, sink))
}

/// What this resource calls a provider's parameter, by what that ends with.
pub(crate) fn spelling(of: &'static str) -> &'static str {
    match of {
        "Address" => "address",
        "Namespace" => "namespace",
        "AuthMountPath" => "authPath",
        "CACert" => "caCert",
        "SkipTLSVerify" => "skipTLSVerify",
        other => other,
    }
}

fn file_list(spec: &Fields<'_>, sink: &Sink) -> Vec<FileSpec> {
    const REMEDY: &str = "list at least one file with name and source";
    let list = spec.path("files");
    let (mut specs, mut paths) = (Vec::new(), Vec::new());
    if spec.raw("files").is_none() {
        sink.add(&list, broken("is missing", REMEDY));
    }
    let Some(items) = spec.list("files") else { return specs };
    if items.is_empty() {
        sink.add(&list, broken("lists no file", REMEDY));
    }
    for item in items {
        specs.extend(file(&item, &mut paths));
        item.finish();
    }
    files::check_together(&paths, &list, sink);
    specs
}

fn file(item: &Fields<'_>, paths: &mut Vec<(FilePath, String)>) -> Option<FileSpec> {
    let name = item.required("name", "name the file").and_then(|_| item.parse("name", file_name));
    paths.extend(name.clone().map(|path| (path, item.path("name"))));
    let decode = item.boolean("decodeBase64").unwrap_or(false);
    if item.raw("source").is_none() {
        item.fault("source", broken("is missing", "write path and key of the secret"));
    }
    let source = item.mapping("source")?;
    let path = source.required("path", "name the path at the store");
    let path = path.and_then(|_| source.parse("path", source_path));
    let key = source.required("key", "name the key inside the secret");
    let key = key.and_then(|_| source.parse("key", |t| letters(t, "-_.")));
    source.finish();
    Some(FileSpec {
        path: name?,
        request: Request { method: Method::Get, path: path?, query: None, args: None },
        key: Some(key?),
        encoding: if decode { Encoding::Base64 } else { Encoding::Utf8 },
        ownership: Ownership::default(),
    })
}

/// The resource knows no directories.
fn file_name(text: &str) -> Result<FilePath, Broken> {
    letters(text, "-_.").and_then(|name| files::file_path(&name))
}

/// The resource knows no queries, so no `?version=` either.
fn source_path(text: &str) -> Result<String, Broken> {
    letters(text, "-_./").and_then(|path| files::secret_path(&path)).map(|secret| secret.path)
}

/// Letters, digits and `more`.
fn letters(text: &str, more: &'static str) -> Result<String, Broken> {
    if text.len() <= 2048 && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.as_bytes().contains(&b)) {
        return Ok(text.to_owned());
    }
    let listed = more.chars().map(String::from).collect::<Vec<_>>().join(" ");
    Err(broken("has a character that is not allowed here", format!("use letters, digits and {listed} only")))
}
