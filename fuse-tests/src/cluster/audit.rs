//! Requests that the API server had, from its audit log: who asked for what, with which answer.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::{Cluster, count};

/// A moment of the audit log; by default its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(usize);

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `system:serviceaccount:fuse-secrets:fuse-secrets-agent`, `system:node:node1`, `admin`.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub verb: String,
    /// `pods`, `serviceaccounts/token`, or the path of what is no resource.
    pub resource: String,
    /// Of which namespace; empty: of none.
    pub namespace: String,
    /// Of which object; empty: of a list.
    pub name: String,
    /// The answer's status.
    pub code: u64,
    /// `ResponseStarted` of a watch, `ResponseComplete` of everything.
    pub stage: String,
}

impl Cluster {
    /// Now, to count from.
    #[must_use]
    pub fn audit_mark(&self) -> Mark {
        Mark(self.audit_text().len())
    }

    /// Requests that were answered since then. A watch is there twice: when it starts and when it ends.
    ///
    /// # Panics
    /// A line of the log cannot be read.
    #[must_use]
    pub fn requests_since(&self, mark: Mark) -> Vec<Request> {
        let text = self.audit_text();
        // The last line may be half written.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let lines = text.get(mark.0..whole).unwrap_or_default().lines();
        lines.map(|line| request(&serde_json::from_str(line).unwrap())).collect()
    }

    /// How many of them by user, verb and resource; watches by their starts.
    #[must_use]
    pub fn counts_since(&self, mark: Mark) -> BTreeMap<(String, String, String), u64> {
        let requests = self.requests_since(mark).into_iter();
        let started =
            requests.filter(|request| request.verb != "watch" || request.stage == "ResponseStarted");
        count(started.map(|request| (request.user, request.verb, request.resource)))
    }

    fn audit_text(&self) -> String {
        fs::read_to_string(self.directory().join("audit.log")).unwrap_or_default()
    }
}

fn request(event: &Value) -> Request {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let object = &event["objectRef"];
    let resource = match (object["resource"].as_str(), object["subresource"].as_str()) {
        (Some(resource), Some(sub)) => format!("{resource}/{sub}"),
        (Some(resource), None) => resource.to_owned(),
        (None, _) => text(&event["requestURI"]),
    };
    Request {
        user: text(&event["user"]["username"]),
        verb: text(&event["verb"]),
        resource,
        namespace: text(&object["namespace"]),
        name: text(&object["name"]),
        code: event["responseStatus"]["code"].as_u64().unwrap_or_default(),
        stage: text(&event["stage"]),
    }
}
