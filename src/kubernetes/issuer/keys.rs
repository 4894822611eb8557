//! The keys of an issuer, as the API server publishes them, and the check of one token against one of them.

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, Validation};
use serde::Deserialize;

use super::{Forged, LEEWAY};
use crate::secret::Token;

/// Keys that are kept; an API server has one, and two while they rotate.
const MOST: usize = 64;

/// An issuer's public keys.
pub(super) struct Keys {
    issuer: String,
    keys: Vec<Key>,
}

struct Key {
    kid: String,
    /// The only algorithm it is for, where it says so.
    algorithm: Option<Algorithm>,
    key: DecodingKey,
}

impl Keys {
    /// Reads the two documents. Keys that are none for signatures, or of a kind that is not known here, are left out.
    pub(super) fn read(configuration: &str, keys: &str) -> Result<Self, &'static str> {
        #[derive(Deserialize)]
        struct Configuration {
            issuer: String,
        }
        let Ok(Configuration { issuer }) = serde_json::from_str(configuration) else {
            return Err("/.well-known/openid-configuration names no issuer");
        };
        let set: JwkSet = serde_json::from_str(keys).map_err(|_| "/openid/v1/jwks is no set of keys")?;
        let keys: Vec<_> = set.keys.iter().take(MOST).filter_map(Key::read).collect();
        if issuer.is_empty() || keys.is_empty() {
            return Err("the issuer publishes no key that is known here (RSA, EC P-256 or P-384, Ed25519)");
        }
        Ok(Self { issuer, keys })
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn has(&self, kid: &str) -> bool {
        self.keys.iter().any(|key| key.kid == kid)
    }

    /// Checks signature, issuer, times and audience of a token whose header names this key and algorithm.
    pub(super) fn verify(
        &self,
        token: &Token,
        kid: &str,
        algorithm: Algorithm,
        audience: &str,
    ) -> Result<(), Forged> {
        #[derive(Deserialize)]
        struct Nothing {}
        let fits = |key: &&Key| {
            key.kid == kid
                && key.key.family() == algorithm.family()
                && key.algorithm.is_none_or(|only| only == algorithm)
        };
        let key = self.keys.iter().find(fits).ok_or(Forged::Header)?;
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.issuer]);
        validation.validate_aud = !audience.is_empty();
        if audience.is_empty() {
            validation.set_required_spec_claims(&["exp", "iss"]);
        } else {
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
            validation.set_audience(&[audience]);
        }
        // The library's own errors may quote the token.
        let verified = jsonwebtoken::decode::<Nothing>(token.expose(), &key.key, &validation);
        verified.map(drop).map_err(|error| match error.into_kind() {
            ErrorKind::ExpiredSignature => Forged::Expired,
            ErrorKind::ImmatureSignature => Forged::Early,
            ErrorKind::InvalidIssuer => Forged::Issuer,
            ErrorKind::InvalidAudience => Forged::Audience,
            ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
                Forged::Claim(claim)
            }
            _ => Forged::Signature,
        })
    }
}

impl Key {
    fn read(jwk: &Jwk) -> Option<Self> {
        let kid = jwk.common.key_id.clone()?;
        let signs = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
        let key = DecodingKey::from_jwk(jwk).ok()?;
        let only = match jwk.common.key_algorithm {
            // An algorithm that is for something else, or not known.
            Some(algorithm) => Some(algorithm.to_string().parse::<Algorithm>().ok()?),
            None => None,
        };
        let public = key.family() != AlgorithmFamily::Hmac;
        let fits = only.is_none_or(|only| only.family() == key.family());
        (public && signs && fits).then_some(Self { kid, algorithm: only, key })
    }
}
