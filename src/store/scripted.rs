//! A store for tests that does what a scenario says, on tokio's clock, which tests stop.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::reference::{Address, Auth, AuthMethod, Connection, Identity, Request, Subject};
use crate::secret::{SecretBytes, Token};
use crate::store::{Answer, Credential, ErrorKind, Lease, Login, Store, StoreError};

/// What the store does at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scenario {
    Healthy,
    /// Every request is answered with a 503.
    Sealed,
    /// No request is ever answered, nor its deadline kept.
    Hanging,
    /// No such path.
    Empty,
    /// Logins with anything but the credential `second` are refused.
    RoleWithoutPod,
    /// The store client itself has a fault.
    Panicking,
}

pub(crate) struct Scripted {
    scenario: Mutex<Scenario>,
    /// The `data` of each path, as JSON.
    values: Mutex<HashMap<String, String>>,
    pub(crate) latency: Duration,
    logins: AtomicUsize,
    reads: AtomicUsize,
    pub(crate) revoked: AtomicUsize,
}

impl Scripted {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            scenario: Mutex::new(Scenario::Healthy),
            values: Mutex::new(HashMap::new()),
            latency: Duration::from_millis(20),
            logins: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            revoked: AtomicUsize::new(0),
        })
    }

    pub(crate) fn play(&self, scenario: Scenario) {
        *self.scenario.lock().unwrap() = scenario;
    }

    /// Changes the key `password` of a path.
    pub(crate) fn rotate(&self, path: &str, value: &str) {
        self.hold(path, &format!(r#"{{"password":"{value}"}}"#));
    }

    /// Changes all of a path.
    pub(crate) fn hold(&self, path: &str, data: &str) {
        self.values.lock().unwrap().insert(path.into(), data.into());
    }

    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.logins.load(Ordering::Relaxed), self.reads.load(Ordering::Relaxed))
    }

    async fn respond(&self) -> Result<(), StoreError> {
        let scenario = *self.scenario.lock().unwrap();
        tokio::time::sleep(self.latency).await;
        match scenario {
            Scenario::Healthy | Scenario::RoleWithoutPod => Ok(()),
            Scenario::Sealed => Err(error(ErrorKind::Unavailable)),
            Scenario::Empty => Err(error(ErrorKind::Missing)),
            Scenario::Hanging => std::future::pending().await,
            Scenario::Panicking => panic!("a fault of the store client"),
        }
    }
}

fn error(kind: ErrorKind) -> StoreError {
    StoreError { kind, asked: "GET one".into(), answered: "no".into(), remedy: None, retry_after: None }
}

pub(crate) fn token(text: &str) -> Token {
    Token::new(text.into()).unwrap()
}

impl Store for Scripted {
    async fn login(&self, _: &Identity, credential: &Credential, _: Instant) -> Result<Login, StoreError> {
        self.logins.fetch_add(1, Ordering::Relaxed);
        let refusing = *self.scenario.lock().unwrap() == Scenario::RoleWithoutPod;
        if *self.scenario.lock().unwrap() != Scenario::Empty {
            self.respond().await?;
        }
        let is_second = matches!(credential, Credential::Jwt(jwt) if jwt.expose() == "second");
        if refusing && !is_second {
            return Err(error(ErrorKind::Denied));
        }
        Ok(Login { token: token("store-token"), renewable: false, ttl: None })
    }

    async fn renew(&self, _: &Identity, _: &Token, _: Instant) -> Result<Login, StoreError> {
        Err(error(ErrorKind::Refused))
    }

    async fn read(
        &self,
        _: &Identity,
        _: &Token,
        request: &Request,
        _: Instant,
    ) -> Result<Answer, StoreError> {
        let count = self.reads.fetch_add(1, Ordering::Relaxed);
        self.respond().await?;
        let held = self.values.lock().unwrap().get(&request.path).cloned();
        let data = held.unwrap_or_else(|| r#"{"password":""}"#.to_owned());
        let body = if request.path == "bare" {
            r#"{"keys":[]}"#.to_owned()
        } else {
            format!(r#"{{"request_id":"{count}","data":{data}}}"#)
        };
        Ok(Answer {
            body: SecretBytes::new(body.into_bytes()),
            lease: Lease::default(),
            version: None,
            created: None,
        })
    }

    async fn revoke(&self, _: &Identity, _: &Token, _: Instant) -> Result<(), StoreError> {
        self.revoked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// An identity at a store that is never reached.
pub(crate) fn identity() -> Arc<Identity> {
    Arc::new(Identity {
        connection: Connection::to(vec![Address::parse("https://store:8200").unwrap()]),
        auth: Auth {
            method: AuthMethod::Kubernetes,
            mount: "kubernetes".into(),
            role: "app".into(),
            audience: None,
        },
        subject: Subject::Local("test".into()),
    })
}
