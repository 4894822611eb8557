//! What to change, for what came back. A 404 says least and is the commonest mistake (the two generations of the KV
//! engine differ by `data/` in the path), so for it alone the store is asked which mount the path belongs to.

use serde::Deserialize;

use crate::reference::{AuthMethod, Identity, Method, Request, Subject};

/// The mount a path belongs to.
pub(super) struct Mount {
    /// With its slash: `secret/`.
    path: String,
    /// Generation of the KV engine; `None` for every other engine.
    kv: Option<u8>,
}

impl Mount {
    /// Reads the answer of `sys/internal/ui/mounts/<path>`.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Envelope {
            data: Data,
        }
        #[derive(Deserialize)]
        struct Data {
            path: String,
            #[serde(rename = "type")]
            engine: String,
            options: Option<Options>,
        }
        #[derive(Deserialize)]
        struct Options {
            version: Option<String>,
        }
        let data = serde_json::from_slice::<Envelope>(body).ok()?.data;
        let second = data.options.and_then(|options| options.version).as_deref() == Some("2");
        let kv = matches!(data.engine.as_str(), "kv" | "generic").then_some(if second { 2 } else { 1 });
        Some(Self { path: data.path, kv })
    }
}

/// For a 404 without a word; `None`: the mount is not to be seen.
pub(super) fn missing(request: &Request, mount: Option<&Mount>) -> String {
    let Some(mount) = mount else {
        return "nothing is there, or the policy hides it: check the path, mount first".to_owned();
    };
    let Mount { path: name, .. } = mount;
    let inside = request.path.strip_prefix(name.as_str()).unwrap_or_default();
    match (mount.kv, inside.strip_prefix("data/")) {
        (Some(2), None) => format!("{name} is a KV v2 mount, did you mean {name}data/{inside}?"),
        (Some(1), Some(rest)) => format!("{name} is a KV v1 mount, did you mean {name}{rest}?"),
        (Some(2), Some(rest)) => {
            let version = request
                .query
                .as_deref()
                .and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("version=")));
            match version {
                Some(version) => {
                    format!("{name} is a KV v2 mount, but {rest:?} or its version {version} does not exist")
                }
                None => format!(
                    "{name} is a KV v2 mount, but {rest:?} does not exist in it: write it, or correct the name"
                ),
            }
        }
        _ => format!("{name} is a mount, but {inside:?} does not exist in it: write it, or correct the name"),
    }
}

/// For a read that is denied.
pub(super) fn denied(identity: &Identity, request: &Request) -> String {
    let capability = if request.method == Method::Get { "read" } else { "update" };
    // A policy for KV v2 names the path with `data/`, so the path without it is denied and not missing.
    let kv2 = match request.path.split_once('/') {
        Some((mount, rest)) if !request.path.contains("/data/") && request.method == Method::Get => {
            format!("; if {mount}/ is a KV v2 mount, the path is {mount}/data/{rest}")
        }
        _ => String::new(),
    };
    format!(
        "a policy of {} needs {capability} on {:?}{}{kv2}",
        who(identity),
        request.path,
        namespace(identity)
    )
}

/// For a login that is refused.
pub(super) fn login(identity: &Identity, status: u16) -> String {
    let who = who(identity);
    let mount = &identity.auth.mount;
    match (identity.auth.method, status) {
        (AuthMethod::Token, _) => format!(
            "give a token that has not expired and whose policy allows read on auth/token/lookup-self{} ({who})",
            namespace(identity)
        ),
        (_, 404) => {
            format!("no auth method is mounted at auth/{mount}{}: correct its path", namespace(identity))
        }
        (AuthMethod::AppRole, _) => {
            format!("check the role id and that the secret id has neither expired nor been used up ({who})")
        }
        (AuthMethod::Kubernetes | AuthMethod::Jwt, _) => format!(
            "check that auth/{mount}{} is mounted, and that its role {:?} exists and is bound to {}{}",
            namespace(identity),
            identity.auth.role,
            subject(identity),
            identity.auth.audience.as_ref().map(|name| format!(" and audience {name:?}")).unwrap_or_default()
        ),
    }
}

fn who(identity: &Identity) -> String {
    let auth = &identity.auth;
    match auth.method {
        AuthMethod::Token => format!("the token of {}", subject(identity)),
        AuthMethod::AppRole => {
            format!("role id {:?} at auth/{} ({})", auth.role, auth.mount, subject(identity))
        }
        AuthMethod::Kubernetes | AuthMethod::Jwt => {
            let audience =
                auth.audience.as_ref().map(|name| format!(", audience {name:?}")).unwrap_or_default();
            format!("role {:?} at auth/{} ({}{audience})", auth.role, auth.mount, subject(identity))
        }
    }
}

fn subject(identity: &Identity) -> String {
    match &identity.subject {
        Subject::ServiceAccount { namespace, name, .. } => format!("service account {namespace}/{name}"),
        Subject::Local(place) => place.clone(),
    }
}

fn namespace(identity: &Identity) -> String {
    identity.connection.namespace.as_ref().map(|name| format!(" in namespace {name:?}")).unwrap_or_default()
}
