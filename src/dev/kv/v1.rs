//! KV version 1: a secret is its whole body.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{MAX_SECRETS, canonical, list, raw};
use crate::dev::ask::{Ask, Operation, duration};
use crate::dev::auth::token::SYSTEM_TTL;
use crate::dev::reply::{Outcome, Refusal, Reply};
use crate::secret::SecretBytes;

/// The secrets of one mount, by path.
#[derive(Default)]
pub(in crate::dev) struct Store(BTreeMap<String, SecretBytes>);

impl Store {
    /// Answers a request whose path below the mount is `path`.
    pub(in crate::dev) fn answer(&mut self, ask: &Ask, path: &str) -> Outcome {
        match ask.operation {
            Operation::List => list("kv", self.0.keys(), path),
            _ if path.is_empty() => Err(Refusal::unsupported_operation()),
            Operation::Read => self.read(path),
            Operation::Write => self.write(path, ask),
            Operation::Delete => {
                self.0.remove(path);
                Reply::no_content()
            }
            Operation::Patch => Err(Refusal::unsupported_operation()),
        }
    }

    fn read(&self, path: &str) -> Outcome {
        let secret = self.0.get(path).ok_or_else(Refusal::missing)?;
        Reply::leased("kv", raw(secret)?, refresh_interval(secret))
    }

    fn write(&mut self, path: &str, ask: &Ask) -> Outcome {
        let missing = || Refusal::bad("missing data fields");
        if ask.body.is_empty() {
            return Err(missing());
        }
        let secret = canonical(ask.body.expose());
        let secret = secret.ok_or_else(|| Refusal::internal("the body is not a JSON object"))?;
        if secret.expose() == b"{}" {
            return Err(missing());
        }
        if self.0.len() >= MAX_SECRETS && !self.0.contains_key(path) {
            return Err(Refusal::full("secrets in a mount", MAX_SECRETS));
        }
        self.0.insert(path.to_owned(), secret);
        Reply::no_content()
    }
}

/// The member `ttl` says how often a secret should be read again.
fn refresh_interval(secret: &SecretBytes) -> u64 {
    #[derive(serde::Deserialize)]
    struct Ttl {
        ttl: Option<Value>,
    }
    let ttl = serde_json::from_slice::<Ttl>(secret.expose()).ok().and_then(|secret| secret.ttl);
    let seconds = ttl.and_then(|ttl| ttl.as_u64().or_else(|| Some(duration(ttl.as_str()?)?.as_secs())));
    seconds.unwrap_or(SYSTEM_TTL.as_secs())
}
