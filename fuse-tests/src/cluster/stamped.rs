//! Secrets of which every read can be judged, and readers inside of pods: threads of the test that read through the pod's own mounts.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::pods::SECRETS;
use super::{Cluster, Tenant};
use crate::readers::Readers;
use crate::stamp;

/// The class of stamped secrets, its secret, its file.
pub const STAMPED: &str = "stamped";
/// Bytes of a stamped value: several pages, so that a torn one would be seen.
const LENGTH: usize = 10_000;
/// As an application reads its secret, only more often. Short enough that no pause of some milliseconds is missed.
const PACE: Duration = Duration::from_millis(2);

impl Tenant<'_> {
    /// Writes a version of the stamped secret.
    ///
    /// # Panics
    /// The store refuses.
    pub fn stamp(&self, version: u32) {
        // The store's values are texts.
        self.put(STAMPED, &json!({"value": BASE64_STANDARD.encode(stamp::stamp(version, LENGTH))}));
    }

    /// Writes version 1, and a class with it as the file `stamped`. It is asked for every two seconds.
    ///
    /// # Panics
    /// The store or the API server refuses.
    pub fn stamped_class(&self) {
        self.stamp(1);
        let object = json!({
            "objectName": STAMPED, "secretPath": self.path(STAMPED), "secretKey": "value", "encoding": "base64",
        });
        let objects = json!([object]).to_string();
        self.class(STAMPED, &[], &json!({"objects": objects, "refreshInterval": "2s"}));
    }
}

impl Cluster {
    /// The stamped file of a pod, through the pod's own mounts.
    ///
    /// # Panics
    /// The pod's container `app` does not run.
    #[must_use]
    pub fn stamped(&self, tenant: &Tenant<'_>, pod: &str) -> PathBuf {
        self.path_in(&tenant.namespace, pod, "app", &format!("{SECRETS}/{STAMPED}"))
    }

    /// One reader in each of these pods.
    ///
    /// # Panics
    /// The container `app` of one does not run.
    #[must_use]
    pub fn readers(&self, tenant: &Tenant<'_>, pods: &[String]) -> Readers {
        Readers::paced(pods.iter().map(|pod| self.stamped(tenant, pod)), PACE)
    }
}
