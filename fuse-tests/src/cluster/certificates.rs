//! Who the cluster's parts are to each other: an authority, a certificate for each, and the key that signs tokens of service
//! accounts (RSA, as in most clusters).

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize,
};
use serde_json::json;

use super::components::SERVER;
use super::world::{NODE_IP, SERVICE_IP};

/// The only node.
pub const NODE: &str = "node1";

/// The directory with all of them.
pub(super) struct Certificates(PathBuf);

impl Certificates {
    /// Writes new ones.
    pub(super) fn new(directory: &Path) -> Self {
        fs::create_dir_all(directory).unwrap();
        let this = Self(directory.to_owned());
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.distinguished_name.push(DnType::CommonName, "fuse-tests cluster");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        fs::write(this.path("ca.crt"), authority.self_signed(&key).unwrap().pem()).unwrap();
        let authority = Issuer::new(authority, key);

        let names = ["", ".default", ".default.svc", ".default.svc.cluster.local"];
        let mut names: Vec<String> = names.iter().map(|rest| format!("kubernetes{rest}")).collect();
        names.extend(["localhost", "127.0.0.1", NODE_IP, SERVICE_IP].map(ToOwned::to_owned));
        this.issue(&authority, "apiserver", ("kube-apiserver", None), names);
        for (file, name, group) in [
            ("admin", "admin", Some("system:masters")),
            ("kubelet", &format!("system:node:{NODE}"), Some("system:nodes")),
            ("controller-manager", "system:kube-controller-manager", None),
            ("scheduler", "system:kube-scheduler", None),
        ] {
            this.issue(&authority, file, (name, group), Vec::new());
            this.write_kubeconfig(file);
        }
        let signer = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        fs::write(this.path("sa.key"), signer.serialize_pem()).unwrap();
        fs::write(this.path("sa.pub"), signer.public_key_pem()).unwrap();
        this
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    /// As arguments have it.
    pub(super) fn text(&self, file: &str) -> String {
        self.path(file).display().to_string()
    }

    /// With names it serves, without any it asks.
    fn issue(
        &self,
        authority: &Issuer<'_, KeyPair>,
        file: &str,
        (name, group): (&str, Option<&str>),
        names: Vec<String>,
    ) {
        let usage = match names.is_empty() {
            true => ExtendedKeyUsagePurpose::ClientAuth,
            false => ExtendedKeyUsagePurpose::ServerAuth,
        };
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        fs::write(self.path(&format!("{file}.crt")), params.signed_by(&key, authority).unwrap().pem())
            .unwrap();
        fs::write(self.path(&format!("{file}.key")), key.serialize_pem()).unwrap();
    }

    fn write_kubeconfig(&self, name: &str) {
        let content = |file: &str| STANDARD.encode(fs::read(self.path(file)).unwrap());
        let cluster = json!({"server": SERVER, "certificate-authority-data": content("ca.crt")});
        let user = json!({
            "client-certificate-data": content(&format!("{name}.crt")),
            "client-key-data": content(&format!("{name}.key")),
        });
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": name}}],
        });
        fs::write(self.path(&format!("{name}.kubeconfig")), config.to_string()).unwrap();
    }
}
