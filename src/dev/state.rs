//! All that the store holds, and the way of a request through it: what needs no token, the seal, who asks, what they may,
//! and then the mount that has the path.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::ask::{Ask, Operation};
use super::auth::Method;
use super::auth::token::Tokens;
use super::kv::Engine;
use super::mount::{Mount, Table};
use super::policy::{self, Policy};
use super::reply::{Outcome, Refusal};
use super::{random, sys};

/// Everything, behind one lock: a request is atomic, and none takes long.
pub(super) struct State {
    pub(super) sealed: bool,
    pub(super) cluster_id: String,
    pub(super) engines: Table<Engine>,
    pub(super) methods: Table<Method>,
    pub(super) policies: BTreeMap<String, Policy>,
    pub(super) tokens: Tokens,
}

impl State {
    /// As a new server is: `secret/` of version 2, `kv/` of version 1, the method `token/`, the default policy.
    pub(super) fn new() -> Result<Self, Refusal> {
        let mut engines = Table::default();
        engines.enable("secret", "kv", "key/value secret storage", Engine::new(Some("2"))?)?;
        engines.enable("kv", "kv", "key/value secret storage", Engine::new(Some("1"))?)?;
        let mut methods = Table::default();
        methods.enable("token", "auth_token", "token based credentials", Method::Token)?;
        let default = Policy::parse(policy::DEFAULT).map_err(|error| Refusal::internal(&error))?;
        Ok(Self {
            sealed: false,
            cluster_id: random::uuid(),
            engines,
            methods,
            policies: BTreeMap::from([("default".into(), default)]),
            tokens: Tokens::default(),
        })
    }

    /// Answers one request.
    pub(super) fn answer(&mut self, ask: &Ask) -> Outcome {
        if let Some(answer) = sys::open(self, ask) {
            return answer;
        }
        if self.sealed {
            return Err(Refusal::new(axum::http::StatusCode::SERVICE_UNAVAILABLE, "Vault is sealed"));
        }
        if let Some(path) = ask.path.strip_prefix("auth/")
            && ask.operation == Operation::Write
            && let Some((mount, method, "login")) = self.methods.find_mut(path)
        {
            return method.login(ask, mount, &mut self.tokens);
        }
        if ask.token.is_none() && ask.path == "sys/internal/ui/mounts" {
            return sys::visible_mounts(self, &[]);
        }
        let caller = ask.token.as_ref().ok_or_else(Refusal::denied)?.expose();
        let holder = self.tokens.holder(caller, ask.now).ok_or_else(Refusal::invalid_token)?;
        if !holder.is_root() {
            let policies = self.policies_of(&holder.policies);
            if let Some(answer) = sys::own(self, ask, &policies) {
                return answer;
            }
            if !policy::allows(&policies, ask.operation, &ask.path) {
                return Err(Refusal::forbidden());
            }
        }
        self.route(ask, caller)
    }

    /// The policies of these names that exist.
    pub(super) fn policies_of(&self, names: &[String]) -> Vec<&Policy> {
        names.iter().filter_map(|name| self.policies.get(name)).collect()
    }

    fn route(&mut self, ask: &Ask, caller: &str) -> Outcome {
        if let Some(path) = ask.path.strip_prefix("sys/") {
            return sys::answer(self, ask, path.trim_end_matches('/'));
        }
        if let Some(path) = ask.path.strip_prefix("auth/") {
            return match self.methods.find_mut(path) {
                Some((_, Method::Token, path)) => self.tokens.answer(ask, path, caller),
                Some((_, _, "login")) => Err(Refusal::unsupported_operation()),
                Some((_, method, path)) => method.configure(ask, path),
                None => Err(Refusal::no_route(&ask.path)),
            };
        }
        match self.engines.find_mut(&ask.path) {
            Some((_, engine, path)) => engine.answer(ask, path),
            None if ask.operation == Operation::List => {
                Err(Refusal::no_route(&format!("{}/", ask.path.trim_end_matches('/'))))
            }
            None => Err(Refusal::no_route(&ask.path)),
        }
    }
}

/// A KV mount as the API describes it.
pub(super) fn describe_engine(mount: &Mount<Engine>, effective: bool) -> Value {
    mount.describe("kv", &json!({ "version": mount.inner.version() }), effective)
}

/// An auth mount as the API describes it.
pub(super) fn describe_method(mount: &Mount<Method>, effective: bool) -> Value {
    let mut described = mount.describe(mount.inner.kind(), &json!({}), effective);
    described["config"]["token_type"] = "default-service".into();
    described
}
