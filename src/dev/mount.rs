//! What a mount says of itself, and which mount has a path.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::auth::token::SYSTEM_TTL;
use super::random;
use super::reply::Refusal;

/// Most mounts of one table.
const MAX_MOUNTS: usize = 1_000;

/// Mounts by path, each with its slash: `secret/`.
pub(super) struct Table<T>(BTreeMap<String, Mount<T>>);

/// One mount.
pub(super) struct Mount<T> {
    accessor: String,
    uuid: String,
    description: String,
    pub(super) inner: T,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Table<T> {
    /// Mounts something; a path at, above or below another mount's is refused.
    pub(super) fn enable(
        &mut self,
        path: &str,
        kind: &str,
        description: &str,
        inner: T,
    ) -> Result<(), Refusal> {
        let path = format!("{}/", path.trim_matches('/'));
        if path == "/" {
            return Err(Refusal::bad("the mount's path is missing"));
        }
        if let Some(taken) = self.0.keys().find(|known| known.starts_with(&path) || path.starts_with(*known))
        {
            return Err(Refusal::bad(format!("path is already in use at {taken}")));
        }
        if self.0.len() >= MAX_MOUNTS {
            return Err(Refusal::full("mounts", MAX_MOUNTS));
        }
        let mount = Mount {
            accessor: format!("{kind}_{}", &random::uuid()[..8]),
            uuid: random::uuid(),
            description: description.to_owned(),
            inner,
        };
        self.0.insert(path, mount);
        Ok(())
    }

    /// Unmounts, with all that was in it.
    pub(super) fn disable(&mut self, path: &str) {
        self.0.remove(&format!("{}/", path.trim_matches('/')));
    }

    /// The mount that has a path, and the path below it. The mount itself may be named without its slash.
    pub(super) fn find<'p>(&self, path: &'p str) -> Option<(&str, &Mount<T>, &'p str)> {
        self.0.iter().find_map(|(name, mount)| {
            let rest = path.strip_prefix(name.as_str());
            let rest = rest.or_else(|| (path == name.trim_end_matches('/')).then_some(""))?;
            Some((name.as_str(), mount, rest))
        })
    }

    /// The same, to change it.
    pub(super) fn find_mut<'p>(&mut self, path: &'p str) -> Option<(&str, &mut T, &'p str)> {
        self.0.iter_mut().find_map(|(name, mount)| {
            let rest = path.strip_prefix(name.as_str());
            let rest = rest.or_else(|| (path == name.trim_end_matches('/')).then_some(""))?;
            Some((name.as_str(), &mut mount.inner, rest))
        })
    }

    /// Every mount that `seen` lets through, described.
    pub(super) fn describe(
        &self,
        seen: impl Fn(&str) -> bool,
        one: impl Fn(&Mount<T>) -> Value,
    ) -> Map<String, Value> {
        self.0.iter().filter(|(path, _)| seen(path)).map(|(path, mount)| (path.clone(), one(mount))).collect()
    }
}

impl<T> Mount<T> {
    /// As the API describes a mount. `effective` fills in the system's lease times, as the UI's paths do.
    pub(super) fn describe(&self, kind: &str, options: &Value, effective: bool) -> Value {
        let ttl = if effective { SYSTEM_TTL.as_secs() } else { 0 };
        json!({
            "accessor": self.accessor,
            "config": { "default_lease_ttl": ttl, "force_no_cache": false, "max_lease_ttl": ttl },
            "deprecation_status": "supported",
            "description": self.description,
            "external_entropy_access": false,
            "local": false,
            "options": options,
            "plugin_version": "",
            "running_plugin_version": format!("v{}+embedded", env!("CARGO_PKG_VERSION")),
            "running_sha256": "",
            "seal_wrap": false,
            "type": kind,
            "uuid": self.uuid,
        })
    }
}
