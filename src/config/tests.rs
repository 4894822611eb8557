use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::config::settings::Grace;

fn text(value: &str) -> Option<String> {
    Some(value.to_owned())
}

fn token() -> Layer {
    Layer { token_file: text("/run/token"), ..Layer::default() }
}

fn resolve(flags: Layer) -> Result<Config, Faults> {
    Config::resolve(flags, Layer::default(), Layer::default())
}

fn variables(list: &[(&str, &str)]) -> Result<Layer, Faults> {
    Layer::from_environment(list.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
}

fn fields(faults: &Faults) -> Vec<&str> {
    faults.iter().map(|fault| fault.field.as_str()).collect()
}

#[test]
fn every_setting_has_its_type_and_default() {
    let config = resolve(token()).unwrap();
    assert_eq!(config.limits, Limits::default());
    assert_eq!((config.memory_limit, config.allow_other), (None, None));
    assert_eq!(config.fuse_threads, 1);
    assert_eq!(config.over.freshness, settings::FreshnessSettings::default());

    let all = Layer::from_yaml(
        "address: [https://a:8200, https://b:8200]\nnamespace: team\nca: /ca.pem\nserverName: store\n\
         clientCert: /c.pem\nclientKey: /c.key\nskipVerify: true\nproxy: http://proxy:3128\nauthMethod: jwt\n\
         authMount: team/jwt\nrole: app\njwtFile: /run/jwt\naudience: vault\nrefreshInterval: 30s\nmaxAge: 5m\n\
         openDeadline: 1s\nstaleGrace: 12h\nuid: 1000\ngid: 1000\nmode: 0440\nallowOther: true\ncacheSize: 1MiB\n\
         cacheEntries: 7\ninFlight: 3\nmemoryLimit: 8MiB\nfuseThreads: 2\n",
    )
    .unwrap();
    let config = Config::resolve(Layer::default(), Layer::default(), all).unwrap();
    let connection = &config.under.connection;
    assert_eq!(connection.addresses.as_ref().unwrap().len(), 2);
    assert_eq!(connection.namespace.as_deref(), Some("team"));
    assert_eq!(connection.ca, Some(Pem::File("/ca.pem".into())));
    assert_eq!(connection.server_name.as_deref(), Some("store"));
    assert_eq!(connection.client_certificate.as_ref().unwrap().key, Path::new("/c.key"));
    assert_eq!(connection.skip_verify, Some(true));
    assert_eq!(connection.proxy.as_ref().unwrap().as_str(), "http://proxy:3128/");
    assert_eq!(config.over.login.method, Some(AuthMethod::Jwt));
    assert_eq!(config.under.login.mount.as_deref(), Some("team/jwt"));
    assert_eq!(config.under.login.role.as_deref(), Some("app"));
    assert_eq!(config.under.login.audience.as_deref(), Some("vault"));
    assert_eq!(config.credential, CredentialFile::Jwt("/run/jwt".into()));
    let freshness = config.under.freshness;
    assert_eq!(freshness.interval, Some(Duration::from_secs(30)));
    assert_eq!(freshness.max_age, Some(Duration::from_secs(300)));
    assert_eq!(freshness.open_deadline, Some(Duration::from_secs(1)));
    assert_eq!(freshness.stale_grace, Some(Grace::For(Duration::from_secs(12 * 3600))));
    let ownership = config.under.ownership;
    assert_eq!((ownership.uid, ownership.gid, ownership.mode), (Some(1000), Some(1000), Some(0o440)));
    assert_eq!(config.allow_other, Some(true));
    assert_eq!(config.limits, Limits { bytes: 1 << 20, entries: 7, in_flight: 3 });
    assert_eq!((config.memory_limit, config.fuse_threads), (Some(8 << 20), 2));
    assert_eq!(config.subject(), Subject::Local("jwt-file:/run/jwt".to_owned()));
}

#[test]
fn flags_win_over_environment_and_environment_over_file() {
    let flags = Layer { max_age: text("10m"), ..token() };
    let environment = variables(&[
        ("FUSE_SECRETS_MAX_AGE", "20m"),
        ("FUSE_SECRETS_REFRESH_INTERVAL", "2m"),
        ("FUSE_SECRETS_IN_FLIGHT", "5"),
    ])
    .unwrap();
    let file =
        Layer::from_yaml("maxAge: 30m\nrefreshInterval: 3m\ninFlight: 6\ncacheEntries: 9\nrole: r").unwrap();
    let config = Config::resolve(flags, environment, file).unwrap();
    assert_eq!(config.over.freshness.max_age, Some(Duration::from_secs(600)));
    assert_eq!(config.over.freshness.interval, Some(Duration::from_secs(120)));
    assert_eq!(config.under.freshness.max_age, Some(Duration::from_secs(1800)));
    assert_eq!((config.limits.in_flight, config.limits.entries), (5, 9));
}

#[test]
fn every_fault_of_every_source_is_reported_in_its_spelling_and_without_the_value() {
    const CANARY: &str = "cAnArY-7f3a";
    let canary = || text(CANARY);
    let flags = Layer {
        address: text(&format!("https://u:{CANARY}@host")),
        max_age: canary(),
        mode: canary(),
        proxy: text(&format!("http://u:{CANARY}@host")),
        skip_verify: canary(),
        auth_method: canary(),
        ..token()
    };
    let environment =
        variables(&[("FUSE_SECRETS_CACHE_SIZE", CANARY), ("FUSE_SECRETS_UID", CANARY)]).unwrap();
    let file = Layer::from_yaml(&format!("inFlight: {CANARY}\nca: {CANARY}\nallowOther: {CANARY}")).unwrap();
    let faults = Config::resolve(flags, environment, file).unwrap_err();
    let expected = [
        "--address",
        "--skip-verify",
        "--proxy",
        "--max-age",
        "--mode",
        "--auth-method",
        "FUSE_SECRETS_CACHE_SIZE",
        "FUSE_SECRETS_UID",
        "allowOther",
        "inFlight",
        "ca",
    ];
    assert_eq!(fields(&faults), expected);
    assert!(!format!("{faults} {faults:?}").contains(CANARY));
}

#[test]
fn unknown_settings_are_answered_with_the_likely_one() {
    let faults = variables(&[
        ("FUSE_SECRETS_MAXAGE", "5m"),
        ("FUSE_SECRETS_TEST_BAO", "/bin/bao"),
        ("FUSE_SECRETS_LOG", "debug"),
        ("FUSE_SECRETS_mode", "0440"),
        ("PATH", "/bin"),
    ])
    .err()
    .unwrap();
    assert_eq!(fields(&faults), ["FUSE_SECRETS_MAXAGE", "FUSE_SECRETS_mode"]);
    assert!(faults.to_string().contains("did you mean FUSE_SECRETS_MAX_AGE?"), "{faults}");
    let faults = Layer::from_yaml("maxage: 5m\nuid: [1]\nnonsense: 1").err().unwrap();
    assert_eq!(fields(&faults), ["maxage", "nonsense", "uid"]);
    assert!(faults.to_string().contains("did you mean maxAge?"), "{faults}");
    assert!(Layer::from_yaml("[a]").is_err() && Layer::from_yaml("a: 1\n---\nb: 2").is_err());
    assert!(
        Layer::from_yaml("") == Ok(Layer::default())
            && Layer::from_yaml("# nothing\n") == Ok(Layer::default())
    );
}

#[test]
fn what_kubernetes_says_of_a_service_of_our_name_is_no_setting() {
    let links = [
        ("FUSE_SECRETS_SERVICE_HOST", "10.0.0.1"),
        ("FUSE_SECRETS_SERVICE_PORT_HTTP", "80"),
        ("FUSE_SECRETS_PORT", "tcp://10.0.0.1:80"),
        ("FUSE_SECRETS_METRICS_PORT_9090_TCP_ADDR", "10.0.0.1"),
    ];
    assert!(variables(&links) == Ok(Layer::default()));
}

#[test]
fn a_login_is_whole_or_says_what_is_missing() {
    let said = |layer: Layer| resolve(layer).unwrap_err().to_string();
    assert!(said(Layer::default()).contains("login: is not given; give --token-file"));
    assert!(said(Layer { auth_method: text("jwt"), ..Layer::default() }).contains("give --jwt-file"));
    assert!(said(Layer { auth_method: text("token"), ..Layer::default() }).contains("give --token-file"));
    assert!(said(Layer { secret_id_file: text("s"), ..Layer::default() }).contains("give --role-id"));
    assert!(said(Layer { jwt_file: text("j"), ..token() }).contains("--jwt-file: is a second way to log in"));
    assert!(said(Layer { auth_method: text("jwt"), ..token() }).contains("--token-file: does not belong"));
    assert!(said(Layer { client_key: text("k"), ..token() }).contains("--client-key: has no certificate"));
    assert!(said(Layer { client_cert: text("k"), ..token() }).contains("--client-cert: has no key"));
    assert!(said(Layer { ca: text("a"), ca_directory: text("b"), ..token() }).contains("--ca-directory"));
    let approle = resolve(Layer { role_id: text("id"), ..Layer::default() }).unwrap();
    assert_eq!(approle.credential, CredentialFile::SecretId(None));
    assert_eq!(approle.over.login.role.as_deref(), Some("id"));
}

#[test]
fn a_wider_source_with_another_login_does_not_mix_in() {
    let file = Layer {
        role: text("from-file"),
        jwt_file: text("/run/jwt"),
        auth_mount: text("k8s"),
        ..Layer::default()
    };
    let config = Config::resolve(token(), Layer::default(), file.clone()).unwrap();
    assert_eq!(config.credential, CredentialFile::Token("/run/token".into()));
    assert_eq!(config.under.login, settings::LoginSettings::default());
    let jwt = Layer { jwt_file: text("mine"), ..Layer::default() };
    let config = Config::resolve(jwt, Layer::default(), Layer { auth_method: text("jwt"), ..file }).unwrap();
    assert_eq!(config.credential, CredentialFile::Jwt("mine".into()));
    assert_eq!(config.over.login.method, Some(AuthMethod::Jwt));
    assert_eq!(config.under.login.role.as_deref(), Some("from-file"));
}

#[test]
fn a_relative_path_is_for_the_command_line_only() {
    let relative = Layer { token_file: text("token"), ..Layer::default() };
    assert!(resolve(relative.clone()).is_ok());
    let faults = Config::resolve(Layer::default(), Layer::default(), relative).unwrap_err();
    assert!(faults.to_string().contains("tokenFile: is not an absolute path"), "{faults}");
}

/// clap's view of the settings, as `mount` has it.
#[derive(clap::Parser)]
struct Command {
    #[command(flatten)]
    layer: MountFlags,
}

#[test]
fn flags_fill_the_layer() {
    use clap::Parser as _;
    let parse = |args: &[&str]| Command::try_parse_from(std::iter::once(&"x").chain(args)).map(|c| c.layer);
    let layer = parse(&["--max-age", "5m", "--skip-verify", "--token-file=t"]).unwrap();
    assert_eq!((layer.max_age.as_deref(), layer.skip_verify.as_deref()), (Some("5m"), Some("true")));
    assert_eq!(parse(&["--skip-verify=false"]).unwrap().skip_verify.as_deref(), Some("false"));
}

/// docs/configuration.md documents each setting under its three names, and nothing that does not exist.
#[test]
fn the_documentation_lists_every_setting() {
    let document = include_str!("../../docs/configuration.md");
    // The shim's flags are its own, and held against it there.
    let (before, shim) = document.split_once("\n## Shim").unwrap();
    let document = [before, shim.split_once("\n## ").unwrap().1].concat();
    let mut listed: Vec<_> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `--"))
        .map(|line| line.split('`').next().unwrap_or_default().replace('-', "_"))
        .collect();
    for name in Layer::NAMES {
        for source in [layer::Source::Flags, layer::Source::File] {
            let spelt = format!("`{}`", source.spell(name));
            assert!(document.contains(&spelt), "docs/configuration.md lacks {spelt}");
        }
        listed.retain(|other| other != name);
    }
    assert!(listed.is_empty(), "docs/configuration.md lists {listed:?}, which does not exist");
}
