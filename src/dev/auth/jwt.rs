//! The jwt method with `jwt_validation_pubkeys`.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::token::Issue;
use super::verify::{Claims, Keys};
use super::{Grant, MAX_ROLES, list_roles};
use crate::dev::ask::{Ask, Fields, Operation, strings, text};
use crate::dev::reply::{Outcome, Refusal, Reply};

/// One mount's keys and roles.
#[derive(Default)]
pub(in crate::dev) struct Jwt {
    config: Option<Config>,
    roles: BTreeMap<String, Role>,
}

struct Config {
    keys: Keys,
    bound_issuer: String,
    default_role: String,
}

#[derive(Clone, Default)]
struct Role {
    user_claim: String,
    bound_audiences: Vec<String>,
    bound_subject: String,
    bound_claims: Map<String, Value>,
    grant: Grant,
}

impl Jwt {
    /// Checks a JWT against the keys and a role.
    pub(in crate::dev) fn login(&self, fields: &Fields, now: SystemTime) -> Result<Issue, Refusal> {
        let Some(config) = &self.config else { return Err(Refusal::bad("could not load configuration")) };
        let default = Some(config.default_role.as_str()).filter(|role| !role.is_empty());
        let name = fields.text("role").or(default).ok_or_else(|| Refusal::bad("missing role"))?;
        let missing = || Refusal::bad(format!("role \"{name}\" could not be found"));
        let role = self.roles.get(name).ok_or_else(missing)?;
        let token = fields.text("jwt").ok_or_else(|| Refusal::bad("missing token"))?;
        let invalid = |why: &str| Refusal::bad(format!("error validating token: {why}"));
        let claims = config.keys.verify(token).ok_or_else(|| {
            invalid(
                "error verifying token signature: no known key successfully validated the token signature",
            )
        })?;
        claims.check_time(now).map_err(invalid)?;
        if !config.bound_issuer.is_empty() && claims.text("iss") != Some(&config.bound_issuer) {
            return Err(invalid("invalid issuer (iss) claim"));
        }
        if !role.bound_subject.is_empty() && claims.text("sub") != Some(&role.bound_subject) {
            return Err(invalid("invalid subject (sub) claim"));
        }
        role.check_audience(&claims)?;
        let user = claims.value(&role.user_claim).map(text);
        let user =
            user.ok_or_else(|| Refusal::bad(format!("claim \"{}\" not found in token", role.user_claim)))?;
        role.check_claims(&claims)?;
        Ok(role.grant.issue(format!("jwt-{user}"), json!({ "role": name })))
    }

    /// `config`, `role`, `role/<name>`.
    pub(in crate::dev) fn configure(&mut self, ask: &Ask, path: &str) -> Outcome {
        use Operation::{Delete, List, Read, Write};
        match (path.trim_end_matches('/'), ask.operation) {
            ("config", Read) => {
                let config = self.config.as_ref().ok_or_else(Refusal::missing)?;
                Reply::data("jwt", config.describe())
            }
            ("config", Write) => {
                self.config = Some(Config::parse(&ask.fields()?)?);
                Reply::no_content()
            }
            ("role", List) => list_roles("jwt", &self.roles),
            (path, operation) => {
                let name = path.strip_prefix("role/").ok_or_else(Refusal::unsupported_path)?;
                match operation {
                    Read => Reply::data("jwt", self.roles.get(name).ok_or_else(Refusal::missing)?.describe()),
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
        if fields.text("role_type").is_some_and(|kind| kind != "jwt") {
            return Err(Refusal::bad("the embedded store has roles of type jwt only"));
        }
        let mut role = self.roles.get(name).cloned().unwrap_or_default();
        role.update(fields)?;
        self.roles.insert(name.to_owned(), role);
        Reply::no_content()
    }
}

impl Config {
    fn parse(fields: &Fields) -> Result<Self, Refusal> {
        let pem = match fields.raw("jwt_validation_pubkeys") {
            // A key's own text has no comma, but several in one text are cut at commas.
            Some(keys) => strings(keys),
            None => {
                return Err(Refusal::bad(
                    "the embedded store fetches no keys: 'jwt_validation_pubkeys' must be set",
                ));
            }
        };
        let broken = |why| Refusal::bad(format!("error parsing public key: {why}"));
        Ok(Self {
            keys: Keys::parse(pem).map_err(broken)?,
            bound_issuer: fields.text("bound_issuer").unwrap_or_default().to_owned(),
            default_role: fields.text("default_role").unwrap_or_default().to_owned(),
        })
    }

    fn describe(&self) -> Value {
        json!({
            "bound_issuer": self.bound_issuer,
            "default_role": self.default_role,
            "jwks_ca_pem": "",
            "jwks_pairs": [],
            "jwks_url": "",
            "jwt_supported_algs": [],
            "jwt_validation_pubkeys": self.keys.pem,
            "oidc_client_id": "",
            "oidc_discovery_ca_pem": "",
            "oidc_discovery_url": "",
        })
    }
}

impl Role {
    fn update(&mut self, fields: &Fields) -> Result<(), Refusal> {
        if let Some(claim) = fields.text("user_claim") {
            claim.clone_into(&mut self.user_claim);
        }
        if let Some(audiences) = fields.list("bound_audiences") {
            self.bound_audiences = audiences;
        }
        if let Some(subject) = fields.text("bound_subject") {
            subject.clone_into(&mut self.bound_subject);
        }
        if let Some(claims) = fields.raw("bound_claims") {
            let claims = claims.as_object().ok_or_else(|| Refusal::bad("bound_claims must be a map"))?;
            self.bound_claims = claims.clone();
        }
        self.grant.update(fields)?;
        if self.user_claim.is_empty() {
            return Err(Refusal::bad("a user claim must be defined on the role"));
        }
        if self.bound_audiences.is_empty() && self.bound_subject.is_empty() && self.bound_claims.is_empty() {
            return Err(Refusal::bad(
                "must have at least one bound constraint when creating/updating a role",
            ));
        }
        Ok(())
    }

    fn check_audience(&self, claims: &Claims) -> Result<(), Refusal> {
        if !self.bound_audiences.is_empty() {
            let invalid = |why| Refusal::bad(format!("error validating token: {why}"));
            claims.check_audience(&self.bound_audiences).map_err(invalid)?;
        } else if !claims.values("aud").is_empty() {
            return Err(Refusal::bad("audience claim found in JWT but no audiences bound to the role"));
        }
        Ok(())
    }

    fn check_claims(&self, claims: &Claims) -> Result<(), Refusal> {
        for (name, bound) in &self.bound_claims {
            let found = claims.values(name);
            if found.is_empty() {
                return Err(Refusal::bad(format!(
                    "error validating claims: claim \"{name}\" is missing from the token"
                )));
            }
            let bound = match bound {
                Value::Array(values) => values.iter().map(text).collect(),
                value => vec![text(value)],
            };
            if !found.iter().any(|value| bound.contains(value)) {
                return Err(Refusal::bad(format!(
                    "error validating claims: claim \"{name}\" does not match any associated bound claim values"
                )));
            }
        }
        Ok(())
    }

    fn describe(&self) -> Map<String, Value> {
        let mut described = self.grant.describe();
        described.extend([
            ("bound_audiences".into(), self.bound_audiences.clone().into()),
            ("bound_claims".into(), self.bound_claims.clone().into()),
            ("bound_claims_type".into(), "string".into()),
            ("bound_subject".into(), self.bound_subject.clone().into()),
            ("role_type".into(), "jwt".into()),
            ("user_claim".into(), self.user_claim.clone().into()),
        ]);
        described
    }
}
