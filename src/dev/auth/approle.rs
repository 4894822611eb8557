//! AppRole: a role id, and a secret id unless the role binds none.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::token::Issue;
use super::{Grant, MAX_ROLES, list_roles};
use crate::dev::ask::{Ask, Fields, Operation};
use crate::dev::random;
use crate::dev::reply::{Outcome, Refusal, Reply};
use crate::secret::Token;

/// Most secret ids of one role.
const MAX_SECRET_IDS: usize = 1_000;

/// One mount's roles.
#[derive(Default)]
pub(in crate::dev) struct AppRole {
    roles: BTreeMap<String, Role>,
}

struct Role {
    role_id: String,
    bind_secret_id: bool,
    secret_id_ttl: Duration,
    secret_ids: Vec<SecretId>,
    grant: Grant,
}

struct SecretId {
    id: Token,
    /// `None`: never.
    expires: Option<SystemTime>,
}

impl AppRole {
    /// Checks role id and secret id.
    pub(in crate::dev) fn login(&self, fields: &Fields, now: SystemTime) -> Result<Issue, Refusal> {
        let invalid = || Refusal::bad("invalid role or secret ID");
        let role_id = fields.text("role_id").ok_or_else(|| Refusal::bad("missing role_id"))?;
        let found = self.roles.iter().find(|(_, role)| role.role_id == role_id);
        let (name, role) = found.ok_or_else(invalid)?;
        if role.bind_secret_id {
            let given = fields.text("secret_id").ok_or_else(|| Refusal::bad("missing secret_id"))?;
            let live = |known: &&SecretId| known.expires.is_none_or(|at| now < at);
            let mut known = role.secret_ids.iter().filter(live);
            known.find(|known| known.id.expose() == given).ok_or_else(invalid)?;
        }
        Ok(role.grant.issue("approle".into(), json!({ "role_name": name })))
    }

    /// `role`, `role/<name>`, `role/<name>/{role-id,secret-id,custom-secret-id}`.
    pub(in crate::dev) fn configure(&mut self, ask: &Ask, path: &str) -> Outcome {
        use Operation::{Delete, List, Read, Write};
        let mut parts = path.trim_end_matches('/').splitn(3, '/');
        if parts.next() != Some("role") {
            return Err(Refusal::unsupported_path());
        }
        match (parts.next(), parts.next(), ask.operation) {
            (None, None, List) => list_roles("approle", &self.roles),
            (Some(name), None, Write) => self.write(name, &ask.fields()?),
            (Some(name), None, Delete) => {
                self.roles.remove(name);
                Reply::no_content()
            }
            (Some(name), part, operation) => {
                let role = self.roles.get_mut(name).ok_or_else(Refusal::missing)?;
                match (part, operation) {
                    (None, Read) => Reply::data("approle", role.describe()),
                    (Some("role-id"), Read) => Reply::data("approle", json!({ "role_id": role.role_id })),
                    (Some("role-id"), Write) => {
                        let fields = ask.fields()?;
                        let id = fields.text("role_id").ok_or_else(|| Refusal::bad("missing role_id"))?;
                        id.clone_into(&mut role.role_id);
                        Reply::no_content()
                    }
                    (Some("secret-id"), Write) => role.add_secret_id(random::uuid(), ask.now),
                    (Some("custom-secret-id"), Write) => {
                        let fields = ask.fields()?;
                        let id = fields.text("secret_id").ok_or_else(|| Refusal::bad("missing secret_id"))?;
                        role.add_secret_id(id.to_owned(), ask.now)
                    }
                    (None | Some("role-id" | "secret-id" | "custom-secret-id"), _) => {
                        Err(Refusal::unsupported_operation())
                    }
                    _ => Err(Refusal::unsupported_path()),
                }
            }
            _ => Err(Refusal::unsupported_operation()),
        }
    }

    fn write(&mut self, name: &str, fields: &Fields) -> Outcome {
        if self.roles.len() >= MAX_ROLES && !self.roles.contains_key(name) {
            return Err(Refusal::full("roles", MAX_ROLES));
        }
        // Whatever the fields have wrong is found before the role is touched.
        let mut grant = self.roles.get(name).map(|role| role.grant.clone()).unwrap_or_default();
        grant.update(fields)?;
        let bind_secret_id = fields.flag("bind_secret_id")?;
        let secret_id_ttl = fields.duration("secret_id_ttl")?;
        let role = self.roles.entry(name.to_owned()).or_insert_with(|| Role {
            role_id: random::uuid(),
            bind_secret_id: true,
            secret_id_ttl: Duration::ZERO,
            secret_ids: Vec::new(),
            grant: Grant::default(),
        });
        role.bind_secret_id = bind_secret_id.unwrap_or(role.bind_secret_id);
        role.secret_id_ttl = secret_id_ttl.unwrap_or(role.secret_id_ttl);
        if let Some(id) = fields.text("role_id") {
            id.clone_into(&mut role.role_id);
        }
        role.grant = grant;
        Reply::no_content()
    }
}

impl Role {
    fn add_secret_id(&mut self, id: String, now: SystemTime) -> Outcome {
        self.secret_ids.retain(|known| known.expires.is_none_or(|at| now < at));
        if self.secret_ids.len() >= MAX_SECRET_IDS {
            return Err(Refusal::full("secret ids of a role", MAX_SECRET_IDS));
        }
        let id = Token::new(id).map_err(|error| Refusal::bad(error.to_string()))?;
        let answer = Reply::data(
            "approle",
            json!({
                "secret_id": id.expose(),
                "secret_id_accessor": random::uuid(),
                "secret_id_num_uses": 0,
                "secret_id_ttl": self.secret_id_ttl.as_secs(),
            }),
        );
        let expires = (!self.secret_id_ttl.is_zero()).then(|| now + self.secret_id_ttl);
        self.secret_ids.push(SecretId { id, expires });
        answer
    }

    fn describe(&self) -> serde_json::Map<String, Value> {
        let mut described = self.grant.describe();
        described.extend([
            ("bind_secret_id".into(), self.bind_secret_id.into()),
            ("local_secret_ids".into(), false.into()),
            ("secret_id_bound_cidrs".into(), Value::Null),
            ("secret_id_num_uses".into(), 0.into()),
            ("secret_id_ttl".into(), self.secret_id_ttl.as_secs().into()),
        ]);
        described
    }
}
