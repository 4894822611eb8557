//! The KV engine, both versions. Values are kept as JSON text in [`crate::secret::SecretBytes`]; the names of secrets are not secret.

pub(super) mod v1;
pub(super) mod v2;

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::ask::Ask;
use super::reply::{Outcome, Refusal, Reply};
use crate::secret::SecretBytes;

/// Most secrets in one mount.
const MAX_SECRETS: usize = 100_000;

/// What is mounted.
pub(super) enum Engine {
    /// Without versions.
    V1(v1::Store),
    /// With versions.
    V2(v2::Store),
}

impl Engine {
    /// An empty one; `version` as in a mount's options, where nothing means 1.
    pub(super) fn new(version: Option<&str>) -> Result<Self, Refusal> {
        match version {
            None | Some("1") => Ok(Self::V1(v1::Store::default())),
            Some("2") => Ok(Self::V2(v2::Store::default())),
            Some(_) => Err(Refusal::bad("the kv engine has versions 1 and 2")),
        }
    }

    /// `1` or `2`.
    pub(super) fn version(&self) -> &'static str {
        match self {
            Self::V1(_) => "1",
            Self::V2(_) => "2",
        }
    }

    /// Answers a request whose path below the mount is `path`.
    pub(super) fn answer(&mut self, ask: &Ask, path: &str) -> Outcome {
        match self {
            Self::V1(store) => store.answer(ask, path),
            Self::V2(store) => store.answer(ask, path),
        }
    }
}

/// A JSON object as text with sorted keys, as the real server returns it; numbers keep their digits.
fn canonical(object: &[u8]) -> Option<SecretBytes> {
    let members: BTreeMap<String, &RawValue> = serde_json::from_slice(object).ok()?;
    serde_json::to_vec(&members).ok().map(SecretBytes::new)
}

/// Stored JSON text, to stand inside an answer.
fn raw(value: &SecretBytes) -> Result<&RawValue, Refusal> {
    serde_json::from_slice(value.expose()).map_err(|_| Refusal::internal("a stored value is not JSON"))
}

/// The answer to LIST: the next path segment of each name below `prefix`, directories with a slash; 404 if there is none.
fn list<'a>(mount_type: &str, names: impl Iterator<Item = &'a String>, prefix: &str) -> Outcome {
    let prefix = if prefix.is_empty() { String::new() } else { format!("{}/", prefix.trim_end_matches('/')) };
    let mut keys: Vec<&str> = names
        .filter_map(|name| name.strip_prefix(&prefix))
        .map(|rest| rest.find('/').map_or(rest, |slash| &rest[..=slash]))
        .collect();
    keys.dedup();
    if keys.is_empty() {
        return Err(Refusal::missing());
    }
    Reply::data(mount_type, serde_json::json!({ "keys": keys }))
}
