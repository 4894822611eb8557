//! What a pod's token claims, and whether that is the pod for which it came. Reading proves nothing: see `issuer`.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::secret::Token;
use crate::volume::Pod;

/// Claims of a service account's token that is bound to a pod.
#[derive(Debug, PartialEq, Eq)]
pub struct Claims {
    /// The pod's and the account's namespace.
    pub namespace: String,
    /// The service account's name.
    pub account: String,
    /// Its uid.
    pub account_uid: String,
    /// The pod's name.
    pub pod: String,
    /// Its uid.
    pub pod_uid: String,
}

impl Claims {
    /// Reads the claims of a token.
    ///
    /// # Errors
    /// What is missing, without a byte of the token.
    pub fn read(token: &Token) -> Result<Self, &'static str> {
        #[derive(Deserialize)]
        struct Payload {
            #[serde(rename = "kubernetes.io")]
            kubernetes: Kubernetes,
        }
        #[derive(Deserialize)]
        struct Kubernetes {
            namespace: String,
            serviceaccount: Object,
            pod: Option<Object>,
        }
        #[derive(Deserialize)]
        struct Object {
            name: String,
            uid: String,
        }
        let payload = token.expose().split('.').nth(1).and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
        let payload =
            payload.map(Zeroizing::new).and_then(|payload| serde_json::from_slice::<Payload>(&payload).ok());
        let Some(Payload { kubernetes: Kubernetes { namespace, serviceaccount: account, pod } }) = payload
        else {
            return Err(
                "is not a service account's; it must carry the claim kubernetes.io with namespace and serviceaccount",
            );
        };
        let Some(pod) = pod else {
            return Err(
                "is bound to no pod; it must carry the claim kubernetes.io/pod, as those have that kubelet gets for the \
                 CSIDriver's tokenRequests",
            );
        };
        let (account, account_uid, pod, pod_uid) = (account.name, account.uid, pod.name, pod.uid);
        Ok(Self { namespace, account, account_uid, pod, pod_uid })
    }

    /// What says that it is not this pod's, and what to do; `None`: it is.
    #[must_use]
    pub fn stranger_to(&self, pod: &Pod) -> Option<String> {
        let Pod { name, namespace, service_account, uid } = pod;
        if (&self.namespace, &self.account) != (namespace, service_account) {
            return Some(format!(
                "is that of another service account than {namespace}/{service_account}, the pod's; the pod must be created \
                 anew"
            ));
        }
        // An empty uid was never noted.
        if self.pod != *name || (self.pod_uid != *uid && !uid.is_empty()) {
            let claim = if self.pod == *name { "uid" } else { "name" };
            return Some(format!(
                "is that of another pod than {namespace}/{name} (claim kubernetes.io/pod/{claim}); the pod must be created \
                 anew"
            ));
        }
        None
    }
}
