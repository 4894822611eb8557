//! What was asked, counted as it arrives, whatever the answer.

use std::collections::BTreeMap;

use serde::Serialize;

use super::ask::Operation;

/// Most paths and namespaces that are counted apart.
const MAX_NAMES: usize = 100_000;

/// Requests so far. Those to `sys/embedded/…` are not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// All.
    pub total: u64,
    /// `auth/<mount>/login`.
    pub logins: u64,
    /// `auth/token/renew-self` and `auth/token/renew`.
    pub renewals: u64,
    /// `auth/token/revoke-self` and `auth/token/revoke`.
    pub revocations: u64,
    /// Reads outside `sys/` and `auth/`, by path below `/v1/` without query.
    pub reads: BTreeMap<String, u64>,
    /// Requests by `X-Vault-Namespace`, which is accepted and changes nothing.
    pub namespaces: BTreeMap<String, u64>,
}

impl Counts {
    /// Reads of one path.
    #[must_use]
    pub fn reads_of(&self, path: &str) -> u64 {
        self.reads.get(path).copied().unwrap_or(0)
    }

    pub(super) fn count(&mut self, operation: Operation, path: &str, namespace: Option<&str>) {
        self.total += 1;
        match path.strip_prefix("auth/") {
            Some("token/renew-self" | "token/renew") => self.renewals += 1,
            Some("token/revoke-self" | "token/revoke") => self.revocations += 1,
            Some(path) if path.ends_with("/login") => self.logins += 1,
            None if operation == Operation::Read && !path.starts_with("sys/") => {
                increment(&mut self.reads, path);
            }
            _ => {}
        }
        if let Some(namespace) = namespace {
            increment(&mut self.namespaces, namespace);
        }
    }
}

fn increment(table: &mut BTreeMap<String, u64>, name: &str) {
    if let Some(count) = table.get_mut(name) {
        *count += 1;
    } else if table.len() < MAX_NAMES {
        table.insert(name.to_owned(), 1);
    }
}
