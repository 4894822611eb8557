use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::settings::Grace;
use crate::reference::{Encoding, Method, Ownership, Pem};

const PROVIDER_CLASS: &str = include_str!("../../examples/classes/secret-provider-class.yaml");
const OPENBAO: &str = include_str!("../../examples/classes/secret-provider-class-openbao.yaml");
const MADE: &str = include_str!("../../examples/classes/secrets-store-import-made.yaml");
const IMPORT: &str = include_str!("../../examples/classes/secrets-store-import.yaml");

const ONE_OBJECT: &str = "- {objectName: a, secretPath: secret/data/a, secretKey: k}";

/// A small class: extra lines for parameters and spec, and the list of objects.
fn provider_class(parameters: &str, objects: &str, spec: &str) -> String {
    let block = |text: &str, indent: usize| -> String {
        text.lines().map(|line| format!("{:indent$}{line}\n", "")).collect()
    };
    format!(
        "apiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\nmetadata: {{name: c, namespace: n}}\nspec:\n  provider: vault\n{}  parameters:\n    roleName: r\n{}    objects: |\n{}",
        block(spec, 2),
        block(parameters, 4),
        block(objects, 6),
    )
}

fn import(spec: &str, files: &str) -> String {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!(
        "apiVersion: deckhouse.io/v1alpha1\nkind: SecretsStoreImport\nmetadata: {{name: c, namespace: n}}\nspec:\n  type: CSI\n  role: r\n{spec}  files: {files}\n"
    )
}

const ONE_FILE: &str = "[{name: a, source: {path: kv/data/a, key: k}}]";

fn one(text: &str) -> Class {
    let mut classes = parse(text).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(classes.len(), 1);
    classes.remove(0)
}

/// Field and rule of each fault.
fn faults(text: &str) -> Vec<(String, String)> {
    let faults = parse(text).expect_err("the document has a fault");
    faults.iter().map(|fault| (fault.field.clone(), fault.rule.clone())).collect()
}

/// The text has exactly one fault, of this field and rule.
#[track_caller]
fn refused(text: &str, field: &str, rule: &str) {
    let found = faults(text);
    assert!(
        found.len() == 1 && found[0].0 == field && found[0].1.contains(rule),
        "{field}: {rule}\n{found:#?}\n{text}"
    );
}

#[test]
fn every_field_of_a_secret_provider_class_arrives() {
    let class = one(PROVIDER_CLASS);
    assert_eq!((class.kind, class.full_name().as_str()), (Kind::SecretProviderClass, "shop/shop"));
    let connection = &class.settings.connection;
    assert_eq!(connection.addresses.as_ref().unwrap()[0].to_string(), "https://vault.example:8200");
    assert_eq!(connection.namespace.as_deref(), Some("team-a"));
    assert_eq!(connection.server_name.as_deref(), Some("vault.internal"));
    assert_eq!(connection.skip_verify, Some(false));
    assert!(
        matches!(&connection.ca, Some(Pem::Text(text)) if text.starts_with("-----BEGIN CERTIFICATE-----\n"))
    );
    let client = connection.client_certificate.as_ref().unwrap();
    assert_eq!(client.certificate.to_str(), Some("/etc/fuse-secrets/client.pem"));
    assert_eq!(client.key.to_str(), Some("/etc/fuse-secrets/client.key"));
    let login = &class.settings.login;
    assert_eq!(login.mount.as_deref(), Some("kubernetes"));
    assert_eq!((login.role.as_deref(), login.audience.as_deref()), (Some("shop"), Some("vault")));
    let freshness = class.freshness();
    assert_eq!(freshness.interval, Duration::from_secs(30));
    assert_eq!(freshness.max_age, Duration::from_secs(120));
    assert_eq!(freshness.open_deadline, Duration::from_secs(1));
    assert_eq!(freshness.stale_grace, Some(Duration::from_secs(12 * 3600)));
    assert_eq!(class.settings.ownership, Ownership { uid: None, gid: Some(1000), mode: Some(0o440) });
    assert!(class.warnings.is_empty());

    let [password, ssh, keystore, bundle] = class.files.as_slice() else { panic!("four files") };
    assert_eq!(password.path.as_str(), "db-password");
    assert_eq!(password.request.to_string(), "secret/data/shop/db");
    assert_eq!(password.key.as_deref(), Some("password"));
    assert_eq!(ssh.request.query.as_deref(), Some("version=3"));
    assert_eq!(ssh.ownership, Ownership { uid: Some(1000), gid: None, mode: Some(0o600) });
    assert_eq!(keystore.encoding, Encoding::Base64);
    assert_eq!((bundle.request.method, bundle.key.as_ref()), (Method::Post, None));
    assert_eq!(bundle.request.args.as_deref(), Some(r#"{"common_name":"shop.example","ttl":"24h"}"#));
}

#[test]
fn every_field_of_a_secrets_store_import_arrives() {
    let class = one(IMPORT);
    assert_eq!((class.kind, class.full_name().as_str()), (Kind::SecretsStoreImport, "app-ns/app"));
    let connection = &class.settings.connection;
    assert_eq!(connection.addresses.as_ref().unwrap()[0].to_string(), "https://stronghold.example:8300");
    assert_eq!(connection.namespace.as_deref(), Some("team-a"));
    assert_eq!(connection.skip_verify, Some(false));
    assert!(matches!(connection.ca, Some(Pem::Text(_))));
    let login = &class.settings.login;
    assert_eq!(login.mount.as_deref(), Some("kubernetes_local"));
    assert_eq!((login.role.as_deref(), login.audience.as_deref()), (Some("app-role"), Some("stronghold")));
    let freshness = class.settings.freshness;
    assert_eq!(freshness.interval, Some(Duration::from_secs(120)));
    assert_eq!(freshness.max_age, Some(Duration::from_secs(300)));
    assert_eq!(freshness.open_deadline, Some(Duration::from_millis(500)));
    assert_eq!(freshness.stale_grace, Some(Grace::Unlimited));
    assert_eq!(class.settings.ownership, Ownership { uid: Some(0), gid: Some(1000), mode: Some(0o440) });
    let [password, keytab] = class.files.as_slice() else { panic!("two files") };
    assert_eq!((password.path.as_str(), password.encoding), ("db-password", Encoding::Utf8));
    assert_eq!((keytab.key.as_deref(), keytab.encoding), (Some("keytab"), Encoding::Base64));
}

#[test]
fn openbao_prefixes_are_read_for_openbao_only() {
    let class = one(OPENBAO);
    assert_eq!(
        class.settings.connection.addresses.as_ref().unwrap()[0].to_string(),
        "https://openbao.example:8200"
    );
    assert_eq!(class.settings.login.mount.as_deref(), Some("kubernetes"));
    let vault = provider_class("baoAddress: https://a", ONE_OBJECT, "");
    refused(&vault, "spec.parameters.baoAddress", "parameter of the provider openbao");
    let both = OPENBAO.replace("baoAddress:", "vaultAddress: https://a\n    openbaoAddress:");
    refused(&both, "spec.parameters.openbaoAddress", "stands beside vaultAddress");
}

#[test]
fn decode_base64_of_a_class_made_by_deckhouse_is_honoured_without_a_warning() {
    let class = one(MADE);
    assert_eq!(class.files[0].encoding, Encoding::Utf8);
    assert_eq!(class.files[1].encoding, Encoding::Base64);
    assert_eq!(class.settings.login.mount.as_deref(), Some("kube/a"));
    assert!(class.warnings.is_empty());
}

#[test]
fn secret_objects_are_a_warning_and_no_fault() {
    let synced =
        "secretObjects: [{secretName: s, type: Opaque, labels: {a: b}, data: [{objectName: a, key: k}]}]";
    let class = one(&provider_class("", ONE_OBJECT, synced));
    assert!(class.warnings[0].text.starts_with("not synced yet"));
    let twice = "secretObjects: [{data: [{objectName: a, decodeBase64: true}]}]";
    let objects = "- {objectName: a, secretPath: s/a, encoding: hex}";
    refused(&provider_class("", objects, twice), "spec.parameters.objects[0].encoding", "decode twice");
    let other = "secretObjects: [{data: [{objectName: b, decodeBase64: true}]}]";
    refused(
        &provider_class("", ONE_OBJECT, other),
        "spec.secretObjects[0].data[0].objectName",
        "names no object",
    );
}

#[test]
fn unsafe_transport_is_a_warning() {
    let class =
        one(&provider_class("vaultAddress: http://v:8200\nvaultSkipTLSVerify: \"true\"", ONE_OBJECT, ""));
    assert_eq!(
        class.warnings.iter().map(|w| w.field.as_str()).collect::<Vec<_>>(),
        ["spec.parameters.vaultSkipTLSVerify", "spec.parameters.vaultAddress"]
    );
}

#[test]
fn each_parameter_is_refused_by_name() {
    let rows = [
        ("vaultAddress: vault:8200", "vaultAddress", "scheme"),
        ("vaultAddress: https://a/v1", "vaultAddress", "path"),
        ("vaultNamespace: a b", "vaultNamespace", "one word"),
        ("vaultAuthMountPath: auth/kubernetes", "vaultAuthMountPath", "begins with auth/"),
        ("vaultAuthMountPath: a\nvaultKubernetesMountPath: a", "vaultAuthMountPath", "stands beside"),
        ("audience: [a]", "audience", "not text"),
        ("vaultSkipTLSVerify: maybe", "vaultSkipTLSVerify", "neither true nor false"),
        ("vaultSkipTLSVerify: true", "vaultSkipTLSVerify", "not text"),
        ("vaultCACertPath: ca.pem", "vaultCACertPath", "absolute"),
        ("vaultCADirectory: ca", "vaultCADirectory", "absolute"),
        ("vaultCACertPath: /a\nvaultCADirectory: /b", "vaultCADirectory", "stands beside vaultCACertPath"),
        ("vaultCACert: /etc/ca.pem", "vaultCACert", "no PEM certificate"),
        (
            "vaultCACert: \"-----BEGIN CERTIFICATE-----\\n%%%\\n-----END CERTIFICATE-----\"",
            "vaultCACert",
            "does not decode",
        ),
        ("vaultTLSClientCertPath: /a", "vaultTLSClientCertPath", "stands alone"),
        ("vaultTLSClientKeyPath: /a", "vaultTLSClientKeyPath", "stands alone"),
        ("refreshInterval: \"30\"", "refreshInterval", "no unit"),
        ("refreshInterval: 30", "refreshInterval", "not text"),
        ("refreshInterval: 100ms", "refreshInterval", "outside 1s to 1d"),
        ("maxAge: 2d", "maxAge", "outside 1s to 1d"),
        ("openDeadline: 6s", "openDeadline", "outside 0s to 5s"),
        ("staleGrace: forever", "staleGrace", "not a duration"),
        ("uid: root", "uid", "not a numeric id"),
        ("gid: \"4294967295\"", "gid", "not a numeric id"),
        ("mode: \"0755\"", "mode", "other than read and write"),
        ("vaultAdress: https://a", "vaultAdress", "unknown"),
    ];
    for (parameter, field, rule) in rows {
        let field = format!("spec.parameters.{field}");
        refused(&provider_class(parameter, ONE_OBJECT, ""), &field, rule);
    }
}

#[test]
fn each_field_of_an_object_is_refused_by_name() {
    let rows = [
        ("{secretPath: s}", "objectName", "missing"),
        ("{objectName: '', secretPath: s}", "objectName", "empty"),
        ("{objectName: /a, secretPath: s}", "objectName", "relative"),
        ("{objectName: a/../b, secretPath: s}", "objectName", "begins with"),
        ("{objectName: ..data, secretPath: s}", "objectName", "begins with"),
        ("{objectName: a//b, secretPath: s}", "objectName", "empty part"),
        ("{objectName: a}", "secretPath", "missing"),
        ("{objectName: a, secretPath: s/../t}", "secretPath", "empty part"),
        ("{objectName: a, secretPath: s, secretKey: 5}", "secretKey", "not text"),
        ("{objectName: a, secretPath: s, method: PATCH}", "method", "unknown"),
        ("{objectName: a, secretPath: s, secretArgs: {b: c}}", "secretArgs", "belongs to no GET"),
        ("{objectName: a, secretPath: s, method: PUT, secretArgs: [c]}", "secretArgs", "not a mapping"),
        (
            "{objectName: a, secretPath: s, filePermission: 0755}",
            "filePermission",
            "other than read and write",
        ),
        ("{objectName: a, secretPath: s, filePermission: 0888}", "filePermission", "octal"),
        ("{objectName: a, secretPath: s, filePermission: 644}", "filePermission", "decimal to YAML"),
        ("{objectName: a, secretPath: s, encoding: base32}", "encoding", "unknown"),
        ("{objectName: a, secretPath: s, uid: -1}", "uid", "not a numeric id"),
        ("{objectName: a, secretPath: s, secretkey: k}", "secretkey", "unknown"),
    ];
    for (object, field, rule) in rows {
        let field = format!("spec.parameters.objects[0].{field}");
        refused(&provider_class("", &format!("- {object}"), ""), &field, rule);
    }
}

#[test]
fn objects_that_are_no_list_of_files_are_refused() {
    refused(&provider_class("", "", ""), "spec.parameters.objects", "empty");
    refused(&provider_class("", "# none", ""), "spec.parameters.objects", "lists no file");
    refused(&provider_class("", "[]", ""), "spec.parameters.objects", "lists no file");
    refused(&provider_class("", "a: b", ""), "spec.parameters.objects", "not a list");
    refused(&provider_class("", "- a", ""), "spec.parameters.objects[0]", "not a mapping");
    refused(&provider_class("", "- {", ""), "spec.parameters.objects", "inside the block, line 1");
    let list = provider_class("", ONE_OBJECT, "").replace("objects: |", "objects:");
    refused(&list, "spec.parameters.objects", "not text");
}

#[test]
fn paths_of_one_class_go_together() {
    let twice = "- {objectName: a, secretPath: s}\n- {objectName: a, secretPath: t}";
    refused(&provider_class("", twice, ""), "spec.parameters.objects[1].objectName", "appears twice: a");
    let below = "- {objectName: a/b/c, secretPath: s}\n- {objectName: a/b, secretPath: t}";
    refused(&provider_class("", below, ""), "spec.parameters.objects[0].objectName", "lies below a/b");
    let wrong = "- {objectName: a, secretPath: s/../t}\n- {objectName: a, secretPath: t}";
    assert_eq!(faults(&provider_class("", wrong, "")).len(), 2);
    let imports = "[{name: a, source: {path: p, key: k}}, {name: a, source: {path: q, key: k}}]";
    refused(&import("", imports), "spec.files[1].name", "appears twice: a");
    let many: String = (0..=MAX_FILES).map(|i| format!("- {{objectName: f{i}, secretPath: s}}\n")).collect();
    refused(&provider_class("", &many, ""), "spec.parameters.objects", "more than 2000");
    let thousand: String = (0..1_000).map(|i| format!("- {{objectName: f{i}, secretPath: s}}\n")).collect();
    assert_eq!(one(&provider_class("", &thousand, "")).files.len(), 1_000);
}

#[test]
fn the_frame_of_a_document_is_refused_by_name() {
    let good = provider_class("", ONE_OBJECT, "");
    let rows = [
        (good.replace("provider: vault", "provider: azure"), "spec.provider", "does not replace"),
        (good.replace("  provider: vault\n", ""), "spec.provider", "missing"),
        (good.replace("roleName: r", "roleName: ''"), "spec.parameters.roleName", "empty"),
        (good.replace("    roleName: r\n", ""), "spec.parameters.roleName", "missing"),
        (good.replace("name: c,", ""), "metadata.name", "missing"),
        (good.replace("name: c,", "name: C_1,"), "metadata.name", "not a Kubernetes name"),
        (good.replace("metadata:", "metdata:"), "metadata", "missing"),
        (good.replace("csi.x-k8s.io/v1", "csi.x-k8s.io/v2"), "apiVersion", "not one of"),
        (good.replace("kind: SecretProviderClass", "kind: Deployment"), "kind", "Deployment is not a class"),
        (good.replace("kind: SecretProviderClass\n", ""), "kind", "missing"),
        (format!("{good}extra: 1\n"), "extra", "unknown"),
        (provider_class("", ONE_OBJECT, "extra: 1"), "spec.extra", "unknown"),
        (
            good.replace("namespace: n", "annotations: {fuse-secrets/maxage: 1m}"),
            "metadata.fuse-secrets/maxage",
            "",
        ),
        ("[a]".to_owned(), "", "not a mapping"),
        (String::new(), "", "has no document"),
        (format!("{good}---\n{good}"), "metadata.name", "twice"),
    ];
    for (text, field, rule) in rows {
        if field == "metadata" {
            assert!(faults(&text).iter().any(|(found, _)| found == "metdata"));
        } else if let Some(name) = field.strip_prefix("metadata.fuse") {
            refused(&text, &format!("metadata.annotations.fuse{name}"), "unknown");
        } else {
            refused(&text, field, rule);
        }
    }
    assert!(parse(&good.replace("csi.x-k8s.io/v1", "csi.x-k8s.io/v1alpha1")).is_ok());
}

#[test]
fn each_field_of_an_import_is_refused_by_name() {
    let rows = [
        (import("", "[]"), "spec.files", "lists no file"),
        (import("", "~"), "spec.files", "missing"),
        (import("", "a"), "spec.files", "not a list"),
        (import("", "[{source: {path: p, key: k}}]"), "spec.files[0].name", "missing"),
        (import("", "[{name: a/b, source: {path: p, key: k}}]"), "spec.files[0].name", "not allowed here"),
        (import("", "[{name: .., source: {path: p, key: k}}]"), "spec.files[0].name", "begins with"),
        (import("", "[{name: ., source: {path: p, key: k}}]"), "spec.files[0].name", "empty part"),
        (import("", "[{name: a}]"), "spec.files[0].source", "missing"),
        (import("", "[{name: a, source: {key: k}}]"), "spec.files[0].source.path", "missing"),
        (import("", "[{name: a, source: {path: p}}]"), "spec.files[0].source.key", "missing"),
        (
            import("", "[{name: a, source: {path: 'p?version=1', key: k}}]"),
            "spec.files[0].source.path",
            "not allowed",
        ),
        (import("", "[{name: a, source: {path: p, key: 'k k'}}]"), "spec.files[0].source.key", "not allowed"),
        (
            import("", "[{name: a, decodebase64: true, source: {path: p, key: k}}]"),
            "spec.files[0].decodebase64",
            "unknown",
        ),
        (
            import("", "[{name: a, decodeBase64: 'true', source: {path: p, key: k}}]"),
            "spec.files[0].decodeBase64",
            "boolean",
        ),
        (import("caCert: nothing", ONE_FILE), "spec.caCert", "no PEM"),
        (import("address: vault", ONE_FILE), "spec.address", "not a URL"),
        (import("authPath: 'a b'", ONE_FILE), "spec.authPath", "not a path"),
        (import("namespace: 'a b'", ONE_FILE), "spec.namespace", "not allowed"),
        (import("skipTLSVerify: 'yes'", ONE_FILE), "spec.skipTLSVerify", "boolean"),
        (import("audience: 5", ONE_FILE), "spec.audience", "not text"),
        (import("rolle: r", ONE_FILE), "spec.rolle", "unknown"),
        (import("", ONE_FILE).replace("role: r", "role: 'r r'"), "spec.role", "not allowed"),
        (import("", ONE_FILE).replace("type: CSI", "type: ENV"), "spec.type", "not CSI"),
        (import("", ONE_FILE).replace("  type: CSI\n", ""), "spec.type", "missing"),
    ];
    for (text, field, rule) in rows {
        refused(&text, field, rule);
    }
    assert_eq!(one(&import("", ONE_FILE)).files.len(), 1);
}

#[test]
fn a_setting_at_two_places_is_refused() {
    let text = PROVIDER_CLASS.replace("    gid: \"1000\"", "    staleGrace: 1h\n    gid: \"1000\"");
    refused(&text, "spec.parameters.staleGrace", "stands beside the annotation fuse-secrets/stale-grace");
}

#[test]
fn a_greatest_age_below_the_interval_is_refused() {
    refused(&provider_class("maxAge: 30s", ONE_OBJECT, ""), "maxAge", "below the refresh interval of 1m");
}

#[test]
fn all_faults_of_all_documents_are_reported_at_once() {
    let bad =
        provider_class("vaultAddress: nowhere\nmaxAge: \"5\"\ncolour: red", "- {objectName: /a}\n- {}", "");
    let worse = import("skipTLSVerify: 1", "[{name: a b}]");
    let found = parse(&format!("{bad}---\n{worse}")).unwrap_err();
    let found: Vec<_> = found.iter().map(|fault| (fault.document.as_str(), fault.field.as_str())).collect();
    let expected = [
        ("SecretProviderClass n/c", "spec.parameters.maxAge"),
        ("SecretProviderClass n/c", "spec.parameters.vaultAddress"),
        ("SecretProviderClass n/c", "spec.parameters.objects[0].objectName"),
        ("SecretProviderClass n/c", "spec.parameters.objects[0].secretPath"),
        ("SecretProviderClass n/c", "spec.parameters.objects[1].objectName"),
        ("SecretProviderClass n/c", "spec.parameters.objects[1].secretPath"),
        ("SecretProviderClass n/c", "spec.parameters.colour"),
        ("SecretsStoreImport n/c", "spec.skipTLSVerify"),
        ("SecretsStoreImport n/c", "spec.files[0].name"),
        ("SecretsStoreImport n/c", "spec.files[0].source"),
    ];
    assert_eq!(found, expected);
}

#[test]
fn what_kubectl_prints_is_read() {
    let item = provider_class("", ONE_OBJECT, "");
    let value: Value = yaml::documents(&item).unwrap().remove(0);
    let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": [value], "metadata": {}});
    assert_eq!(one(&list.to_string()), one(&item));
}

#[test]
fn equal_arguments_in_another_order_are_one_request() {
    let args = |text: &str| {
        let objects =
            format!("- {{objectName: a, secretPath: pki/issue/a, method: post, secretArgs: {text}}}");
        one(&provider_class("", &objects, "")).files.remove(0).request
    };
    assert_eq!(args("{b: {d: 1, c: 2}, a: x}"), args("{a: x, b: {c: 2, d: 1}}"));
    assert_ne!(args("{a: x}"), args("{a: y}"));
    assert_eq!(args("{}").args, None);
}

fn spec_of(class: Class, over: &Settings, under: &Settings) -> Result<VolumeSpec, Faults> {
    class.into_spec(over, under, Subject::Local("test".to_owned()))
}

#[test]
fn the_mount_wins_over_the_class_and_the_class_over_the_configuration() {
    let class = one(&provider_class("vaultAddress: https://class\nrefreshInterval: 10s", ONE_OBJECT, ""));
    let address = |text: &str| Some(vec![crate::reference::Address::parse(text).unwrap()]);
    let mut over = Settings::default();
    over.connection.addresses = address("https://flag");
    let mut under = Settings::default();
    under.connection.addresses = address("https://file");
    under.connection.namespace = Some("from-file".to_owned());
    under.freshness.interval = Some(Duration::from_secs(20));
    let spec = spec_of(class.clone(), &over, &under).unwrap();
    assert_eq!(spec.identity.connection.addresses[0].to_string(), "https://flag");
    assert_eq!(spec.identity.connection.namespace.as_deref(), Some("from-file"));
    assert_eq!(spec.freshness.interval, Duration::from_secs(10));
    assert_eq!(spec.class, "n/c");
    let spec = spec_of(class, &Settings::default(), &under).unwrap();
    assert_eq!(spec.identity.connection.addresses[0].to_string(), "https://class");
    assert_eq!((spec.identity.auth.mount.as_str(), spec.identity.auth.role.as_str()), ("kubernetes", "r"));
}

#[test]
fn a_token_takes_neither_mount_nor_role_from_the_class() {
    let class = one(&provider_class("vaultAddress: https://a\nvaultAuthMountPath: k8s", ONE_OBJECT, ""));
    let mut over = Settings::default();
    over.login.method = Some(AuthMethod::Token);
    let auth = spec_of(class.clone(), &over, &Settings::default()).unwrap().identity.auth.clone();
    assert_eq!((auth.mount.as_str(), auth.role.as_str()), ("", ""));
    over.login.method = Some(AuthMethod::AppRole);
    over.login.role = Some("role-id".to_owned());
    let auth = spec_of(class.clone(), &over, &Settings::default()).unwrap().identity.auth.clone();
    assert_eq!((auth.mount.as_str(), auth.role.as_str()), ("approle", "role-id"));
    over.login = LoginSettings { method: Some(AuthMethod::Jwt), ..LoginSettings::default() };
    let auth = spec_of(class, &over, &Settings::default()).unwrap().identity.auth.clone();
    assert_eq!((auth.mount.as_str(), auth.role.as_str()), ("k8s", "r"));
}

#[test]
fn what_nobody_said_is_reported_with_the_flag_that_says_it() {
    let class = one(&provider_class("", ONE_OBJECT, ""));
    let found = spec_of(class, &Settings::default(), &Settings::default()).unwrap_err();
    assert!(found.to_string().contains("SecretProviderClass n/c: address: is not given; give --address"));
}

#[test]
fn no_fault_repeats_a_value() {
    const CANARY: &str = "cAnArY-7f3a";
    let texts = [
        provider_class(&format!("vaultCACert: {CANARY}"), ONE_OBJECT, ""),
        provider_class(&format!("vaultCACert: {{{CANARY}: {CANARY}}}"), ONE_OBJECT, "")
            .replace("{cAn", "{a: cAn"),
        provider_class(
            "",
            &format!("- {{objectName: a, secretPath: s, secretArgs: {{password: {CANARY}}}}}"),
            "",
        ),
        provider_class("", &format!("- {{objectName: a, secretPath: s, secretArgs: {CANARY}}}"), ""),
        provider_class("", &format!("- {{objectName: a, secretPath: s, secretKey: [{CANARY}]}}"), ""),
        provider_class("", &format!("- {{objectName: a, secretPath: '{CANARY}#'}}"), ""),
        provider_class("", &format!("- {{objectName: a, secretPath: s, method: {CANARY}}}"), ""),
        provider_class("", &format!("- {{objectName: a, secretPath: s, encoding: {CANARY}}}"), ""),
        provider_class("", &format!("- {CANARY}: [{CANARY}"), ""),
        provider_class("", CANARY, ""),
        provider_class("", &format!("a: !{CANARY} 1\nb: *{CANARY}"), ""),
        provider_class(&format!("vaultAddress: https://user:{CANARY}@host"), ONE_OBJECT, ""),
        provider_class(
            &format!("mode: {CANARY}\nuid: {CANARY}\nmaxAge: {CANARY}\nstaleGrace: {CANARY}"),
            ONE_OBJECT,
            "",
        ),
        import(&format!("caCert: {CANARY}"), ONE_FILE),
        import(&format!("skipTLSVerify: {CANARY}"), ONE_FILE),
        format!("a: {{{CANARY}: 1, {CANARY}: 2}}"),
        format!("a: \"{CANARY}"),
        format!("a: .nan\n{CANARY}"),
    ];
    for text in texts {
        let found = parse(&text).expect_err(&text);
        assert!(!format!("{found} {found:?}").contains(CANARY), "{found}\n{text}");
    }
}

/// Pointers to every value of a document, mappings and lists too.
fn pointers(value: &Value, at: String, into: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(name, value)| (name.replace('/', "~1"), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    into.push(at.clone());
    for (name, child) in children {
        pointers(child, format!("{at}/{name}"), into);
    }
}

/// Puts a canary in place of each value of each example in turn, inside `objects` too, as text, with odd characters, and in a
/// list. Only names of files and kinds, which are no values, may be shown.
#[test]
fn no_fault_repeats_a_value_wherever_it_stands() {
    const CANARY: &str = "cAnArY-7f3a";
    const NAMES: [&str; 2] = ["objectName", "kind"];
    let mut refused = 0;
    for example in [PROVIDER_CLASS, OPENBAO, MADE, IMPORT] {
        let mut document: Value = yaml::documents(example).unwrap().remove(0);
        let objects = document.pointer("/spec/parameters/objects").and_then(Value::as_str);
        if let Some(list) = objects.map(|text| yaml::documents(text).unwrap().remove(0)) {
            *document.pointer_mut("/spec/parameters/objects").unwrap() = list;
        }
        let mut all = Vec::new();
        pointers(&document, String::new(), &mut all);
        for pointer in all.iter().filter(|pointer| !NAMES.iter().any(|name| pointer.ends_with(name))) {
            for canary in [
                CANARY.into(),
                format!(" {CANARY}#\n").into(),
                serde_json::json!([CANARY]),
                serde_json::json!({"a": CANARY}),
            ] {
                let mut bad = document.clone();
                *bad.pointer_mut(pointer).unwrap() = canary;
                if let Some(objects) =
                    bad.pointer_mut("/spec/parameters/objects").filter(|value| !value.is_string())
                {
                    *objects = objects.to_string().into();
                }
                if let Err(faults) = Class::read(&bad, 1) {
                    refused += 1;
                    assert!(!format!("{faults} {faults:?}").contains(CANARY), "{pointer}: {faults}");
                }
            }
        }
    }
    assert!(refused > 200, "the canary met {refused} faults only");
}

#[test]
fn a_field_name_cannot_steer_a_terminal() {
    let text = provider_class("\"a\\e[31m\\nb\": c", ONE_OBJECT, "");
    let found = parse(&text).unwrap_err().to_string();
    assert!(!found.contains('\u{1b}') && found.lines().count() == 1, "{found:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn no_text_makes_the_parser_panic(text in "([ \n\\-:|>&*!?{}\\[\\]\"'#,%@`]|[a-z]{1,4}|\\PC){0,200}") {
        let _ = parse(&text);
        let _ = parse(&provider_class("", &text, ""));
    }

    /// Cut, doubled and overwritten examples: whatever comes out has files and, if refused, faults.
    #[test]
    fn no_mutation_of_an_example_makes_the_parser_panic(
        which in 0..4_usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8, "\\PC{0,6}"), 1..6),
    ) {
        let mut text: Vec<char> = [PROVIDER_CLASS, OPENBAO, MADE, IMPORT][which].chars().collect();
        for (at, edit, with) in edits {
            if text.is_empty() { break; }
            let at = at.index(text.len());
            let end = (at + 7).min(text.len());
            match edit {
                0 => { text.drain(at..end); }
                1 => { text.splice(at..at, with.chars()); }
                2 => { text.splice(at..end, with.chars()); }
                _ => { let part = text[at..end].to_vec(); text.splice(at..at, part); }
            }
        }
        let text: String = text.into_iter().collect();
        match parse(&text) {
            Ok(classes) => prop_assert!(classes.iter().all(|class| !class.files.is_empty())),
            Err(faults) => prop_assert!(faults.iter().len() > 0),
        }
    }
}

/// Documents as people have them. What each is to give stands at its head: `# files: 2`, `# warning: FIELD`, `# fault: FIELD`.
#[test]
fn documents_of_both_kinds_give_files_and_warnings_or_every_fault_at_once() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/classes");
    for (directory, kind) in [
        ("secret-provider-class", Kind::SecretProviderClass),
        ("secrets-store-import", Kind::SecretsStoreImport),
    ] {
        let mut count = 0;
        for entry in std::fs::read_dir(root.join(directory)).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let head = |what: &str| -> Vec<String> {
                let lines = text.lines().filter_map(|line| line.strip_prefix(what)).map(str::to_owned);
                let mut lines: Vec<_> = lines.collect();
                lines.sort();
                lines
            };
            count += 1;
            match parse(&text) {
                Ok(classes) => {
                    assert_eq!(head("# fault: "), [""; 0], "{}", path.display());
                    let [class] = classes.as_slice() else { panic!("{}: several", path.display()) };
                    assert_eq!(class.kind, kind);
                    let mut warnings: Vec<_> = class.warnings.iter().map(|it| it.field.clone()).collect();
                    warnings.sort();
                    assert_eq!(head("# files: "), [class.files.len().to_string()], "{}", path.display());
                    assert_eq!(head("# warning: "), warnings, "{}", path.display());
                }
                Err(faults) => {
                    let mut fields: Vec<_> = faults.iter().map(|fault| fault.field.clone()).collect();
                    fields.sort();
                    assert_eq!(head("# fault: "), fields, "{}: {faults}", path.display());
                }
            }
        }
        assert!(count >= 12, "{directory}: {count}");
    }
}
