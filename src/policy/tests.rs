use super::*;
use crate::class::parse;
use crate::config::{AgentConfig, Layer};

const PEM: &str = include_str!("../../examples/classes/secret-provider-class.yaml");

fn provider_class(provider: &str, parameters: &[(&str, &str)]) -> Class {
    let mut all = serde_json::json!({
        "roleName": "web", "objects": "[{objectName: a, secretPath: secret/data/a, secretKey: k}]",
    });
    for (name, value) in parameters {
        all[*name] = (*value).into();
    }
    one(&serde_json::json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
        "metadata": {"name": "app", "namespace": "shop"}, "spec": {"provider": provider, "parameters": all},
    }))
}

fn import(spec: &[(&str, Value)]) -> Class {
    let mut all = serde_json::json!({
        "type": "CSI", "role": "web", "files": [{"name": "a", "source": {"path": "secret/data/a", "key": "k"}}],
    });
    for (name, value) in spec {
        all[*name] = value.clone();
    }
    one(&serde_json::json!({
        "apiVersion": "deckhouse.io/v1alpha1", "kind": "SecretsStoreImport",
        "metadata": {"name": "app", "namespace": "shop"}, "spec": all,
    }))
}

fn one(document: &Value) -> Class {
    parse(&document.to_string()).unwrap_or_else(|faults| panic!("{faults}")).remove(0)
}

fn pem() -> String {
    let document = yaml::documents(PEM).unwrap().remove(0);
    document.pointer("/spec/parameters/vaultCACert").and_then(Value::as_str).unwrap().to_owned()
}

fn config(more: &str) -> Result<AgentConfig, Faults> {
    let file = Layer::from_yaml(&format!("classes: /classes\n{more}"))?;
    AgentConfig::resolve(Layer::default(), Layer::default(), file)
}

/// Fields that are refused, of a class in this namespace.
fn refused_in(namespace: &str, class: &Class, settings: &str) -> Vec<String> {
    let config = config(settings).unwrap_or_else(|faults| panic!("{faults}"));
    match config.policy.check(class, namespace, &config.under) {
        Ok(()) => Vec::new(),
        Err(faults) => faults.iter().map(|fault| fault.field.clone()).collect(),
    }
}

fn refused(class: &Class, settings: &str) -> Vec<String> {
    refused_in("shop", class, settings)
}

/// Every parameter that leads somewhere, and the setting under which it is the agent's own.
fn everything() -> Vec<(&'static str, String)> {
    [
        ("vaultAddress", "https://other.example:8200"),
        ("vaultNamespace", "team-a"),
        ("vaultAuthMountPath", "k8s-b"),
        ("vaultTLSServerName", "vault.internal"),
        ("vaultTLSClientCertPath", "/tls/shop/client.pem"),
        ("vaultTLSClientKeyPath", "/tls/shop/client.key"),
        ("vaultSkipTLSVerify", "true"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .into_iter()
    .chain([("vaultCACert", pem())])
    .collect()
}

#[test]
fn without_a_list_a_class_leads_nowhere_but_where_the_agent_is_told_to_ask() {
    let all = everything();
    let all: Vec<(&str, &str)> = all.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut expected: Vec<String> = all.iter().map(|(name, _)| format!("spec.parameters.{name}")).collect();
    let mut found = refused(&provider_class("vault", &all), "address: https://vault.example:8200");
    (expected.sort(), found.sort());
    assert_eq!(found, expected);
    for parameter in &all {
        if !parameter.0.starts_with("vaultTLSClient") {
            let class = provider_class("vault", std::slice::from_ref(parameter));
            assert_eq!(refused(&class, ""), [format!("spec.parameters.{}", parameter.0)]);
        }
    }
    assert_eq!(refused(&provider_class("vault", &[("audience", "team")]), ""), [""; 0]);
    assert_eq!(refused(&import(&[]), ""), [""; 0]);
}

#[test]
fn what_the_agents_own_configuration_says_may_be_repeated() {
    let class = provider_class(
        "vault",
        &[
            ("vaultAddress", "https://b.example:8200/"),
            ("vaultNamespace", "team-a"),
            ("vaultKubernetesMountPath", "k8s-b"),
            ("vaultTLSServerName", "vault.internal"),
            ("vaultCACertPath", "/etc/ca.pem"),
            ("vaultTLSClientCertPath", "/etc/client.pem"),
            ("vaultTLSClientKeyPath", "/etc/client.key"),
            ("vaultSkipTLSVerify", "true"),
        ],
    );
    let settings = "address: [https://a.example:8200, https://b.example:8200]\nnamespace: team-a\nauthMount: k8s-b\n\
                    serverName: vault.internal\nca: /etc/ca.pem\nclientCert: /etc/client.pem\nclientKey: /etc/client.key\n\
                    skipVerify: true\n";
    assert_eq!(refused(&class, settings), [""; 0]);
    let other = settings.replace("/etc/client.key", "/etc/other.key");
    assert_eq!(
        refused(&class, &other),
        ["spec.parameters.vaultTLSClientCertPath", "spec.parameters.vaultTLSClientKeyPath"]
    );
    for (settings, mount) in [("", "kubernetes"), ("authMethod: jwt", "jwt")] {
        assert_eq!(refused(&provider_class("vault", &[("vaultAuthMountPath", mount)]), settings), [""; 0]);
    }
    let verifying = provider_class("vault", &[("vaultSkipTLSVerify", "false")]);
    assert_eq!(
        refused(&verifying, "skipVerify: true"),
        [""; 0],
        "to be stricter is no matter of the operator's"
    );
}

#[test]
fn the_list_allows_for_its_namespaces_what_it_names_and_nothing_else() {
    let all = everything();
    let all: Vec<(&str, &str)> = all.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let class = provider_class("vault", &all);
    let list = "classFiles: /tls\nallow:\n- namespaces: [shop, \"team-*\"]\n  addresses: [https://other.example:8200]\n  \
                storeNamespaces: [\"team-?\", \"team-*\"]\n  authMounts: [\"k8s-*\"]\n  serverNames: [vault.internal]\n  \
                files: [\"shop/*\"]\n  ca: true\n  skipVerify: true\n";
    for namespace in ["shop", "team-", "team-a"] {
        assert_eq!(refused_in(namespace, &class, list), [""; 0], "{namespace}");
    }
    for namespace in ["shops", "ashop", "team", "other"] {
        assert_eq!(refused_in(namespace, &class, list).len(), all.len(), "{namespace}");
    }
    // Each line of it counts for itself.
    for (line, fields) in [
        ("  addresses: [https://other.example:8200]\n", &["vaultAddress"][..]),
        ("  storeNamespaces: [\"team-?\", \"team-*\"]\n", &["vaultNamespace"]),
        ("  authMounts: [\"k8s-*\"]\n", &["vaultAuthMountPath"]),
        ("  serverNames: [vault.internal]\n", &["vaultTLSServerName"]),
        ("  files: [\"shop/*\"]\n", &["vaultTLSClientCertPath", "vaultTLSClientKeyPath"]),
        ("classFiles: /tls\n", &["vaultTLSClientCertPath", "vaultTLSClientKeyPath"]),
        ("  ca: true\n", &["vaultCACert"]),
        ("  skipVerify: true\n", &["vaultSkipTLSVerify"]),
    ] {
        let fields: Vec<String> = fields.iter().map(|field| format!("spec.parameters.{field}")).collect();
        assert!(list.contains(line), "{line}");
        assert_eq!(refused(&class, &list.replace(line, "")), fields, "{line}");
    }
}

#[test]
fn addresses_are_compared_whole_and_a_star_alone_is_any() {
    let refuses = |address: &str, list: &str| {
        let list = format!("allow: [{{namespaces: [\"*\"], addresses: [{list}]}}]");
        !refused(&provider_class("vault", &[("vaultAddress", address)]), &list).is_empty()
    };
    let listed = "https://vault.example, http://plain.example:8200";
    for same in [
        "https://vault.example",
        "https://vault.example:443/",
        "https://VAULT.example",
        "http://plain.example:8200",
    ] {
        assert!(!refuses(same, listed), "{same}");
    }
    for other in [
        "http://vault.example",
        "https://vault.example:8200",
        "https://vault.example.evil.example",
        "https://evil-vault.example",
        "https://plain.example:8200",
    ] {
        assert!(refuses(other, listed), "{other}");
        assert!(!refuses(other, "\"*\""), "{other}");
    }
}

#[test]
fn a_file_lies_below_the_directory_or_is_refused_by_its_field() {
    let refuses = |parameter: &str, path: &str, files: &str| {
        let list = format!("classFiles: /tls\nallow: [{{namespaces: [shop], files: [{files}]}}]");
        refused(&provider_class("vault", &[(parameter, path)]), &list)
    };
    for (parameter, path) in [
        ("vaultCACertPath", "/tls/shop/ca.pem"),
        ("vaultCACertPath", "/tls//shop/./ca.pem"),
        ("vaultCADirectory", "/tls/shop/cas/"),
    ] {
        assert_eq!(refuses(parameter, path, "\"shop/*\""), [""; 0], "{path}");
        assert_eq!(
            refuses(parameter, path, "\"other/*\""),
            [format!("spec.parameters.{parameter}")],
            "{path}"
        );
    }
    for path in [
        "/tls",
        "/tls/",
        "/tls/../etc/passwd",
        "/tls/shop/../../etc/passwd",
        "/tlsx/shop/a",
        "/etc/shop/a",
        "/",
    ] {
        assert_eq!(refuses("vaultCACertPath", path, "\"*\""), ["spec.parameters.vaultCACertPath"], "{path}");
    }
    let without = refused(
        &provider_class("vault", &[("vaultCADirectory", "/tls/shop")]),
        "allow: [{namespaces: [\"*\"], files: [\"*\"]}]",
    );
    assert_eq!(without, ["spec.parameters.vaultCADirectory"]);
}

#[test]
fn a_refusal_names_the_field_as_its_author_spelt_it_and_no_value() {
    for (class, field) in [
        (
            provider_class("vault", &[("vaultKubernetesMountPath", "CANARY")]),
            "spec.parameters.vaultKubernetesMountPath",
        ),
        (provider_class("openbao", &[("openbaoNamespace", "CANARY")]), "spec.parameters.openbaoNamespace"),
        (provider_class("openbao", &[("baoAddress", "https://CANARY")]), "spec.parameters.baoAddress"),
        (import(&[("address", "https://CANARY".into())]), "spec.address"),
        (import(&[("namespace", "CANARY".into())]), "spec.namespace"),
        (import(&[("authPath", "CANARY".into())]), "spec.authPath"),
        (import(&[("caCert", pem().into())]), "spec.caCert"),
        (import(&[("skipTLSVerify", true.into())]), "spec.skipTLSVerify"),
    ] {
        assert_eq!(refused(&class, "address: https://vault.example:8200"), [field]);
        let config = config("").unwrap();
        let text = config.policy.check(&class, "shop", &config.under).unwrap_err().to_string();
        assert!(!text.to_lowercase().contains("canary") && text.contains("`allow`"), "{text}");
    }
}

#[test]
fn the_list_is_read_whole_and_each_fault_of_it_has_its_place() {
    let faults = config(
        "allow:\n- namespaces: shop\n  adresses: [a]\n- {addresses: [vault:8200, \"*\", 5], ca: \"yes\"}\n- word\n\
         - {namespaces: [\"\"]}\n",
    )
    .unwrap_err();
    let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "allow[2]",
            "allow[0].namespaces",
            "allow[0].adresses",
            "allow[1].namespaces",
            "allow[1].addresses[2]",
            "allow[1].addresses[0]",
            "allow[1].ca",
            "allow[3].namespaces[0]",
        ]
    );
    assert!(faults.to_string().contains("did you mean addresses?"), "{faults}");
    assert!(!config("allow: word").unwrap_err().to_string().contains("word"));
    let layer = Layer { allow: Some("[{namespaces: [a]".to_owned()), ..Layer::default() };
    let faults = AgentConfig::resolve(layer, Layer::default(), Layer::default()).unwrap_err();
    assert!(faults.iter().any(|fault| fault.field == "--allow"), "{faults}");
}

#[test]
fn a_star_stands_for_any_text() {
    let matches = |glob: &str, text: &str| Glob::parse(glob).unwrap().matches(text);
    for (glob, text) in [
        ("*", ""),
        ("*", "a/b"),
        ("a*", "a"),
        ("a*c", "abc"),
        ("*a*", "xax"),
        ("a*b*c", "abbc"),
        ("a**", "ab"),
        ("a", "a"),
    ] {
        assert!(matches(glob, text), "{glob} {text}");
    }
    for (glob, text) in
        [("a", "ab"), ("a*", "ba"), ("*a", "ab"), ("a*a", "a"), ("a*b*b", "ab"), ("a?c", "abc"), ("A", "a")]
    {
        assert!(!matches(glob, text), "{glob} {text}");
    }
}
