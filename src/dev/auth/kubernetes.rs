//! The kubernetes method with `pem_keys`. The real server also asks the cluster whether the token is still good; this one
//! has only the keys.

use std::collections::BTreeMap;
use std::time::SystemTime;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::token::Issue;
use super::verify::{Claims, Keys};
use super::{Grant, MAX_ROLES, list_roles};
use crate::dev::ask::{Ask, Fields, Operation};
use crate::dev::reply::{Outcome, Refusal, Reply};

/// One mount's keys and roles.
#[derive(Default)]
pub(in crate::dev) struct Kubernetes {
    config: Option<Config>,
    roles: BTreeMap<String, Role>,
}

struct Config {
    host: String,
    keys: Keys,
}

#[derive(Clone, Default)]
struct Role {
    names: Vec<String>,
    namespaces: Vec<String>,
    audience: String,
    grant: Grant,
}

/// Whose token it is.
struct Account<'a> {
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
}

impl Kubernetes {
    /// Checks a service account's token against the keys and a role.
    pub(in crate::dev) fn login(&self, fields: &Fields, now: SystemTime) -> Result<Issue, Refusal> {
        let name = fields.text("role").ok_or_else(|| Refusal::bad("missing role"))?;
        let token = fields.text("jwt").ok_or_else(|| Refusal::bad("missing jwt"))?;
        let missing = || Refusal::bad(format!("invalid role name \"{name}\""));
        let role = self.roles.get(name).ok_or_else(missing)?;
        let config = self.config.as_ref();
        let config = config.ok_or_else(|| Refusal::internal("could not load backend configuration"))?;
        let denied = |why: &str| Refusal::new(StatusCode::FORBIDDEN, why);
        let claims = config.keys.verify(token).ok_or_else(Refusal::denied)?;
        claims.check_time(now).map_err(denied)?;
        if !role.audience.is_empty() {
            claims.check_audience(std::slice::from_ref(&role.audience)).map_err(denied)?;
        }
        let account = Account::of(&claims).ok_or_else(Refusal::denied)?;
        if !any(&role.names, account.name) {
            return Err(denied("service account name not authorized"));
        }
        if !any(&role.namespaces, account.namespace) {
            return Err(denied("namespace not authorized"));
        }
        let metadata = json!({
            "role": name,
            "service_account_name": account.name,
            "service_account_namespace": account.namespace,
            "service_account_secret_name": "",
            "service_account_uid": account.uid,
        });
        Ok(role.grant.issue(format!("kubernetes-{}-{}", account.namespace, account.name), metadata))
    }

    /// `config`, `role`, `role/<name>`.
    pub(in crate::dev) fn configure(&mut self, ask: &Ask, path: &str) -> Outcome {
        use Operation::{Delete, List, Read, Write};
        match (path.trim_end_matches('/'), ask.operation) {
            ("config", Read) => {
                let config = self.config.as_ref().ok_or_else(Refusal::missing)?;
                Reply::data("kubernetes", config.describe())
            }
            ("config", Write) => {
                self.config = Some(Config::parse(&ask.fields()?)?);
                Reply::no_content()
            }
            ("role", List) => list_roles("kubernetes", &self.roles),
            (path, operation) => {
                let name = path.strip_prefix("role/").ok_or_else(Refusal::unsupported_path)?;
                match operation {
                    Read => {
                        let role = self.roles.get(name).ok_or_else(Refusal::missing)?;
                        Reply::data("kubernetes", role.describe())
                    }
                    Write => self.write(name, &ask.fields()?),
                    Delete => {
                        self.roles.remove(name);
                        Reply::no_content()
                    }
                    _ => Err(Refusal::unsupported_operation()),
                }
            }
        }
    }

    fn write(&mut self, name: &str, fields: &Fields) -> Outcome {
        if self.roles.len() >= MAX_ROLES && !self.roles.contains_key(name) {
            return Err(Refusal::full("roles", MAX_ROLES));
        }
        let mut role = self.roles.get(name).cloned().unwrap_or_default();
        role.update(fields)?;
        let warning = role.audience.is_empty().then(|| {
            format!(
                "Role {name} does not have an audience configured. While audiences are not required, consider \
                 specifying one if your use case would benefit from additional JWT claim verification."
            )
        });
        self.roles.insert(name.to_owned(), role);
        match warning {
            None => Reply::no_content(),
            Some(warning) => Reply::warning(StatusCode::OK, "kubernetes", warning),
        }
    }
}

impl<'a> Account<'a> {
    /// From the claims of a projected token, or of an old one that lives in a Secret.
    fn of(claims: &'a Claims) -> Option<Self> {
        let mut parts = claims.text("sub")?.strip_prefix("system:serviceaccount:")?.splitn(2, ':');
        let (namespace, name) = (parts.next()?, parts.next()?);
        let uid = claims
            .text("/kubernetes.io/serviceaccount/uid")
            .or_else(|| claims.text("kubernetes.io/serviceaccount/service-account.uid"))?;
        Some(Self { namespace, name, uid })
    }
}

impl Config {
    fn parse(fields: &Fields) -> Result<Self, Refusal> {
        let host = fields.text("kubernetes_host").ok_or_else(|| Refusal::bad("no host provided"))?;
        let keys = fields.list("pem_keys").unwrap_or_default();
        Ok(Self { host: host.to_owned(), keys: Keys::parse(keys).map_err(Refusal::bad)? })
    }

    fn describe(&self) -> Value {
        json!({
            "disable_iss_validation": true,
            "disable_local_ca_jwt": true,
            "issuer": "",
            "kubernetes_ca_cert": "",
            "kubernetes_host": self.host,
            "pem_keys": self.keys.pem,
            "token_reviewer_jwt_set": false,
            "use_annotations_as_alias_metadata": false,
        })
    }
}

impl Role {
    fn update(&mut self, fields: &Fields) -> Result<(), Refusal> {
        if let Some(names) = fields.list("bound_service_account_names") {
            self.names = names;
        }
        if let Some(namespaces) = fields.list("bound_service_account_namespaces") {
            self.namespaces = namespaces;
        }
        if let Some(audience) = fields.text("audience") {
            audience.clone_into(&mut self.audience);
        }
        self.grant.update(fields)?;
        if self.names.is_empty() {
            return Err(Refusal::bad("\"bound_service_account_names\" can not be empty"));
        }
        if self.namespaces.is_empty() {
            return Err(Refusal::bad(
                "\"bound_service_account_namespaces\" can not be empty if \
                 \"bound_service_account_namespace_selector\" is not set",
            ));
        }
        Ok(())
    }

    fn describe(&self) -> Map<String, Value> {
        let mut described = self.grant.describe();
        described.extend([
            ("alias_name_source".into(), "serviceaccount_uid".into()),
            ("audience".into(), self.audience.clone().into()),
            ("bound_service_account_names".into(), self.names.clone().into()),
            ("bound_service_account_namespace_selector".into(), "".into()),
            ("bound_service_account_namespaces".into(), self.namespaces.clone().into()),
        ]);
        described
    }
}

/// Whether a bound list names `text`; `*` at the end of an entry stands for anything.
fn any(bound: &[String], text: &str) -> bool {
    bound.iter().any(|entry| match entry.strip_suffix('*') {
        Some(prefix) => text.starts_with(prefix),
        None => entry == text,
    })
}
