use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::*;
use crate::class::{self, FindError};
use crate::config::Layer;

/// Classes of one text.
struct Scripted(String);

impl Classes for Scripted {
    fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<Class>, FindError> {
        let mut classes = class::parse(&self.0)?.into_iter();
        Ok(classes.find(|class| {
            (class.kind, class.namespace.as_deref(), class.name.as_str()) == (kind, Some(namespace), name)
        }))
    }

    fn names(&self, namespace: &str) -> Result<Vec<(Kind, String)>, FindError> {
        let classes = class::parse(&self.0)?.into_iter();
        let there = classes.filter(|class| class.namespace.as_deref() == Some(namespace));
        Ok(there.map(|class| (class.kind, class.name)).collect())
    }

    fn elsewhere(&self, kind: Kind, namespace: &str, name: &str) -> Vec<String> {
        let classes = class::parse(&self.0).unwrap_or_default().into_iter();
        let others = classes.filter(|class| class.kind == kind && class.name == name);
        others.filter_map(|class| class.namespace).filter(|other| other != namespace).collect()
    }
}

fn import(name: &str, more: &str) -> String {
    format!(
        "---\napiVersion: deckhouse.io/v1alpha1\nkind: SecretsStoreImport\nmetadata: {{name: {name}, namespace: app}}\n\
         spec:\n  type: CSI\n  role: web\n{more}  files: [{{name: a, source: {{path: secret/data/a, key: k}}}}]\n"
    )
}

fn classes() -> Scripted {
    let provider = "---\napiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\n\
         metadata: {name: legacy, namespace: app}\nspec:\n  provider: vault\n  parameters:\n    roleName: web\n    \
         objects: |\n      - {objectName: a, secretPath: secret/data/a, secretKey: k}\n";
    let names = ["cache", "database", "mail", "queue", "search", "tracing"];
    let imports: String = names.map(|name| import(name, "")).concat();
    let elsewhere = "---\napiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\n\
         metadata: {name: elsewhere, namespace: app}\nspec:\n  provider: vault\n  secretObjects: [{secretName: s}]\n  \
         parameters:\n    roleName: web\n    vaultAddress: https://other.example:8200\n    vaultSkipTLSVerify: \"true\"\n    \
         objects: |\n      - {objectName: a, secretPath: secret/data/a, secretKey: k}\n";
    Scripted(imports + &import("audible", "  audience: team\n") + provider + elsewhere)
}

fn token(namespace: &str, name: &str) -> String {
    let claims = serde_json::json!({
        "aud": ["vault"],
        "kubernetes.io": {
            "namespace": namespace,
            "serviceaccount": { "name": name, "uid": "uid-1" },
            "pod": { "name": "web-0", "uid": "pod-uid" },
        },
    });
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn tokens(audiences: &[&str]) -> BTreeMap<String, Secret> {
    let token = || Secret::new(token("app", "web"));
    audiences.iter().map(|audience| ((*audience).to_owned(), token())).collect()
}

/// A good publish with these attributes.
fn publish(attributes: &[(&str, &str)]) -> Publish {
    Publish {
        pod: map(&[
            ("csi.storage.k8s.io/pod.name", "web-0"),
            ("csi.storage.k8s.io/pod.namespace", "app"),
            ("csi.storage.k8s.io/pod.uid", "pod-uid"),
            ("csi.storage.k8s.io/serviceAccount.name", "web"),
        ]),
        attributes: map(attributes),
        tokens: tokens(&["vault"]),
        ..Publish::default()
    }
}

fn config(settings: &str) -> AgentConfig {
    let file =
        Layer::from_yaml(&format!("classes: /classes\naddress: http://vault:8200\n{settings}")).unwrap();
    AgentConfig::resolve(Layer::default(), Layer::default(), file).unwrap()
}

fn refused(publish: Publish) -> Refusal {
    resolve(publish, &classes(), &config("")).err().unwrap()
}

const DATABASE: (&str, &str) = (STORE_IMPORT, "database");

#[test]
fn attributes_pod_and_token_become_a_spec_with_its_identity() {
    let resolved = resolve(publish(&[DATABASE]), &classes(), &config("authMount: k8s")).unwrap();
    let identity = &resolved.spec.identity;
    let subject =
        Subject::ServiceAccount { namespace: "app".into(), name: "web".into(), uid: "uid-1".into() };
    assert_eq!(identity.subject, subject);
    assert_eq!((identity.auth.mount.as_str(), identity.auth.role.as_str()), ("k8s", "web"));
    assert_eq!(identity.auth.audience.as_deref(), Some("vault"));
    assert_eq!(identity.connection.addresses[0].to_string(), "http://vault:8200");
    assert_eq!((resolved.pod.name.as_str(), resolved.pod.service_account.as_str()), ("web-0", "web"));
    assert_eq!(resolved.token.expose(), token("app", "web"));
    assert!(resolved.warnings.is_empty());
}

#[test]
fn what_a_class_says_wins_over_the_agents_configuration() {
    let publish = Publish { tokens: tokens(&["team", "vault"]), ..publish(&[(STORE_IMPORT, "audible")]) };
    let resolved = resolve(publish, &classes(), &config("audience: vault\nrole: other")).unwrap();
    assert_eq!(resolved.spec.identity.auth.audience.as_deref(), Some("team"));
    assert_eq!(resolved.spec.identity.auth.role, "web");
    assert_eq!(resolved.spec.identity.auth.method, crate::reference::AuthMethod::Kubernetes);
}

#[test]
fn a_class_that_leads_elsewhere_is_refused_before_a_token_is_looked_at() {
    let without = Publish { tokens: tokens(&[]), ..publish(&[(PROVIDER_CLASS, "elsewhere")]) };
    let refusal = refused(without);
    assert_eq!(refusal.code, Code::PermissionDenied);
    assert_eq!(
        refusal.text,
        "SecretProviderClass app/elsewhere: spec.parameters.vaultAddress: is not an address that namespace app may use; ask \
         the operator to add it to `addresses` below `allow` in the agent's configuration, or remove it\n\
         SecretProviderClass app/elsewhere: spec.parameters.vaultSkipTLSVerify: is true, which namespace app may not say; ask \
         the operator to set `skipVerify: true` below `allow` in the agent's configuration, or remove it"
    );
    let allow = "allow: [{namespaces: [\"a*\"], addresses: [https://other.example:8200], skipVerify: true}]";
    let resolved = resolve(publish(&[(PROVIDER_CLASS, "elsewhere")]), &classes(), &config(allow)).unwrap();
    assert_eq!(resolved.spec.identity.connection.addresses[0].to_string(), "https://other.example:8200");
    // The operator's list is of the pod's namespace, whatever the class's file says of its own.
    let other = allow.replace("a*", "b*");
    assert!(resolve(publish(&[(PROVIDER_CLASS, "elsewhere")]), &classes(), &config(&other)).is_err());
}

#[test]
fn what_has_no_effect_is_a_warning_for_the_pods_owner() {
    let allow = "allow: [{namespaces: [app], addresses: [https://other.example:8200], skipVerify: true}]";
    let publish = Publish { secret_ref: true, ..publish(&[(PROVIDER_CLASS, "elsewhere")]) };
    let resolved = resolve(publish, &classes(), &config(allow)).unwrap();
    assert_eq!(
        resolved.warnings,
        [
            "nodePublishSecretRef: has no effect, the Secret is not read; remove it from the pod's spec",
            "SecretProviderClass app/elsewhere: spec.secretObjects: not synced yet: the volume works, but no Kubernetes Secret is made",
            "SecretProviderClass app/elsewhere: spec.parameters.vaultSkipTLSVerify: any certificate is accepted: who stands in between reads tokens and \
         secrets",
        ]
    );
}

#[test]
fn attributes_must_name_one_class() {
    for (attributes, text) in [
        (
            &[][..],
            "volumeAttributes name no class; add secretProviderClass or secretsStoreImport with the class's name",
        ),
        (
            &[(PROVIDER_CLASS, "legacy"), DATABASE],
            "volumeAttributes name two classes; keep one of secretProviderClass and secretsStoreImport",
        ),
        (
            &[(STORE_IMPORT, "../app/database")],
            "volumeAttributes.secretsStoreImport: is not a Kubernetes name; use lower-case letters, digits, - and ., at most 253",
        ),
        (
            &[("secretProvderClass", "legacy")],
            "volumeAttributes.secretProvderClass: is unknown; did you mean secretProviderClass?",
        ),
        (
            &[DATABASE, ("objects", "[]"), ("role", "admin")],
            "volumeAttributes.objects: is a parameter of the class, and a pod overrides nothing of it; write it into the class, or \
             remove it\nvolumeAttributes.role: is unknown; remove it; known are secretProviderClass, secretsStoreImport",
        ),
    ] {
        let refusal = refused(publish(attributes));
        assert_eq!((refusal.code, refusal.text.as_str()), (Code::InvalidArgument, text));
    }
}

#[test]
fn unknown_attributes_can_be_ignored_with_a_warning_and_then_override_nothing() {
    let publish = publish(&[DATABASE, ("role", "admin")]);
    let resolved = resolve(publish, &classes(), &config("unknownAttributes: ignore")).unwrap();
    assert_eq!(resolved.warnings, ["volumeAttributes.role has no effect; remove it"]);
    let publish = Publish { secret_ref: true, ..self::publish(&[DATABASE]) };
    let resolved = resolve(publish, &classes(), &config("")).unwrap();
    assert_eq!(resolved.warnings, [SECRET_REF]);
    assert_eq!(resolved.spec.identity.auth.role, "web");
}

#[test]
fn a_class_that_is_not_there_names_those_that_are() {
    let listed = "there are cache, database, mail, queue, search and 2 more";
    for (field, name, text) in [
        (STORE_IMPORT, "databse", format!("there is no SecretsStoreImport app/databse; did you mean database? {listed}")),
        (STORE_IMPORT, "xyz", format!("there is no SecretsStoreImport app/xyz; {listed}")),
        (
            PROVIDER_CLASS,
            "database",
            "app/database is a SecretsStoreImport, not a SecretProviderClass; write `secretsStoreImport: database` in \
             volumeAttributes"
                .to_owned(),
        ),
        (
            STORE_IMPORT,
            "legacy",
            "app/legacy is a SecretProviderClass, not a SecretsStoreImport; write `secretProviderClass: legacy` in \
             volumeAttributes"
                .to_owned(),
        ),
    ] {
        let refusal = refused(publish(&[(field, name)]));
        assert_eq!((refusal.code, refusal.text), (Code::NotFound, text));
    }
    let mut elsewhere = publish(&[DATABASE]);
    elsewhere.pod.insert("csi.storage.k8s.io/pod.namespace".to_owned(), "other".to_owned());
    assert_eq!(
        refused(elsewhere).text,
        "there is no SecretsStoreImport other/database; database is in namespace app, but a pod may only use classes of its own \
         namespace other: create it there"
    );
    let mut nowhere = publish(&[(STORE_IMPORT, "none")]);
    nowhere.pod.insert("csi.storage.k8s.io/pod.namespace".to_owned(), "other".to_owned());
    assert_eq!(
        refused(nowhere).text,
        "there is no SecretsStoreImport other/none, nor any other in this namespace; create it, or correct the name or \
         namespace"
    );
}

#[test]
fn all_faults_of_a_class_come_at_once() {
    let faulty = Scripted(import("database", "  rolle: x\n  colour: y\n"));
    let refusal = resolve(publish(&[DATABASE]), &faulty, &config("")).err().unwrap();
    assert_eq!(refusal.code, Code::FailedPrecondition);
    assert_eq!(refusal.text.lines().count(), 2, "{refusal}");
    assert!(refusal.text.contains("spec.rolle: is unknown; did you mean role?"), "{refusal}");
}

#[test]
fn what_neither_class_nor_configuration_says_is_named() {
    let file = Layer::from_yaml("classes: /classes").unwrap();
    let config = AgentConfig::resolve(Layer::default(), Layer::default(), file).unwrap();
    let refusal = resolve(publish(&[DATABASE]), &classes(), &config).err().unwrap();
    assert_eq!(refusal.code, Code::FailedPrecondition);
    assert!(
        refusal.text.starts_with("SecretsStoreImport app/database: address: is not given; "),
        "{refusal}"
    );
}

#[test]
fn a_token_that_did_not_come_names_the_line_of_the_driver() {
    let of = |class, audiences: &[&str]| {
        refused(Publish { tokens: tokens(audiences), ..publish(&[(STORE_IMPORT, class)]) })
    };
    let refusal = of("audible", &["vault", "other"]);
    assert_eq!(refusal.code, Code::FailedPrecondition);
    assert_eq!(
        refusal.text,
        "kubelet sent no service-account token for audience \"team\", but only \"other\", \"vault\"; add the line \
         `- audience: team` to spec.tokenRequests of the CSIDriver"
    );
    assert_eq!(
        of("database", &[]).text,
        "kubelet sent no service-account token for audience \"vault\", but none at all; add the line `- audience: vault` to \
         spec.tokenRequests of the CSIDriver"
    );
    assert_eq!(
        of("database", &["a", "b"]).text,
        "the class names no audience, and kubelet sent tokens for \"a\", \"b\"; set audience in the class to one of them"
    );
}

#[test]
fn a_pod_context_that_did_not_come_names_the_setting_of_the_driver() {
    let publish = Publish { pod: BTreeMap::new(), ..publish(&[DATABASE]) };
    assert_eq!(
        refused(publish).text,
        "kubelet did not send csi.storage.k8s.io/pod.name; set podInfoOnMount: true in the CSIDriver"
    );
}

#[test]
fn a_token_must_be_a_service_accounts_and_the_pods_own() {
    let with = |token: String| {
        let tokens = BTreeMap::from([("vault".to_owned(), Secret::new(token))]);
        refused(Publish { tokens, ..publish(&[DATABASE]) })
    };
    for bad in ["no-jwt".to_owned(), "a.%%%.c".to_owned(), format!("a.{}.c", URL_SAFE_NO_PAD.encode("{}"))] {
        let refusal = with(bad);
        assert_eq!(refusal.code, Code::FailedPrecondition);
        assert!(refusal.text.contains("is not a service account's"), "{refusal}");
    }
    assert!(with("two\nlines".to_owned()).text.contains("not a token"));
    for (namespace, name) in [("app", "other"), ("other", "web")] {
        let refusal = with(token(namespace, name));
        assert_eq!(refusal.code, Code::PermissionDenied);
        assert!(refusal.text.contains("another service account than app/web"), "{refusal}");
    }
    for (claim, value) in [("name", "web-1"), ("uid", "pod-2")] {
        let mut stranger = publish(&[DATABASE]);
        stranger.pod.insert(format!("csi.storage.k8s.io/pod.{claim}"), value.to_owned());
        let refusal = refused(stranger);
        assert_eq!(refusal.code, Code::PermissionDenied);
        assert!(refusal.text.contains(&format!("(claim kubernetes.io/pod/{claim})")), "{refusal}");
    }
    let unbound = r#"{"kubernetes.io":{"namespace":"app","serviceaccount":{"name":"web","uid":"uid-1"}}}"#;
    let refusal = with(format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(unbound)));
    assert!(refusal.text.contains("is bound to no pod"), "{refusal}");
}

#[test]
fn no_refusal_repeats_a_token_or_an_attributes_value() {
    const CANARY: &str = "cAnArY-7f3a";
    let claims = format!("a.{}.c", URL_SAFE_NO_PAD.encode(CANARY));
    for (attribute, token) in [(CANARY, CANARY), ("database", CANARY), ("database", claims.as_str())] {
        let tokens = BTreeMap::from([("vault".to_owned(), Secret::new(token.to_owned()))]);
        let refusal = refused(Publish { tokens, ..publish(&[(STORE_IMPORT, attribute)]) });
        assert!(!refusal.text.contains(CANARY), "{refusal}");
    }
}

/// docs/errors.md has each text as it is.
#[test]
fn the_errors_document_has_the_texts_of_a_refused_publish() {
    let document = include_str!("../../../docs/errors.md");
    let with = |attributes: &[(&str, &str)]| refused(publish(attributes));
    let sent = |class, audiences: &[&str]| {
        refused(Publish { tokens: tokens(audiences), ..publish(&[(STORE_IMPORT, class)]) })
    };
    let mut elsewhere = publish(&[DATABASE]);
    elsewhere.pod.insert("csi.storage.k8s.io/pod.namespace".to_owned(), "other".to_owned());
    for refusal in [
        with(&[]),
        with(&[(PROVIDER_CLASS, "legacy"), DATABASE]),
        with(&[("secretProvderClass", "legacy")]),
        with(&[DATABASE, ("roleName", "admin")]),
        with(&[(STORE_IMPORT, "databse")]),
        with(&[(PROVIDER_CLASS, "database")]),
        refused(elsewhere),
        sent("audible", &["vault", "other"]),
        sent("database", &["a", "b"]),
        refused(Publish { pod: BTreeMap::new(), ..publish(&[DATABASE]) }),
    ] {
        assert!(document.contains(&format!("``{refusal}``")), "docs/errors.md lacks\n{refusal}");
    }
    for line in with(&[(PROVIDER_CLASS, "elsewhere")]).text.lines() {
        assert!(document.contains(&format!("``{line}``")), "docs/errors.md lacks\n{line}");
    }
}
