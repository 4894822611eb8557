//! `sys/`: health, seal, mounts, auth methods, policies.

use std::time::UNIX_EPOCH;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::ask::{Ask, Operation, strings};
use super::auth::Method;
use super::kv::Engine;
use super::policy::{self, Policy};
use super::reply::{Outcome, Refusal, Reply};
use super::state::{State, describe_engine, describe_method};

/// What the store says it is: clients look for a version of the API, and people for the truth.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "+embedded");

/// Most policies.
const MAX_POLICIES: usize = 10_000;

/// What needs no token and is answered while sealed; `None`: not one of these.
pub(super) fn open(state: &mut State, ask: &Ask) -> Option<Outcome> {
    use Operation::{Read, Write};
    match (ask.path.as_str(), ask.operation) {
        ("sys/health", Read) => Some(health(state, ask)),
        ("sys/seal-status", Read) => Some(Reply::bare(StatusCode::OK, &seal_status(state))),
        ("sys/init", Read) => Some(Reply::bare(StatusCode::OK, &json!({ "initialized": true }))),
        ("sys/leader", Read) => Some(Reply::bare(
            StatusCode::OK,
            &json!({
                "ha_enabled": false,
                "is_self": false,
                "active_time": "0001-01-01T00:00:00Z",
                "leader_address": "",
                "leader_cluster_address": "",
                "performance_standby": false,
                "performance_standby_last_remote_wal": 0,
            }),
        )),
        ("sys/unseal", Write) => Some(unseal(state, ask)),
        _ => None,
    }
}

/// What a token may ask of itself and the mounts it reaches, whatever its policies say; `None`: not one of these.
pub(super) fn own(state: &State, ask: &Ask, policies: &[&Policy]) -> Option<Outcome> {
    let path = ask.path.strip_prefix("sys/internal/ui/mounts")?;
    if ask.operation != Operation::Read {
        return None;
    }
    let Some(path) = path.strip_prefix('/').filter(|path| !path.is_empty()) else {
        return Some(visible_mounts(state, policies));
    };
    Some(match state.engines.find(path) {
        Some((mount, ..)) if policy::reaches(policies, mount) => mount_of(state, path),
        _ => Err(no_preflight(path)),
    })
}

/// `sys/internal/ui/mounts`: the mounts that some policy reaches.
pub(super) fn visible_mounts(state: &State, policies: &[&Policy]) -> Outcome {
    let seen = |mount: &str| policy::reaches(policies, mount);
    let engines = state.engines.describe(seen, |mount| describe_engine(mount, true));
    let methods =
        state.methods.describe(|mount| seen(&format!("auth/{mount}")), |mount| describe_method(mount, true));
    Reply::data("", json!({ "auth": methods, "secret": engines }))
}

/// Everything else below `sys/`, for a caller whose policies were checked.
pub(super) fn answer(state: &mut State, ask: &Ask, path: &str) -> Outcome {
    use Operation::{Delete, List, Read, Write};
    let (head, rest) = path.split_once('/').unwrap_or((path, ""));
    match (head, rest, ask.operation) {
        ("seal", "", Write) => {
            state.sealed = true;
            Reply::no_content()
        }
        ("mounts", "", Read) => {
            Reply::flat(state.engines.describe(|_| true, |mount| describe_engine(mount, false)))
        }
        ("mounts", path, Write) => enable_engine(state, ask, path),
        ("mounts", path, Read) => match state.engines.find(path) {
            Some((_, mount, "")) => described(describe_engine(mount, false)),
            _ => Err(Refusal::bad("No secret engine mount at ".to_owned() + path + "/")),
        },
        ("mounts", path, Delete) => {
            state.engines.disable(path);
            Reply::no_content()
        }
        ("auth", "", Read) => {
            Reply::flat(state.methods.describe(|_| true, |mount| describe_method(mount, false)))
        }
        ("auth", path, Write) => enable_method(state, ask, path),
        ("auth", path, Read) => match state.methods.find(path) {
            Some((_, mount, "")) => described(describe_method(mount, false)),
            _ => Err(Refusal::bad("No auth engine at ".to_owned() + path + "/")),
        },
        ("auth", "token", Delete) => Err(Refusal::bad("token credential backend cannot be disabled")),
        ("auth", path, Delete) => {
            state.methods.disable(path);
            Reply::no_content()
        }
        ("internal", "ui/mounts", Read) => {
            let engines = state.engines.describe(|_| true, |mount| describe_engine(mount, true));
            let methods = state.methods.describe(|_| true, |mount| describe_method(mount, true));
            Reply::data("", json!({ "auth": methods, "secret": engines }))
        }
        ("internal", path, Read) if path.starts_with("ui/mounts/") => {
            mount_of(state, path.trim_start_matches("ui/mounts/"))
        }
        ("internal", "ui/resultant-acl", Read) => {
            Reply::data("system", json!({ "root": true, "chroot_namespace": "" }))
        }
        ("capabilities-self", "", Write) => capabilities(state, ask),
        ("policies", path, _) => match path.strip_prefix("acl").map(|name| name.trim_start_matches('/')) {
            Some(name) => policies(state, ask, name, "policy"),
            None => Err(Refusal::unsupported_path()),
        },
        ("policy", name, Read | List | Write | Delete) => policies(state, ask, name, "rules"),
        ("health" | "seal-status" | "leader" | "seal" | "unseal" | "mounts" | "auth" | "internal", ..) => {
            Err(Refusal::unsupported_operation())
        }
        _ => Err(Refusal::unsupported_path()),
    }
}

/// 200, or 503 while sealed; `activecode` and `sealedcode` change the codes, as load balancers ask for.
fn health(state: &State, ask: &Ask) -> Outcome {
    let (parameter, code) = if state.sealed {
        ("sealedcode", StatusCode::SERVICE_UNAVAILABLE)
    } else {
        ("activecode", StatusCode::OK)
    };
    let code = ask.parameter(parameter).and_then(|code| code.parse().ok()).unwrap_or(code);
    let replication = if state.sealed { "unknown" } else { "disabled" };
    let mut body = json!({
        "initialized": true,
        "sealed": state.sealed,
        "standby": state.sealed,
        "performance_standby": false,
        "replication_performance_mode": replication,
        "replication_dr_mode": replication,
        "server_time_utc": ask.now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        "version": VERSION,
        "enterprise": false,
        "echo_duration_ms": 0,
        "clock_skew_ms": 0,
        "replication_primary_canary_age_ms": 0,
    });
    if !state.sealed {
        body["cluster_name"] = "embedded".into();
        body["cluster_id"] = state.cluster_id.as_str().into();
    }
    Reply::bare(code, &body)
}

fn seal_status(state: &State) -> Value {
    let mut body = json!({
        "type": "shamir",
        "initialized": true,
        "sealed": state.sealed,
        "t": 1,
        "n": 1,
        "progress": 0,
        "nonce": "",
        "version": VERSION,
        "build_date": "",
        "migration": false,
        "recovery_seal": false,
        "storage_type": "inmem",
    });
    if !state.sealed {
        body["cluster_name"] = "embedded".into();
        body["cluster_id"] = state.cluster_id.as_str().into();
    }
    body
}

/// Any key unseals: nothing here is encrypted, the seal only stands in the way.
fn unseal(state: &mut State, ask: &Ask) -> Outcome {
    let fields = ask.fields()?;
    if fields.text("key").is_none() {
        let text = "'key' must be specified in request body as JSON, or 'reset' set to true";
        return Err(Refusal::bad(text));
    }
    state.sealed = false;
    Reply::bare(StatusCode::OK, &seal_status(state))
}

fn enable_engine(state: &mut State, ask: &Ask, path: &str) -> Outcome {
    let fields = ask.fields()?;
    let options = fields.raw("options").and_then(|options| options.get("version")).map(super::ask::text);
    let version = match fields.text("type").unwrap_or_default() {
        "kv-v2" => Some("2".to_owned()),
        "kv" | "kv-v1" | "generic" => options,
        kind => return Err(Refusal::bad(format!("plugin not found in the catalog: {kind}"))),
    };
    let description = fields.text("description").unwrap_or_default();
    state.engines.enable(path, "kv", description, Engine::new(version.as_deref())?)?;
    Reply::no_content()
}

fn enable_method(state: &mut State, ask: &Ask, path: &str) -> Outcome {
    let fields = ask.fields()?;
    let kind = fields.text("type").unwrap_or_default();
    let unknown = || Refusal::bad(format!("plugin not found in the catalog: {kind}"));
    let method = Method::new(kind).ok_or_else(unknown)?;
    let description = fields.text("description").unwrap_or_default();
    state.methods.enable(path, &format!("auth_{kind}"), description, method)?;
    Reply::no_content()
}

/// `sys/internal/ui/mounts/<path>`: which mount a path belongs to. This is how clients learn a KV mount's version.
fn mount_of(state: &State, path: &str) -> Outcome {
    let (name, mount, _) = state.engines.find(path).ok_or_else(|| no_preflight(path))?;
    let mut described = describe_engine(mount, true);
    described["path"] = name.into();
    Reply::data("", described)
}

fn no_preflight(path: &str) -> Refusal {
    let path = path.trim_end_matches('/');
    let text = format!(
        "preflight capability check returned 403, please ensure client's policies grant access to path \"{path}/\""
    );
    Refusal::new(StatusCode::FORBIDDEN, text)
}

fn capabilities(state: &State, ask: &Ask) -> Outcome {
    let fields = ask.fields()?;
    let paths = fields.raw("paths").or_else(|| fields.raw("path")).map(strings).unwrap_or_default();
    let caller = ask.token.as_ref().ok_or_else(Refusal::denied)?.expose();
    let holder = state.tokens.holder(caller, ask.now).ok_or_else(Refusal::invalid_token)?;
    let mut data = Map::new();
    for path in paths {
        let granted: Vec<String> = if holder.is_root() {
            vec!["root".into()]
        } else {
            let granted = policy::capabilities(&state.policies_of(&holder.policies), &path);
            if granted.is_empty() { vec!["deny".into()] } else { granted.into_iter().collect() }
        };
        data.insert("capabilities".into(), granted.clone().into());
        data.insert(path, granted.into());
    }
    Reply::flat(data)
}

/// `sys/policies/acl/<name>`, and the older `sys/policy/<name>` whose text is called `rules`.
fn policies(state: &mut State, ask: &Ask, name: &str, text_is: &str) -> Outcome {
    match (name, ask.operation) {
        ("", Operation::List | Operation::Read) => {
            let mut names: Vec<&str> = state.policies.keys().map(String::as_str).chain(["root"]).collect();
            names.sort_unstable();
            let mut data = Map::from_iter([("keys".into(), json!(names))]);
            if text_is == "rules" {
                data.insert("policies".into(), json!(names));
                return Reply::flat(data);
            }
            Reply::data("system", data)
        }
        ("", _) => Err(Refusal::unsupported_operation()),
        (name, Operation::Read) => {
            let policy = state.policies.get(name).ok_or_else(Refusal::missing)?;
            let data = json!({ "name": name, text_is: policy.text });
            if text_is == "rules" { described(data) } else { Reply::data("system", data) }
        }
        ("root", Operation::Write) => Err(Refusal::bad("cannot update \"root\" policy")),
        (name, Operation::Write) => {
            let fields = ask.fields()?;
            let text = fields.text("policy").or_else(|| fields.text("rules"));
            let text = text.ok_or_else(|| Refusal::bad("'policy' parameter not supplied or empty"))?;
            if state.policies.len() >= MAX_POLICIES && !state.policies.contains_key(name) {
                return Err(Refusal::full("policies", MAX_POLICIES));
            }
            state.policies.insert(name.to_owned(), Policy::parse(text).map_err(Refusal::bad)?);
            Reply::no_content()
        }
        ("default" | "root", Operation::Delete) => Err(Refusal::bad(format!("cannot delete {name} policy"))),
        (name, Operation::Delete) => {
            state.policies.remove(name);
            Reply::no_content()
        }
        _ => Err(Refusal::unsupported_operation()),
    }
}

fn described(data: Value) -> Outcome {
    match data {
        Value::Object(data) => Reply::flat(data),
        _ => Err(Refusal::internal("a description is not an object")),
    }
}
