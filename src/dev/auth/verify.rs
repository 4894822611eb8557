//! Signed tokens: which of the known keys made one, and what it claims. No key is ever fetched.

use std::time::{Duration, SystemTime};

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::{Map, Value};

use crate::dev::ask::strings;
use crate::dev::clock;

/// How far the clocks of signer and store may differ.
const LEEWAY: Duration = Duration::from_secs(60);

/// Most keys of one mount.
const MAX_KEYS: usize = 64;

/// Public keys, RSA for RS256 or P-256 for ES256, with the PEM they came from.
#[derive(Default)]
pub(super) struct Keys {
    pub(super) pem: Vec<String>,
    keys: Vec<(Algorithm, DecodingKey)>,
}

/// What a token claims.
pub(super) struct Claims(Map<String, Value>);

impl Keys {
    /// Parses public keys in PEM.
    pub(super) fn parse(pem: Vec<String>) -> Result<Self, &'static str> {
        if pem.len() > MAX_KEYS {
            return Err("more than 64 keys");
        }
        let keys = pem.iter().map(|text| {
            let rsa = DecodingKey::from_rsa_pem(text.as_bytes()).map(|key| (Algorithm::RS256, key));
            rsa.or_else(|_| DecodingKey::from_ec_pem(text.as_bytes()).map(|key| (Algorithm::ES256, key)))
        });
        let keys =
            keys.collect::<Result<_, _>>().map_err(|_| "data does not contain any valid public keys")?;
        Ok(Self { pem, keys })
    }

    /// The claims of a token that one of the keys signed; `None`: none did, or it is no token.
    pub(super) fn verify(&self, token: &str) -> Option<Claims> {
        self.keys.iter().find_map(|(algorithm, key)| {
            let mut validation = Validation::new(*algorithm);
            // Only the signature is checked here: times and audience against the store's own clock and roles.
            validation.required_spec_claims.clear();
            validation.validate_exp = false;
            validation.validate_aud = false;
            jsonwebtoken::decode(token, key, &validation).ok().map(|token| Claims(token.claims))
        })
    }
}

impl Claims {
    /// A claim by name, or by JSON pointer if the name starts with a slash.
    pub(super) fn value(&self, name: &str) -> Option<&Value> {
        let Some(pointer) = name.strip_prefix('/') else { return self.0.get(name) };
        let mut steps = pointer.split('/').map(|step| step.replace("~1", "/").replace("~0", "~"));
        let first = self.0.get(&steps.next()?)?;
        steps.try_fold(first, |value, step| value.get(&step))
    }

    /// A claim's text.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.value(name).and_then(Value::as_str)
    }

    /// A claim's values: one, or the members of a list.
    pub(super) fn values(&self, name: &str) -> Vec<String> {
        match self.value(name) {
            None => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(value) => strings(value),
        }
    }

    /// Checks `exp` and `nbf`; worded as the real server does.
    pub(super) fn check_time(&self, now: SystemTime) -> Result<(), &'static str> {
        let (now, leeway) = (clock::seconds(now), LEEWAY.as_secs());
        let stamp = |name| self.value(name).and_then(|value| value.as_u64());
        match (stamp("exp"), stamp("nbf"), stamp("iat")) {
            (None, None, None) => {
                Err("no issued at (iat), not before (nbf), or expiration time (exp) claims in token")
            }
            (Some(exp), _, _) if now >= exp + leeway => {
                Err("invalid expiration time (exp) claim: token is expired")
            }
            (_, Some(nbf), _) if now + leeway < nbf => {
                Err("invalid not before (nbf) claim: token not yet valid")
            }
            _ => Ok(()),
        }
    }

    /// Checks that the audience is one of `bound`; worded as the real server does.
    pub(super) fn check_audience(&self, bound: &[String]) -> Result<(), &'static str> {
        if self.values("aud").iter().any(|audience| bound.contains(audience)) {
            return Ok(());
        }
        Err("invalid audience (aud) claim: audience claim does not match any expected audience")
    }
}
