//! `SecretProviderClass` of the secrets-store CSI driver, with the parameters of its Vault and OpenBao providers, Deckhouse's
//! additions (`vaultCACert`, `decodeBase64`) and our own.

use std::cell::RefCell;
use std::collections::HashMap;

use serde_json::Value;

use crate::class::fields::{Fields, mappings};
use crate::class::{Parts, Warning, extras, files};
use crate::config::fault::{Broken, Sink, broken};
use crate::config::settings::{ConnectionSettings, LoginSettings, Settings};
use crate::config::{text, yaml};
use crate::reference::{ClientCertificate, Encoding, FilePath, FileSpec, Method, Ownership, Pem, Request};

/// Label of classes that Deckhouse's controller makes: their `secretObjects` only carry `decodeBase64`.
const CARRIER: (&str, &str) = ("app.kubernetes.io/managed-by", "secrets-store-import");

/// Reads the spec. `labels` and `annotations` are the document's.
pub(crate) fn read(
    spec: &Fields<'_>,
    labels: Option<&Fields<'_>>,
    annotations: Option<&Fields<'_>>,
    sink: &Sink,
) -> Parts {
    let mut warnings = Vec::new();
    let provider = spec.required("provider", "write vault, openbao or stronghold").unwrap_or_default();
    if !matches!(provider, "" | "vault" | "openbao" | "stronghold") {
        let rule = "is a provider that this driver does not replace";
        spec.fault(
            "provider",
            broken(rule, "choose one of vault, openbao, stronghold: stores that speak the Vault API"),
        );
    }
    let decoded = secret_objects(spec, labels, &mut warnings);
    let Some(parameters) = spec.mapping("parameters") else {
        if spec.raw("parameters").is_none() {
            spec.fault("parameters", broken("is missing", "write at least roleName and objects"));
        }
        return Parts { warnings, ..Parts::default() };
    };

    let names = Parameters { fields: &parameters, openbao: provider == "openbao", spelt: RefCell::default() };
    let role = parameters.required("roleName", "name the store's role to log in to");
    let role = role.and_then(|role| sink.take(&parameters.path("roleName"), text::word(role)));
    let (freshness, ownership) = extras::read(annotations, Some(&parameters));
    let settings = Settings {
        connection: connection(&names),
        login: LoginSettings {
            method: None,
            mount: names.one_of(["KubernetesMountPath", "AuthMountPath"], text::mount),
            role,
            audience: parameters.parse("audience", text::word),
        },
        freshness,
        ownership,
    };
    let spelt = names.spelt.into_inner();
    let files = objects(&parameters, decoded, sink);
    parameters.finish();
    Parts { settings, files, warnings, spelt }
}

/// Parameters whose names begin with the provider's: `vaultAddress`, for OpenBao also `baoAddress` and `openbaoAddress`.
struct Parameters<'a> {
    fields: &'a Fields<'a>,
    openbao: bool,
    /// What was given, and under which name.
    spelt: RefCell<Vec<(&'static str, &'static str)>>,
}

impl Parameters<'_> {
    /// One parameter under any of its prefixes.
    fn one<T>(&self, suffix: &'static str, parse: impl Fn(&str) -> Result<T, Broken>) -> Option<T> {
        self.one_of([suffix], parse)
    }

    /// The first of several parameters of which only one may be given.
    fn one_of<T, const N: usize>(
        &self,
        suffixes: [&'static str; N],
        parse: impl Fn(&str) -> Result<T, Broken>,
    ) -> Option<T> {
        let mut given = suffixes.into_iter().flat_map(spellings).filter(|(bao, name)| {
            let there = self.fields.raw(name).is_some_and(|value| value.as_str() != Some(""));
            if there && *bao && !self.openbao {
                let rule = "is a parameter of the provider openbao";
                self.fields.fault(name, broken(rule, "begin it with vault, or write provider: openbao"));
            }
            there && (self.openbao || !*bao)
        });
        let (_, first) = given.next()?;
        for (_, other) in given {
            self.fields.fault(other, broken(format!("stands beside {first}"), "keep one of the two"));
        }
        // One setting, whichever of its parameters says it.
        self.spelt.borrow_mut().push((suffixes[N - 1], first));
        self.fields.parse(first, parse)
    }
}

/// Each parameter's names; `true` marks those that only OpenBao's provider knows.
fn spellings(suffix: &'static str) -> [(bool, &'static str); 3] {
    let names = match suffix {
        "Address" => ["vaultAddress", "baoAddress", "openbaoAddress"],
        "Namespace" => ["vaultNamespace", "baoNamespace", "openbaoNamespace"],
        "KubernetesMountPath" => {
            ["vaultKubernetesMountPath", "baoKubernetesMountPath", "openbaoKubernetesMountPath"]
        }
        "AuthMountPath" => ["vaultAuthMountPath", "baoAuthMountPath", "openbaoAuthMountPath"],
        "SkipTLSVerify" => ["vaultSkipTLSVerify", "baoSkipTLSVerify", "openbaoSkipTLSVerify"],
        "CACertPath" => ["vaultCACertPath", "baoCACertPath", "openbaoCACertPath"],
        "CADirectory" => ["vaultCADirectory", "baoCADirectory", "openbaoCADirectory"],
        "CACert" => ["vaultCACert", "baoCACert", "openbaoCACert"],
        "TLSServerName" => ["vaultTLSServerName", "baoTLSServerName", "openbaoTLSServerName"],
        "TLSClientCertPath" => ["vaultTLSClientCertPath", "baoTLSClientCertPath", "openbaoTLSClientCertPath"],
        _ => ["vaultTLSClientKeyPath", "baoTLSClientKeyPath", "openbaoTLSClientKeyPath"],
    };
    [(false, names[0]), (true, names[1]), (true, names[2])]
}

fn connection(names: &Parameters<'_>) -> ConnectionSettings {
    let file = names.one("CACertPath", |t| text::absolute(t).map(Pem::File));
    let directory = names.one("CADirectory", |t| text::absolute(t).map(Pem::Directory));
    let inline = names.one("CACert", text::certificates);
    let mut given = [("vaultCACert", inline), ("vaultCACertPath", file), ("vaultCADirectory", directory)]
        .into_iter()
        .filter_map(|(name, ca)| Some((name, ca?)));
    let ca = given.next();
    for (name, _) in given {
        let rule = format!("stands beside {}", ca.as_ref().map_or("", |(name, _)| name));
        names.fields.fault(name, broken(rule, "keep one of the two"));
    }
    let certificate = names.one("TLSClientCertPath", text::absolute);
    let key = names.one("TLSClientKeyPath", text::absolute);
    let client_certificate = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (certificate, _) => {
            let (alone, other) = if certificate.is_some() {
                ("vaultTLSClientCertPath", "vaultTLSClientKeyPath")
            } else {
                ("vaultTLSClientKeyPath", "vaultTLSClientCertPath")
            };
            names.fields.fault(alone, broken("stands alone", format!("give {other} too")));
            None
        }
    };
    ConnectionSettings {
        addresses: names.one("Address", text::address).map(|address| vec![address]),
        namespace: names.one("Namespace", text::word),
        ca: ca.map(|(_, ca)| ca),
        server_name: names.one("TLSServerName", text::word),
        client_certificate,
        skip_verify: names.one("SkipTLSVerify", text::switch),
        proxy: None,
    }
}

/// What `secretObjects` say of files: names whose values are base64, and where that was said.
fn secret_objects(
    spec: &Fields<'_>,
    labels: Option<&Fields<'_>>,
    warnings: &mut Vec<Warning>,
) -> HashMap<String, String> {
    let mut decoded = HashMap::new();
    let Some(secrets) = spec.list("secretObjects") else { return decoded };
    let carrier = labels.and_then(|labels| labels.text(CARRIER.0)) == Some(CARRIER.1);
    if !secrets.is_empty() && !carrier {
        warnings.push(Warning {
            field: spec.path("secretObjects"),
            text: "not synced yet: the volume works, but no Kubernetes Secret is made".to_owned(),
        });
    }
    for secret in secrets {
        for unused in ["secretName", "type", "labels", "annotations"] {
            let _ = secret.raw(unused);
        }
        for entry in secret.list("data").unwrap_or_default() {
            let _ = entry.raw("key");
            let name = entry.required("objectName", "name the object that it is made of");
            if let (Some(true), Some(name)) = (entry.boolean("decodeBase64"), name) {
                decoded.insert(name.to_owned(), entry.path("objectName"));
            }
            entry.finish();
        }
        secret.finish();
    }
    decoded
}

fn objects(parameters: &Fields<'_>, mut decoded: HashMap<String, String>, sink: &Sink) -> Vec<FileSpec> {
    const REMEDY: &str = "write `objects: |` and below it a list of objectName, secretPath, secretKey";
    let list = parameters.path("objects");
    let Some(text) = parameters.required("objects", REMEDY) else { return Vec::new() };
    let documents = match yaml::documents(text) {
        Ok(documents) => documents,
        // Lines count from the first line of the block.
        Err(Broken { rule, remedy }) => {
            sink.add(list, broken(format!("inside the block, {rule}"), remedy));
            return Vec::new();
        }
    };
    let items = match documents.as_slice() {
        [Value::Array(items)] if !items.is_empty() => items,
        [] | [Value::Array(_)] => {
            sink.add(list, broken("lists no file", REMEDY));
            return Vec::new();
        }
        _ => {
            sink.add(list, broken("is not a list", REMEDY));
            return Vec::new();
        }
    };
    let (mut specs, mut paths) = (Vec::new(), Vec::new());
    for item in mappings(items, &list, sink) {
        specs.extend(object(&item, &mut decoded, &mut paths));
        item.finish();
    }
    for field in decoded.into_values() {
        sink.add(field, broken("names no object", "name one of spec.parameters.objects[].objectName"));
    }
    files::check_together(&paths, &list, sink);
    specs
}

/// One entry of `objects`. Every field is read, so that every fault of it shows.
fn object(
    item: &Fields<'_>,
    decoded: &mut HashMap<String, String>,
    paths: &mut Vec<(FilePath, String)>,
) -> Option<FileSpec> {
    let name = item.required("objectName", "name the file").map(str::to_owned);
    let path = name.as_ref().and_then(|_| item.parse("objectName", files::file_path));
    paths.extend(path.clone().map(|path| (path, item.path("objectName"))));
    let secret = item.required("secretPath", "name the path at the store");
    let secret = secret.and_then(|_| item.parse("secretPath", files::secret_path));
    let method = item.parse("method", method).unwrap_or_default();
    let args = args(item, method);
    let mut encoding = item.parse("encoding", files::encoding);
    if name.is_some_and(|name| decoded.remove(&name).is_some()) {
        if matches!(encoding, Some(Encoding::Base64 | Encoding::Hex)) {
            let rule = "stands beside decodeBase64 in secretObjects, which would decode twice";
            item.fault("encoding", broken(rule, "keep one of the two"));
        }
        encoding = Some(Encoding::Base64);
    }
    let mode = item.raw("filePermission").and_then(|value| {
        files::file_permission(value).map_err(|fault| item.fault("filePermission", fault)).ok()
    });
    let ownership = Ownership { uid: id(item, "uid"), gid: id(item, "gid"), mode };
    let key = item.text("secretKey").filter(|key| !key.is_empty()).map(str::to_owned);
    let secret = secret?;
    Some(FileSpec {
        path: path?,
        request: Request { method, path: secret.path, query: secret.query, args },
        key,
        encoding: encoding.unwrap_or_default(),
        ownership,
    })
}

/// `secretArgs` as canonical JSON (sorted keys), so that equal arguments are equal text.
fn args(item: &Fields<'_>, method: Method) -> Option<String> {
    let args = item.raw("secretArgs")?;
    let Value::Object(map) = args else {
        item.fault("secretArgs", broken("is not a mapping", "write it as lines of name: value"));
        return None;
    };
    if map.is_empty() {
        return None;
    }
    if method == Method::Get {
        item.fault("secretArgs", broken("belongs to no GET", "set method to POST or PUT, or remove it"));
    }
    let mut args = args.clone();
    args.sort_all_objects();
    Some(args.to_string())
}

fn method(text: &str) -> Result<Method, Broken> {
    match text.to_ascii_uppercase().as_str() {
        "GET" => Ok(Method::Get),
        "POST" => Ok(Method::Post),
        "PUT" => Ok(Method::Put),
        _ => Err(broken("is unknown", "choose one of GET, POST, PUT")),
    }
}

/// An id as number or as text.
fn id(item: &Fields<'_>, name: &'static str) -> Option<u32> {
    let text = match item.raw(name)? {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    text::id(&text).map_err(|fault| item.fault(name, fault)).ok()
}
