//! What the API server is to a node: it signs the tokens of service accounts, the store trusts them, and it has the classes. The
//! classes are files here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::kubelet::Volume;
use crate::backend::{Backend, Kind};
use crate::stamp::stamp;

/// The namespace of all pods, and their service account, which is also the store's role and policy.
pub const NAMESPACE: &str = "shop";
/// Their service account, which is also the name of the store's role and policy.
pub const ACCOUNT: &str = "app";
/// The audience of their tokens.
pub const AUDIENCE: &str = "vault";
/// As long as kubelet asks for by default.
const LIFETIME: Duration = Duration::from_secs(3600);

/// Signs, trusts, and keeps classes.
pub struct Cluster {
    /// The embedded store, which lets the service account read everything below `secret/`.
    pub store: Backend,
    key: EncodingKey,
    public: String,
    classes: PathBuf,
}

impl Cluster {
    /// With classes in this directory.
    pub(super) fn new(classes: PathBuf) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        let text = base64::engine::general_purpose::STANDARD.encode(public.as_ref());
        let public = format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n");
        let key = EncodingKey::from_ec_der(pair.to_pkcs8v1().unwrap().as_ref());
        let cluster = Self { store: Backend::start(&Kind::Embedded, false), key, public, classes };
        cluster.introduce();
        cluster
    }

    /// Tells the store whose tokens it is to trust: again after a [`Backend::resume`], which forgets everything.
    ///
    /// # Panics
    /// The store refuses.
    pub fn introduce(&self) {
        let store = &self.store;
        let policy = "path \"secret/*\" { capabilities = [\"read\"] }";
        store.write(&format!("sys/policies/acl/{ACCOUNT}"), &json!({ "policy": policy }));
        store.write("sys/auth/jwt", &json!({"type": "jwt"}));
        store.write("auth/jwt/config", &json!({"jwt_validation_pubkeys": [self.public]}));
        let role = json!({
            "role_type": "jwt", "bound_audiences": [AUDIENCE], "user_claim": "sub", "token_policies": ACCOUNT,
            "bound_subject": format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}"),
        });
        store.write(&format!("auth/jwt/role/{ACCOUNT}"), &role);
    }

    /// Writes a class, with files as (name, path at the store, key) and further parameters.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn class(&self, name: &str, files: &[(&str, &str, Option<&str>)], further: &[(&str, &str)]) {
        let object = |(name, path, key): &(&str, &str, Option<&str>)| {
            let mut object = json!({"objectName": name, "secretPath": path});
            if let Some(key) = key {
                object["secretKey"] = json!(key);
            }
            object
        };
        let objects: Vec<Value> = files.iter().map(object).collect();
        let mut parameters: BTreeMap<&str, String> =
            further.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        parameters.insert("roleName", ACCOUNT.to_owned());
        parameters.insert("objects", Value::from(objects).to_string());
        let class = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1",
            "kind": "SecretProviderClass",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"provider": "vault", "parameters": parameters},
        });
        self.write_class(name, &class.to_string());
    }

    /// Writes a class with one file `value` for readers that judge what they read, refreshed every `age` (`1s`) and never older as
    /// long as the store answers. Its content is that of [`Cluster::stamp`].
    ///
    /// # Panics
    /// It cannot be written.
    pub fn stamped_class(&self, name: &str, age: &str) {
        let object = json!({
            "objectName": "value", "secretPath": format!("secret/data/{name}"), "secretKey": "value", "encoding": "base64",
        });
        let class = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1",
            "kind": "SecretProviderClass",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"provider": "vault", "parameters": {
                "roleName": ACCOUNT, "objects": json!([object]).to_string(), "refreshInterval": age, "maxAge": age,
            }},
        });
        self.write_class(name, &class.to_string());
    }

    /// Puts a version of a value with this length into the store.
    ///
    /// # Panics
    /// The store refuses.
    pub fn stamp(&self, name: &str, version: u32, length: usize) {
        let value = base64::engine::general_purpose::STANDARD.encode(stamp(version, length));
        self.store.put(name, &json!({ "value": value }));
    }

    /// Writes a class's text in one step.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn write_class(&self, name: &str, text: &str) {
        let directory = self.classes.join(NAMESPACE);
        std::fs::create_dir_all(&directory).unwrap();
        let (fresh, path) = (directory.join(".new"), directory.join(format!("{name}.yaml")));
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, path).unwrap();
    }

    /// A volume with a new token of its pod's service account.
    #[must_use]
    pub fn renew(&self, mut volume: Volume) -> Volume {
        let token = self.token(&volume, LIFETIME);
        let expires = humantime::format_rfc3339_seconds(SystemTime::now() + LIFETIME).to_string();
        volume.tokens = json!({ AUDIENCE: {"token": token, "expirationTimestamp": expires} }).to_string();
        volume
    }

    /// A token of the pod's service account.
    ///
    /// # Panics
    /// It cannot be signed.
    #[must_use]
    pub fn token(&self, volume: &Volume, lifetime: Duration) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({
            "iss": "https://cluster", "aud": [AUDIENCE], "iat": now, "nbf": now, "exp": now + lifetime.as_secs(),
            "jti": format!("{:032x}", rand::random::<u128>()),
            "sub": format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}"),
            "kubernetes.io": {
                "namespace": NAMESPACE,
                "serviceaccount": {"name": ACCOUNT, "uid": "account-1"},
                "pod": {"name": volume.pod, "uid": volume.pod_uid},
            },
        });
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.key).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_takes_the_token_of_a_pod_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("pods")).unwrap();
        let cluster = Cluster::new(directory.path().join("classes"));
        let volume = cluster.renew(Volume::new(directory.path(), "web-0", "app"));
        let issued: Value = serde_json::from_str(&volume.tokens).unwrap();
        let login = |jwt: &Value| {
            cluster.store.ask("POST", "auth/jwt/login", Some(&json!({"role": ACCOUNT, "jwt": jwt})))
        };
        let (status, answer) = login(&issued[AUDIENCE]["token"]);
        assert_eq!(status, 200, "{answer}");
        assert!(answer["auth"]["token_policies"].as_array().unwrap().contains(&json!(ACCOUNT)), "{answer}");
        let other = Cluster::new(directory.path().join("other"));
        let (status, _) = login(&json!(other.token(&volume, LIFETIME)));
        assert_eq!(status, 400);
    }
}
