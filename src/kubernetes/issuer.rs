//! The issuer of service-account tokens: its keys, asked of the API server and held, and whether they have signed a token.
//!
//! ```text
//!   token ──▶ its key is held ──▶ verified, or refused with the claim that is wrong
//!        └──▶ it is not ──▶ keys are asked for again ──▶ held now: as above
//!                                 │                └───▶ still not: refused, nobody but the issuer signs for pods
//!                                 └── nobody answers ──▶ unknown: the token must prove itself by a login
//! ```
//! Only public-key algorithms are known here: neither `none` nor a shared secret can be asked for by a token's header.

/// The keys, and what a token must claim.
mod keys;

use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::Algorithm;
use rand::RngExt as _;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::api::{Api, ApiError};
use crate::metrics::Metrics;
use crate::secret::Token;
use keys::Keys;

/// How often keys are asked for though nobody misses one.
const REFRESH: Duration = Duration::from_secs(600);
/// They are asked for no more often than this, whatever tokens say.
const FLOOR: Duration = Duration::from_secs(3);
/// Longest pause after failures; the first is [`FLOOR`].
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long is waited for a key that is not held: longer than [`FLOOR`], shorter than the shim's 5 s for a newer token.
const PATIENCE: Duration = Duration::from_secs(4);
/// Clocks may differ by as much.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// The issuer's keys. They are no longer asked for when this is dropped.
pub struct Issuer {
    known: watch::Sender<Known>,
    missing: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

/// What is known of the issuer.
#[derive(Clone, Default)]
struct Known {
    keys: Option<Arc<Keys>>,
    /// When the attempt began that ended last, and whether it succeeded.
    tried: Option<(Instant, bool)>,
}

/// What can be said of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The issuer signed it, for this audience and time.
    Signed,
    /// Nobody can say: the keys are not to be had.
    Unknown,
}

/// A token that the issuer did not sign, or not for this. Each text goes on after "the token for audience ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Forged {
    /// `none`, a shared secret, or nonsense.
    #[error(
        "is not signed as service-account issuers sign (RS, PS, ES or EdDSA, with the key's kid); the pod must be created anew"
    )]
    Header,
    /// Signed with a key that is not the issuer's.
    #[error(
        "is signed with a key that the API server does not publish at /openid/v1/jwks; the pod must be created anew, or ask \
         whoever runs the API server for its --service-account-key-file"
    )]
    UnknownKey,
    /// The signature is not that of the key that it names.
    #[error("has a signature that is not the issuer's; the pod must be created anew")]
    Signature,
    /// Another issuer.
    #[error(
        "is not of the API server's issuer (claim iss); wait for kubelet's next token, or create the pod anew"
    )]
    Issuer,
    /// For somebody else.
    #[error(
        "is made for another one (claim aud); correct spec.tokenRequests of the CSIDriver, and create the pod anew"
    )]
    Audience,
    /// Too late.
    #[error(
        "has expired (claim exp); kubelet sends a newer one by itself, unless the clocks of this node and the API server differ"
    )]
    Expired,
    /// Too early.
    #[error("is not valid yet (claim nbf); set the clocks of this node and of the API server")]
    Early,
    /// Without a claim that every token of the issuer has.
    #[error("lacks the claim {0}, or has nonsense there; the pod must be created anew")]
    Claim(String),
}

impl Issuer {
    /// Starts to ask for keys; must be called inside a tokio runtime.
    #[must_use]
    pub fn start(api: Api, metrics: Arc<Metrics>) -> Arc<Self> {
        let (known, missing) = (watch::Sender::new(Known::default()), Arc::new(Notify::new()));
        let task = tokio::spawn(follow(api, metrics, known.clone(), Arc::clone(&missing)));
        Arc::new(Self { known, missing, task })
    }

    /// Whether the issuer signed a token for this audience (empty: its own) and this moment. Waits for keys for some seconds at
    /// most, and only where the token's is not held.
    ///
    /// # Errors
    /// [`Forged`]
    pub async fn verify(&self, token: &Token, audience: &str) -> Result<Verdict, Forged> {
        let header = jsonwebtoken::decode_header(token.expose()).map_err(|_| Forged::Header)?;
        let (true, Some(kid)) = (is_asymmetric(header.alg), header.kid.as_deref()) else {
            return Err(Forged::Header);
        };
        let held = self.known.borrow().keys.clone();
        if let Some(keys) = held.filter(|keys| keys.has(kid)) {
            return keys.verify(token, kid, header.alg, audience).map(|()| Verdict::Signed);
        }
        let begun = Instant::now();
        let first = self.known.borrow().tried.is_none();
        if !first {
            self.missing.notify_one();
        }
        let mut known = self.known.subscribe();
        let answered = known.wait_for(|known| known.tried.is_some_and(|(at, _)| first || at >= begun));
        let (keys, asked) = match timeout(PATIENCE, answered).await {
            Ok(Ok(known)) => (known.keys.clone(), known.tried.is_some_and(|(_, success)| success)),
            _ => return Ok(Verdict::Unknown),
        };
        match keys {
            Some(keys) if keys.has(kid) => {
                keys.verify(token, kid, header.alg, audience).map(|()| Verdict::Signed)
            }
            Some(_) if asked => Err(Forged::UnknownKey),
            _ => Ok(Verdict::Unknown),
        }
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Asks for the keys, for ever.
async fn follow(api: Api, metrics: Arc<Metrics>, known: watch::Sender<Known>, missing: Arc<Notify>) {
    let (mut pause, mut told) = (FLOOR, String::new());
    loop {
        let begun = Instant::now();
        let next = match fetch(&api).await {
            Ok(keys) => {
                if !told.is_empty() {
                    tracing::info!("the keys of the service-account issuer are known again");
                    told.clear();
                }
                metrics.issuer_keys.set(keys.len() as u64);
                known.send_modify(|known| {
                    *known = Known { keys: Some(Arc::new(keys)), tried: Some((begun, true)) };
                });
                pause = FLOOR;
                REFRESH
            }
            Err(error) => {
                if error.text != told {
                    tracing::warn!(
                        %error,
                        "cannot get the keys of the service-account issuer; without them each new volume logs in by itself"
                    );
                    told = error.text;
                }
                known.send_modify(|known| known.tried = Some((begun, false)));
                pause = (pause * 2).min(LONGEST_PAUSE);
                pause
            }
        };
        let next = next.mul_f64(rand::rng().random_range(0.8..1.2));
        tokio::select! {
            () = sleep(next) => {}
            () = missing.notified() => sleep_until(begun + FLOOR).await,
        }
    }
}

async fn fetch(api: &Api) -> Result<Keys, ApiError> {
    let configuration = api.get("/.well-known", "openid-configuration").await?;
    let keys = api.get("/openid/v1", "jwks").await?;
    Keys::read(&configuration, &keys).map_err(|what| api.nonsense(what))
}

fn is_asymmetric(algorithm: Algorithm) -> bool {
    !matches!(algorithm, Algorithm::HS256 | Algorithm::HS384 | Algorithm::HS512)
}
