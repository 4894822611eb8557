//! The requests of the task: each is a task of its own, whose end comes back as [`Ended`].

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Account, Cache, Ended, Entrance, Reply, Task, makes_tokens, now};
use crate::cache::id::{EntryId, FlightId, IdentityId};
use crate::reference::Identity;
use crate::secret::Token;
use crate::store::{ErrorKind, Store, StoreError};

/// A store that does not keep its deadline is cut off this long after it.
const OVERTIME: Duration = Duration::from_secs(1);
/// For giving tokens back: how many at once, and how long each may take in all.
pub(super) const REVOCATIONS: usize = 8;
const REVOCATION_PATIENCE: Duration = Duration::from_secs(10);
/// Logins at a time that prove a credential; they are not in the budget, since nothing is registered yet.
pub(super) const PROOFS: usize = 8;
/// First and longest pause before a store that did not answer is asked again for a proof.
const PROOF_PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4));

impl<S: Store> Task<S> {
    pub(super) fn log_in(&mut self, flight: FlightId, identity: IdentityId, deadline: Instant) {
        let Some(account) = self.accounts.get(&identity) else { return };
        let Some((_, credential)) = account.credentials.last() else { return };
        let ours = makes_tokens(credential);
        let (store, identity, credential) =
            (Arc::clone(&self.store), Arc::clone(&account.identity), Arc::clone(credential));
        self.requests.spawn(async move {
            let result = in_time("login", deadline, store.login(&identity, &credential, deadline)).await;
            Ended::LoggedIn { flight, identity, ours, result }
        });
    }

    pub(super) fn renew(&mut self, flight: FlightId, identity: IdentityId, deadline: Instant) {
        let Some(account) = self.accounts.get(&identity) else { return };
        let Some(token) = account.token.clone() else { return };
        let (store, identity) = (Arc::clone(&self.store), Arc::clone(&account.identity));
        self.requests.spawn(async move {
            let result =
                in_time("renewal of the token", deadline, store.renew(&identity, &token, deadline)).await;
            Ended::Renewed(flight, result)
        });
    }

    pub(super) fn read(&mut self, flight: FlightId, identity: IdentityId, entry: EntryId, deadline: Instant) {
        let Some(account) = self.accounts.get(&identity) else { return };
        let (Some(token), Some(key)) = (account.token.clone(), self.machine.key(entry)) else { return };
        let (store, key) = (Arc::clone(&self.store), Arc::clone(key));
        self.requests.spawn(async move {
            let read = store.read(&key.identity, &token, &key.request, deadline);
            let result = in_time(&key.request.path, deadline, read).await;
            Ended::Answered(flight, entry, result)
        });
    }

    /// Logs in with the credential of a registration to be, until the store has said yes or no.
    pub(super) fn prove(&mut self, cache: Cache, entrance: Entrance, deadline: Instant, reply: Reply) {
        let Some(first) = entrance.keys.first() else {
            // Refused as one without keys; if nobody waits for it, nobody need be told.
            let _ = reply.send(self.register(cache, entrance, None));
            return;
        };
        let (identity, credential) = (Arc::clone(&first.identity), Arc::clone(&entrance.credential));
        let (store, turns) = (Arc::clone(&self.store), Arc::clone(&self.proofs));
        self.requests.spawn(async move {
            let login = async {
                let _turn = turns.acquire().await;
                let mut pause = PROOF_PAUSES.0;
                loop {
                    match store.login(&identity, &credential, deadline).await {
                        Err(error) if error.is_retryable() && now().monotonic + pause < deadline => {
                            tokio::time::sleep(error.retry_after.unwrap_or(pause)).await;
                            pause = (pause * 2).min(PROOF_PAUSES.1);
                        }
                        ended => return ended,
                    }
                }
            };
            let result = in_time("login", deadline, login).await;
            Ended::Proved { cache, entrance, reply, result }
        });
    }

    pub(super) fn forget(&mut self, identity: IdentityId) {
        let Some(Account { identity, token, ours, .. }) = self.accounts.remove(&identity) else { return };
        if let (Some(token), true) = (token, ours) {
            self.revoke(identity, token);
        }
    }

    pub(super) fn revoke(&mut self, identity: Arc<Identity>, token: Arc<Token>) {
        let (store, turns) = (Arc::clone(&self.store), Arc::clone(&self.revocations));
        let deadline = now().monotonic + REVOCATION_PATIENCE;
        self.requests.spawn(async move {
            let revocation = async {
                let _turn = turns.acquire().await;
                store.revoke(&identity, &token, deadline).await
            };
            if let Err(error) = in_time("revocation of the token", deadline, revocation).await {
                tracing::warn!(%error, "a token was not given back; it ends by itself");
            }
            Ended::Revoked
        });
    }
}

/// Cuts off a store that does not keep its deadline.
async fn in_time<T>(
    asked: &str,
    deadline: Instant,
    request: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout_at((deadline + OVERTIME).into(), request).await {
        Ok(result) => result,
        Err(_) => Err(StoreError {
            kind: ErrorKind::Deadline,
            asked: asked.to_owned(),
            answered: "no answer within the deadline".to_owned(),
            remedy: None,
            retry_after: None,
        }),
    }
}
