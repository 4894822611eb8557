//! The store beside the node, which goes on when the node reboots: it trusts the cluster's service accounts in the two ways that people
//! use, and keeps an audit log.
//!
//! | mount | who a pod is |
//! |---|---|
//! | `auth/kubernetes` | asked of the API server (TokenReview), by a service account that may do nothing else |
//! | `auth/jwt` | by the issuer's key |

use std::net::SocketAddr;

use serde_json::json;

use super::Cluster;
use super::components::{ISSUER, SERVER};
use super::world::NODE_IP;
use crate::backend::{Backend, Kind};

/// Where pods and node reach it, with TLS if it is a real server.
pub const ADDRESS: &str = "10.88.0.1:8200";
/// The audience of tokens for it.
pub const AUDIENCE: &str = "vault";

/// Who asks the API server for the store.
const REVIEWER: &str = "store-reviewer";

impl Cluster {
    pub(super) fn start_store(&self, kind: &Kind) -> Backend {
        let listen: SocketAddr = ADDRESS.parse().unwrap();
        let store = Backend::start_at(kind, true, listen, Some(self.world().clone()));
        self.introduce(&store);
        store
    }

    /// Tells a fresh store whom to trust.
    ///
    /// # Panics
    /// It refuses.
    fn introduce(&self, store: &Backend) {
        let key = self.issuer_key();
        store.write("sys/auth/jwt", &json!({"type": "jwt"}));
        store.write("auth/jwt/config", &json!({"jwt_validation_pubkeys": [key], "bound_issuer": ISSUER}));
        if store.ca().is_none() {
            // The embedded one has no other way.
            return;
        }
        self.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": REVIEWER, "namespace": "kube-system"}},
            {
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                "metadata": {"name": REVIEWER},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator",
                },
                "subjects": [{"kind": "ServiceAccount", "name": REVIEWER, "namespace": "kube-system"}],
            },
        ]}));
        let path = format!("api/v1/namespaces/kube-system/serviceaccounts/{REVIEWER}/token");
        let token = self.create(&path, &json!({"spec": {"expirationSeconds": 86_400}}));
        store.write("sys/auth/kubernetes", &json!({"type": "kubernetes"}));
        let config = json!({
            "kubernetes_host": SERVER, "kubernetes_ca_cert": self.authority(),
            "token_reviewer_jwt": token["status"]["token"], "disable_local_ca_jwt": true,
        });
        store.write("auth/kubernetes/config", &config);
    }

    /// Where the store is, as a URL of pods and node.
    #[must_use]
    pub fn store_url(&self) -> String {
        self.store().address()
    }

    /// The node's address.
    #[must_use]
    pub fn address(&self) -> &'static str {
        NODE_IP
    }

    /// Lets a service account read what is below `secret/NAMESPACE/`, under the role `NAMESPACE-ACCOUNT` of both ways.
    ///
    /// # Panics
    /// The store refuses.
    pub fn admit(&self, namespace: &str, account: &str) -> String {
        let store = self.store();
        let role = format!("{namespace}-{account}");
        let policy = format!(
            "path \"secret/data/{namespace}/*\" {{ capabilities = [\"read\"] }}
             path \"secret/metadata/{namespace}/*\" {{ capabilities = [\"read\", \"list\"] }}"
        );
        store.write(&format!("sys/policies/acl/{role}"), &json!({ "policy": policy }));
        let jwt = json!({
            "role_type": "jwt", "bound_audiences": [AUDIENCE], "user_claim": "sub", "token_policies": role,
            "bound_subject": format!("system:serviceaccount:{namespace}:{account}"),
        });
        store.write(&format!("auth/jwt/role/{role}"), &jwt);
        if store.ca().is_some() {
            let kubernetes = json!({
                "bound_service_account_names": [account], "bound_service_account_namespaces": [namespace],
                "audience": AUDIENCE, "token_policies": role,
            });
            store.write(&format!("auth/kubernetes/role/{role}"), &kubernetes);
        }
        role
    }
}
