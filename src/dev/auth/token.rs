//! Tokens: what each may do and until when. A renewal prolongs one, never past its maximum.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use crate::dev::ask::{Ask, Operation};
use crate::dev::reply::{AuthBlock, Outcome, Refusal, Reply};
use crate::dev::{clock, random};
use crate::secret::Token;

/// How long a token lives, and may be prolonged, where nobody says: 32 days.
pub(in crate::dev) const SYSTEM_TTL: Duration = Duration::from_secs(32 * 86_400);

/// Most live tokens.
const MAX_TOKENS: usize = 100_000;

/// Every live token.
#[derive(Default)]
pub(in crate::dev) struct Tokens(HashMap<Key, Holder>);

/// Who holds a token.
pub(in crate::dev) struct Holder {
    pub(in crate::dev) policies: Vec<String>,
    accessor: String,
    created: SystemTime,
    /// `None`: never, which only the root token has.
    expires: Option<SystemTime>,
    ttl: Duration,
    max_ttl: Duration,
    explicit_max_ttl: Duration,
    renewable: bool,
    orphan: bool,
    display_name: String,
    path: String,
    metadata: Option<Map<String, Value>>,
}

/// A token that is to be made. Zero durations mean: the system's.
pub(in crate::dev) struct Issue {
    /// `None`: a random one.
    pub(in crate::dev) id: Option<Token>,
    pub(in crate::dev) policies: Vec<String>,
    pub(in crate::dev) default_policy: bool,
    pub(in crate::dev) ttl: Duration,
    pub(in crate::dev) max_ttl: Duration,
    pub(in crate::dev) explicit_max_ttl: Duration,
    pub(in crate::dev) renewable: bool,
    pub(in crate::dev) orphan: bool,
    pub(in crate::dev) display_name: String,
    pub(in crate::dev) path: String,
    pub(in crate::dev) metadata: Option<Map<String, Value>>,
}

impl Default for Issue {
    fn default() -> Self {
        Self {
            id: None,
            policies: Vec::new(),
            default_policy: true,
            ttl: Duration::ZERO,
            max_ttl: Duration::ZERO,
            explicit_max_ttl: Duration::ZERO,
            renewable: true,
            orphan: true,
            display_name: "token".into(),
            path: "auth/token/create".into(),
            metadata: None,
        }
    }
}

impl Holder {
    /// Whether it is a root token, which may do everything.
    pub(in crate::dev) fn is_root(&self) -> bool {
        self.policies.iter().any(|policy| policy == "root")
    }

    fn remaining(&self, now: SystemTime) -> u64 {
        self.expires.map_or(0, |at| at.duration_since(now).unwrap_or_default().as_secs())
    }

    fn block<'a>(&'a self, id: &'a str, lease: u64) -> AuthBlock<'a> {
        AuthBlock {
            client_token: id,
            accessor: &self.accessor,
            policies: &self.policies,
            token_policies: &self.policies,
            metadata: &self.metadata,
            lease_duration: lease,
            renewable: self.renewable,
            entity_id: "",
            token_type: "service",
            orphan: self.orphan,
            mfa_requirement: None,
            num_uses: 0,
        }
    }
}

impl Tokens {
    /// The root token of a new store.
    pub(in crate::dev) fn add_root(&mut self, token: Token, now: SystemTime) {
        let holder = Holder {
            policies: vec!["root".into()],
            accessor: random::name(),
            created: now,
            expires: None,
            ttl: Duration::ZERO,
            max_ttl: Duration::ZERO,
            explicit_max_ttl: Duration::ZERO,
            renewable: false,
            orphan: true,
            display_name: "root".into(),
            path: "auth/token/root".into(),
            metadata: None,
        };
        self.0.insert(Key(token), holder);
    }

    /// Who holds a token; `None`: nobody, or no longer.
    pub(in crate::dev) fn holder(&self, id: &str, now: SystemTime) -> Option<&Holder> {
        self.0.get(id).filter(|holder| holder.expires.is_none_or(|at| now < at))
    }

    /// Makes a token and answers with it.
    pub(in crate::dev) fn issue(&mut self, issue: Issue, mount_type: &str, now: SystemTime) -> Outcome {
        if self.0.len() >= MAX_TOKENS {
            self.0.retain(|_, holder| holder.expires.is_none_or(|at| now < at));
            if self.0.len() >= MAX_TOKENS {
                return Err(Refusal::full("tokens", MAX_TOKENS));
            }
        }
        let mut policies = issue.policies;
        let root = policies.iter().any(|policy| policy == "root");
        if issue.default_policy && !root {
            policies.push("default".into());
        }
        policies.sort();
        policies.dedup();
        let maximum = [issue.explicit_max_ttl, issue.max_ttl]
            .into_iter()
            .filter(|ttl| !ttl.is_zero())
            .min()
            .unwrap_or(SYSTEM_TTL);
        let asked = if issue.ttl.is_zero() { SYSTEM_TTL.min(maximum) } else { issue.ttl };
        let ttl = asked.min(maximum);
        let forever = root && issue.ttl.is_zero();
        let made = random::token().map_err(|error| Refusal::internal(&error.to_string()));
        let token = issue.id.map_or(made, Ok)?;
        let holder = Holder {
            policies,
            accessor: random::name(),
            created: now,
            expires: (!forever).then(|| now + ttl),
            ttl,
            max_ttl: maximum,
            explicit_max_ttl: issue.explicit_max_ttl,
            renewable: issue.renewable && !forever,
            orphan: issue.orphan,
            display_name: issue.display_name,
            path: issue.path,
            metadata: issue.metadata,
        };
        let lease = if forever { 0 } else { ttl.as_secs() };
        let answer = Reply::auth(mount_type, &holder.block(token.expose(), lease), capped(asked, maximum));
        self.0.insert(Key(token), holder);
        answer
    }

    /// Everything below `auth/token/`. `caller` is the token of the request, and known to be good.
    pub(in crate::dev) fn answer(&mut self, ask: &Ask, path: &str, caller: &str) -> Outcome {
        use Operation::{Read, Write};
        match (path, ask.operation) {
            ("lookup-self", Read | Write) => self.lookup(caller, ask.now),
            ("renew-self", Write) => self.renew(caller, ask),
            ("revoke-self", Write) => {
                self.0.remove(caller);
                Reply::no_content()
            }
            ("create" | "create-orphan", Write) => self.create(ask, path, caller),
            ("lookup" | "renew" | "revoke", Write) => {
                let fields = ask.fields()?;
                let id = fields.text("token").ok_or_else(|| Refusal::bad("missing token ID"))?;
                match path {
                    "lookup" if self.holder(id, ask.now).is_none() => {
                        Err(Refusal::new(axum::http::StatusCode::FORBIDDEN, "bad token"))
                    }
                    "lookup" => self.lookup(id, ask.now),
                    "renew" => self.renew(id, ask),
                    _ => {
                        self.0.remove(id);
                        Reply::no_content()
                    }
                }
            }
            ("lookup-self" | "renew-self" | "revoke-self" | "create" | "lookup" | "renew" | "revoke", _) => {
                Err(Refusal::unsupported_operation())
            }
            _ => Err(Refusal::unsupported_path()),
        }
    }

    fn create(&mut self, ask: &Ask, path: &str, caller: &str) -> Outcome {
        let fields = ask.fields()?;
        let parent = self.holder(caller, ask.now).ok_or_else(Refusal::invalid_token)?;
        let policies = fields.list("policies").unwrap_or_else(|| parent.policies.clone());
        if !parent.is_root() && !policies.iter().all(|policy| parent.policies.contains(policy)) {
            return Err(Refusal::bad("child policies must be subset of parent"));
        }
        let id = fields.text("id").map(|id| Token::new(id.to_owned())).transpose();
        let issue = Issue {
            id: id.map_err(|error| Refusal::bad(error.to_string()))?,
            policies,
            default_policy: !fields.flag("no_default_policy")?.unwrap_or(false),
            ttl: fields.duration("ttl")?.unwrap_or_default(),
            explicit_max_ttl: fields.duration("explicit_max_ttl")?.unwrap_or_default(),
            renewable: fields.flag("renewable")?.unwrap_or(true),
            orphan: path == "create-orphan" || fields.flag("no_parent")?.unwrap_or(false),
            ..Issue::default()
        };
        self.issue(issue, "token", ask.now)
    }

    fn renew(&mut self, id: &str, ask: &Ask) -> Outcome {
        let increment = ask.fields()?.duration("increment")?;
        if self.holder(id, ask.now).is_none() {
            return Err(Refusal::bad("token not found"));
        }
        let holder = self.0.get_mut(id).filter(|holder| holder.renewable);
        let holder = holder.ok_or_else(|| Refusal::bad("lease is not renewable"))?;
        let asked = increment.filter(|increment| !increment.is_zero()).unwrap_or(holder.ttl);
        let left = (holder.created + holder.max_ttl).duration_since(ask.now).unwrap_or_default();
        let granted = asked.min(left);
        holder.expires = Some(ask.now + granted);
        Reply::auth("token", &holder.block(id, granted.as_secs()), capped(asked, left))
    }

    fn lookup(&self, id: &str, now: SystemTime) -> Outcome {
        let holder = self.holder(id, now).ok_or_else(Refusal::invalid_token)?;
        let creation_ttl = if holder.expires.is_some() { holder.ttl.as_secs() } else { 0 };
        Reply::data(
            "token",
            json!({
                "accessor": holder.accessor,
                "creation_time": clock::seconds(holder.created),
                "creation_ttl": creation_ttl,
                "display_name": holder.display_name,
                "entity_id": "",
                "expire_time": holder.expires.map(clock::rfc3339),
                "explicit_max_ttl": holder.explicit_max_ttl.as_secs(),
                "id": id,
                "issue_time": clock::rfc3339(holder.created),
                "meta": holder.metadata,
                "num_uses": 0,
                "orphan": holder.orphan,
                "path": holder.path,
                "policies": holder.policies,
                "renewable": holder.renewable,
                "ttl": holder.remaining(now),
                "type": "service",
            }),
        )
    }
}

fn capped(asked: Duration, maximum: Duration) -> Option<Vec<String>> {
    let text = || {
        let (asked, maximum) = (clock::go(asked), clock::go(maximum));
        format!(
            "TTL of \"{asked}\" exceeded the effective max_ttl of \"{maximum}\"; TTL value is capped accordingly"
        )
    };
    (asked > maximum).then(|| vec![text()])
}

/// A token as a table's key.
struct Key(Token);

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        self.0.expose()
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.expose().hash(state);
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0.expose() == other.0.expose()
    }
}

impl Eq for Key {}
