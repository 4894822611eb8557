//! KV version 2: numbered versions that can be deleted, undeleted and destroyed, and metadata beside them.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::{MAX_SECRETS, canonical, list, raw};
use crate::dev::ask::{Ask, Fields, Operation};
use crate::dev::clock;
use crate::dev::reply::{Outcome, Refusal, Reply};
use crate::secret::SecretBytes;

/// Versions kept where neither the mount nor the secret says how many.
const DEFAULT_VERSIONS: u64 = 10;

/// The secrets of one mount, by path.
#[derive(Default)]
pub(in crate::dev) struct Store {
    settings: Settings,
    secrets: BTreeMap<String, Secret>,
}

/// What a mount's `config` and a secret's `metadata` both have; zero means: as the wider one says.
#[derive(Default)]
struct Settings {
    max_versions: u64,
    cas_required: bool,
    delete_version_after: Duration,
}

struct Secret {
    settings: Settings,
    custom: Option<Map<String, Value>>,
    created: SystemTime,
    updated: SystemTime,
    current: u64,
    /// The lowest version after others were dropped; 0 before.
    oldest: u64,
    versions: BTreeMap<u64, Version>,
}

struct Version {
    /// `None` once destroyed.
    data: Option<SecretBytes>,
    created: SystemTime,
    /// When it is deleted; may lie ahead.
    deletion: Option<SystemTime>,
}

#[derive(Serialize)]
struct Data<'a> {
    data: Option<&'a RawValue>,
    metadata: VersionMetadata<'a>,
}

#[derive(Serialize)]
struct VersionMetadata<'a> {
    created_time: String,
    custom_metadata: &'a Option<Map<String, Value>>,
    deletion_time: String,
    destroyed: bool,
    version: u64,
}

#[derive(Deserialize)]
struct Write<'a> {
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    options: Option<Options>,
}

#[derive(Deserialize)]
struct Options {
    cas: Option<u64>,
}

impl Store {
    /// Answers a request whose path below the mount is `path`.
    pub(in crate::dev) fn answer(&mut self, ask: &Ask, path: &str) -> Outcome {
        use Operation::{Delete, List, Patch, Read, Write};
        let (part, name) = path.split_once('/').unwrap_or((path, ""));
        // A name does not end in a slash; a directory to list may.
        let named = !name.is_empty() && !name.ends_with('/');
        match (part, ask.operation) {
            ("config", Read) if name.is_empty() => Reply::data("kv", self.settings.describe()),
            ("config", Write) if name.is_empty() => {
                self.settings.update(&ask.fields()?)?;
                Reply::no_content()
            }
            ("metadata", List) => list("kv", self.secrets.keys(), name),
            ("data", Read) if named => self.read(name, ask),
            ("data", Write) if named => self.write(name, ask),
            ("data", Patch) if named => self.patch(name, ask),
            ("data", Delete) if named => self.delete_latest(name, ask.now),
            ("delete" | "undelete" | "destroy", Write) if named => self.change(part, name, ask),
            ("metadata", Read) if named => self.metadata(name),
            ("metadata", Write) if named => self.set_metadata(name, ask),
            ("metadata", Delete) if named => {
                self.secrets.remove(name);
                Reply::no_content()
            }
            ("data" | "delete" | "undelete" | "destroy" | "metadata", _) if named => {
                Err(Refusal::unsupported_operation())
            }
            _ => unversioned(ask.operation),
        }
    }

    fn read(&self, name: &str, ask: &Ask) -> Outcome {
        let asked = match ask.parameter("version") {
            None => 0,
            Some(text) => text.parse::<u64>().map_err(|_| {
                Refusal::bad("Field validation failed: error converting input for field \"version\"")
            })?,
        };
        let secret = self.secrets.get(name).ok_or_else(Refusal::missing)?;
        let number = if asked == 0 { secret.current } else { asked };
        let version = secret.versions.get(&number).ok_or_else(Refusal::missing)?;
        let metadata = version.describe(number, &secret.custom);
        match version.readable(ask.now) {
            None => Reply::gone(Data { data: None, metadata }),
            Some(data) => Reply::data("kv", Data { data: Some(raw(data)?), metadata }),
        }
    }

    fn write(&mut self, name: &str, ask: &Ask) -> Outcome {
        let write = parse(ask)?;
        let text = write.data.map(RawValue::get).ok_or_else(|| Refusal::bad("no data provided"))?;
        let wrong = || Refusal::bad("error converting input for field \"data\": expected a map");
        let data = canonical(text.as_bytes()).ok_or_else(wrong)?;
        self.append(name, data, write.options.and_then(|options| options.cas), ask.now)
    }

    /// A JSON merge patch (RFC 7396) of the latest version.
    fn patch(&mut self, name: &str, ask: &Ask) -> Outcome {
        let write = parse(ask)?;
        let missing = || Refusal::missing();
        let secret = self.secrets.get(name).ok_or_else(missing)?;
        let latest = secret.versions.get(&secret.current).and_then(|version| version.readable(ask.now));
        let latest = latest.ok_or_else(missing)?;
        let broken = |_| Refusal::bad("no data provided");
        let mut merged: Value = serde_json::from_slice(latest.expose()).map_err(broken)?;
        let patch: Value = serde_json::from_str(write.data.map_or("", RawValue::get)).map_err(broken)?;
        merge(&mut merged, patch);
        let data = serde_json::to_vec(&merged).map(SecretBytes::new).map_err(broken)?;
        self.append(name, data, write.options.and_then(|options| options.cas), ask.now)
    }

    fn append(&mut self, name: &str, data: SecretBytes, cas: Option<u64>, now: SystemTime) -> Outcome {
        if self.secrets.len() >= MAX_SECRETS && !self.secrets.contains_key(name) {
            return Err(Refusal::full("secrets in a mount", MAX_SECRETS));
        }
        let current = self.secrets.get(name).map_or(0, |secret| secret.current);
        let required = self.secrets.get(name).is_some_and(|secret| secret.settings.cas_required);
        match cas {
            None if required || self.settings.cas_required => {
                return Err(Refusal::bad("check-and-set parameter required for this call"));
            }
            Some(expected) if expected != current => {
                return Err(Refusal::bad("check-and-set parameter did not match the current version"));
            }
            _ => {}
        }
        let secret = self.secrets.entry(name.to_owned()).or_insert_with(|| Secret::new(now));
        let after = match secret.settings.delete_version_after {
            Duration::ZERO => self.settings.delete_version_after,
            after => after,
        };
        let deletion = (!after.is_zero()).then(|| now + after);
        secret.current += 1;
        secret.updated = now;
        let version = Version { data: Some(data), created: now, deletion };
        let answer = Reply::data("kv", version.describe(secret.current, &secret.custom));
        secret.versions.insert(secret.current, version);
        let limit = [secret.settings.max_versions, self.settings.max_versions, DEFAULT_VERSIONS];
        let limit = limit.into_iter().find(|limit| *limit > 0).unwrap_or(DEFAULT_VERSIONS);
        while secret.versions.len() as u64 > limit {
            secret.versions.pop_first();
            secret.oldest = secret.versions.keys().next().copied().unwrap_or(0);
        }
        answer
    }

    fn delete_latest(&mut self, name: &str, now: SystemTime) -> Outcome {
        if let Some(secret) = self.secrets.get_mut(name)
            && let Some(version) = secret.versions.get_mut(&secret.current)
        {
            version.deletion.get_or_insert(now);
        }
        Reply::no_content()
    }

    /// `delete`, `undelete`, `destroy` of numbered versions; those that do not exist are passed over.
    fn change(&mut self, how: &str, name: &str, ask: &Ask) -> Outcome {
        let numbers: Vec<u64> = ask
            .fields()?
            .list("versions")
            .unwrap_or_default()
            .iter()
            .map(|number| number.parse().map_err(|_| Refusal::bad("versions must be numbers")))
            .collect::<Result<_, _>>()?;
        if numbers.is_empty() {
            return Err(Refusal::bad("No version number provided"));
        }
        let Some(secret) = self.secrets.get_mut(name) else { return Reply::no_content() };
        for number in numbers {
            let Some(version) = secret.versions.get_mut(&number) else { continue };
            match how {
                "delete" => {
                    version.deletion.get_or_insert(ask.now);
                }
                "undelete" => version.deletion = None,
                _ => version.data = None,
            }
        }
        Reply::no_content()
    }

    fn metadata(&self, name: &str) -> Outcome {
        let secret = self.secrets.get(name).ok_or_else(Refusal::missing)?;
        let mut whole = secret.settings.describe();
        let versions: Map<String, Value> = secret
            .versions
            .iter()
            .map(|(number, version)| {
                let described = json!({
                    "created_by": null,
                    "created_time": clock::rfc3339(version.created),
                    "deleted_by": null,
                    "deletion_time": version.deletion.map(clock::rfc3339).unwrap_or_default(),
                    "destroyed": version.data.is_none(),
                });
                (number.to_string(), described)
            })
            .collect();
        whole.extend([
            ("created_time".into(), clock::rfc3339(secret.created).into()),
            ("updated_time".into(), clock::rfc3339(secret.updated).into()),
            ("current_version".into(), secret.current.into()),
            ("oldest_version".into(), secret.oldest.into()),
            ("custom_metadata".into(), secret.custom.clone().map_or(Value::Null, Value::Object)),
            ("last_updated_by".into(), Value::Null),
            ("versions".into(), versions.into()),
        ]);
        Reply::data("kv", whole)
    }

    fn set_metadata(&mut self, name: &str, ask: &Ask) -> Outcome {
        let fields = ask.fields()?;
        if fields.is_empty() {
            return Reply::no_content();
        }
        if self.secrets.len() >= MAX_SECRETS && !self.secrets.contains_key(name) {
            return Err(Refusal::full("secrets in a mount", MAX_SECRETS));
        }
        let secret = self.secrets.entry(name.to_owned()).or_insert_with(|| Secret::new(ask.now));
        secret.settings.update(&fields)?;
        if let Some(custom) = fields.raw("custom_metadata").and_then(Value::as_object) {
            secret.custom = Some(custom.clone());
        }
        Reply::no_content()
    }
}

impl Settings {
    fn update(&mut self, fields: &Fields) -> Result<(), Refusal> {
        self.max_versions = fields.number("max_versions")?.unwrap_or(self.max_versions);
        self.cas_required = fields.flag("cas_required")?.unwrap_or(self.cas_required);
        self.delete_version_after =
            fields.duration("delete_version_after")?.unwrap_or(self.delete_version_after);
        Ok(())
    }

    fn describe(&self) -> Map<String, Value> {
        Map::from_iter([
            ("max_versions".into(), self.max_versions.into()),
            ("cas_required".into(), self.cas_required.into()),
            ("delete_version_after".into(), clock::go(self.delete_version_after).into()),
        ])
    }
}

impl Secret {
    fn new(now: SystemTime) -> Self {
        Self {
            settings: Settings::default(),
            custom: None,
            created: now,
            updated: now,
            current: 0,
            oldest: 0,
            versions: BTreeMap::new(),
        }
    }
}

impl Version {
    fn readable(&self, now: SystemTime) -> Option<&SecretBytes> {
        self.data.as_ref().filter(|_| self.deletion.is_none_or(|at| now < at))
    }

    fn describe<'a>(&self, number: u64, custom: &'a Option<Map<String, Value>>) -> VersionMetadata<'a> {
        VersionMetadata {
            created_time: clock::rfc3339(self.created),
            custom_metadata: custom,
            deletion_time: self.deletion.map(clock::rfc3339).unwrap_or_default(),
            destroyed: self.data.is_none(),
            version: number,
        }
    }
}

/// The parser's own message would quote from the body, so it is not used.
fn parse(ask: &Ask) -> Result<Write<'_>, Refusal> {
    let body = ask.body.expose();
    if body.is_empty() {
        return Ok(Write { data: None, options: None });
    }
    serde_json::from_slice(body).map_err(|_| Refusal::internal("the body is not a JSON object"))
}

/// 404 with the hint that the real server gives for paths of version 1.
fn unversioned(operation: Operation) -> Outcome {
    let command = match operation {
        Operation::Read => "get",
        Operation::List => "list",
        Operation::Write => "put",
        Operation::Patch => "patch",
        Operation::Delete => "delete",
    };
    let warning = format!(
        "Invalid path for a versioned K/V secrets engine. See the API docs for the appropriate API endpoints to use. \
         If using the Vault CLI, use 'vault kv {command}' for this operation."
    );
    Reply::warning(StatusCode::NOT_FOUND, "", warning)
}

fn merge(target: &mut Value, patch: Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (key, value) in patch {
                if value.is_null() {
                    target.remove(&key);
                } else {
                    merge(target.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (target, patch) => {
            *target = patch;
            // A null inside a new object deletes nothing and is not kept.
            strip_nulls(target);
        }
    }
}

fn strip_nulls(value: &mut Value) {
    if let Value::Object(members) = value {
        members.retain(|_, member| !member.is_null());
        members.values_mut().for_each(strip_nulls);
    }
}
