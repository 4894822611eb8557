//! One cluster for all tests of a binary, with the driver on it. Tests that disturb nobody use it side by side; a test that kills
//! something has it for itself.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde_json::{Value, json};

use super::{Cluster, Options};
use crate::needs;

/// Whether a start has begun and not ended well.
static FAILS: AtomicBool = AtomicBool::new(false);

static CLUSTER: RwLock<Option<Cluster>> = RwLock::new(None);

/// The cluster, beside other tests.
pub struct Shared(RwLockReadGuard<'static, Option<Cluster>>);

/// The cluster, and nobody else on it. After a test that fails with it the next one gets a new cluster.
pub struct Alone(RwLockWriteGuard<'static, Option<Cluster>>);

/// The cluster for a test that kills nothing but its own pods; `None`, with the reason printed: this machine cannot.
///
/// # Panics
/// It cannot, and `CI=true`; or the cluster does not start.
#[must_use]
pub fn shared() -> Option<Shared> {
    loop {
        let held = CLUSTER.read().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            return Some(Shared(held));
        }
        drop(held);
        drop(alone()?);
    }
}

/// The cluster for a test that kills what others need.
///
/// # Panics
/// This machine cannot, and `CI=true`; or the cluster does not start.
#[must_use]
pub fn alone() -> Option<Alone> {
    let options = needs::cluster()?;
    let mut held = CLUSTER.write().unwrap_or_else(PoisonError::into_inner);
    if held.is_none() {
        *held = Some(start(options));
    }
    Some(Alone(held))
}

/// Its agents' settings: the one thing that classes of these tests may say beside what the agents' own settings say.
#[must_use]
pub fn settings() -> Value {
    json!({"allow": [{"namespaces": ["*"], "authMounts": ["jwt"]}]})
}

fn start(options: Options) -> Cluster {
    // Each further test would wait as long.
    assert!(!FAILS.swap(true, Ordering::Relaxed), "the cluster did not start for an earlier test");
    let cluster = Cluster::start(options);
    cluster.install_with(&settings(), &[]);
    FAILS.store(false, Ordering::Relaxed);
    cluster
}

impl Deref for Shared {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.0.as_ref().expect("a cluster that was started")
    }
}

impl Deref for Alone {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.0.as_ref().expect("a cluster that was started")
    }
}

impl DerefMut for Alone {
    fn deref_mut(&mut self) -> &mut Cluster {
        self.0.as_mut().expect("a cluster that was started")
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Who knows what the test had stopped.
            *self.0 = None;
        }
    }
}
