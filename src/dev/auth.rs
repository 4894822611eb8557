//! Who may: tokens, and the methods that trade something for one. All methods answer `auth/<mount>/login`; their roles
//! share what they say of the token ([`Grant`]).

pub(super) mod approle;
pub(super) mod jwt;
pub(super) mod kubernetes;
pub(super) mod token;
mod verify;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::ask::{Ask, Fields};
use super::reply::{Outcome, Refusal, Reply};
use token::{Issue, Tokens};

/// Most roles of one mount.
const MAX_ROLES: usize = 10_000;

/// What is mounted below `auth/`.
pub(super) enum Method {
    /// `auth/token`: always there.
    Token,
    /// Role id and secret id.
    AppRole(approle::AppRole),
    /// A JWT of anybody whose key is known.
    Jwt(jwt::Jwt),
    /// A service account's JWT.
    Kubernetes(kubernetes::Kubernetes),
}

impl Method {
    /// An empty one of a type; `None`: there is no such type here.
    pub(super) fn new(kind: &str) -> Option<Self> {
        match kind {
            "approle" => Some(Self::AppRole(approle::AppRole::default())),
            "jwt" => Some(Self::Jwt(jwt::Jwt::default())),
            "kubernetes" => Some(Self::Kubernetes(kubernetes::Kubernetes::default())),
            _ => None,
        }
    }

    /// The type's name.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::AppRole(_) => "approle",
            Self::Jwt(_) => "jwt",
            Self::Kubernetes(_) => "kubernetes",
        }
    }

    /// Trades what the body holds for a token. `mount` is its path, such as `kubernetes/`.
    pub(super) fn login(&mut self, ask: &Ask, mount: &str, tokens: &mut Tokens) -> Outcome {
        let fields = ask.fields()?;
        let issue = match self {
            Self::Token => return Err(Refusal::unsupported_path()),
            Self::AppRole(approle) => approle.login(&fields, ask.now)?,
            Self::Jwt(jwt) => jwt.login(&fields, ask.now)?,
            Self::Kubernetes(kubernetes) => kubernetes.login(&fields, ask.now)?,
        };
        let path = format!("auth/{mount}login");
        tokens.issue(Issue { path, ..issue }, "", ask.now)
    }

    /// Configuration and roles: everything but `login` and `auth/token`.
    pub(super) fn configure(&mut self, ask: &Ask, path: &str) -> Outcome {
        match self {
            Self::Token => Err(Refusal::unsupported_path()),
            Self::AppRole(approle) => approle.configure(ask, path),
            Self::Jwt(jwt) => jwt.configure(ask, path),
            Self::Kubernetes(kubernetes) => kubernetes.configure(ask, path),
        }
    }
}

/// What a role says of the tokens it gives. Zero durations mean: the system's.
#[derive(Clone, Default)]
struct Grant {
    policies: Vec<String>,
    ttl: Duration,
    max_ttl: Duration,
    no_default_policy: bool,
}

impl Grant {
    /// Takes over what the fields name and leaves the rest as it is.
    fn update(&mut self, fields: &Fields) -> Result<(), Refusal> {
        if let Some(policies) = fields.list("token_policies").or_else(|| fields.list("policies")) {
            self.policies = policies;
        }
        self.ttl = fields.duration("token_ttl")?.or(fields.duration("ttl")?).unwrap_or(self.ttl);
        self.max_ttl =
            fields.duration("token_max_ttl")?.or(fields.duration("max_ttl")?).unwrap_or(self.max_ttl);
        self.no_default_policy = fields.flag("token_no_default_policy")?.unwrap_or(self.no_default_policy);
        if !self.max_ttl.is_zero() && self.ttl > self.max_ttl {
            return Err(Refusal::bad("'token_ttl' cannot be greater than 'token_max_ttl'"));
        }
        Ok(())
    }

    /// As part of a role's description.
    fn describe(&self) -> Map<String, Value> {
        let described = json!({
            "token_bound_cidrs": [],
            "token_explicit_max_ttl": 0,
            "token_max_ttl": self.max_ttl.as_secs(),
            "token_no_default_policy": self.no_default_policy,
            "token_num_uses": 0,
            "token_period": 0,
            "token_policies": self.policies,
            "token_ttl": self.ttl.as_secs(),
            "token_type": "default",
        });
        if let Value::Object(map) = described { map } else { Map::new() }
    }

    fn issue(&self, display_name: String, metadata: Value) -> Issue {
        Issue {
            policies: self.policies.clone(),
            default_policy: !self.no_default_policy,
            ttl: self.ttl,
            max_ttl: self.max_ttl,
            display_name,
            metadata: metadata.as_object().cloned(),
            ..Issue::default()
        }
    }
}

/// The answer to LIST of roles.
fn list_roles<R>(mount_type: &str, roles: &BTreeMap<String, R>) -> Outcome {
    if roles.is_empty() {
        return Err(Refusal::missing());
    }
    Reply::data(mount_type, json!({ "keys": roles.keys().collect::<Vec<_>>() }))
}
