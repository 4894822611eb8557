//! Documents and examples held against the program: what they list is what there is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory as _, Parser as _};
use fuse_secrets::cli::Arguments;
use fuse_secrets::config::{AgentConfig, Config, Layer};
use fuse_secrets::metrics::{Kind, Metrics};

/// A file of the repository.
fn file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files with this ending below a directory of the repository, or the directory's own.
fn files(directory: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn the_metrics_document_has_every_row_of_the_table() {
    let metrics = Metrics::default();
    let rows = metrics.rows().map(|row| {
        let kind = if row.kind == Kind::Counter { "counter" } else { "gauge" };
        format!("| `{}` | {kind} | {} |", row.name, row.help)
    });
    let document = file("docs/metrics.md");
    // The shim's are held against its table by a test of its own.
    let is_agents = |line: &&str| line.starts_with("| `") && !line.starts_with("| `fuse_secrets_csi_");
    let listed: Vec<&str> = document.lines().filter(is_agents).collect();
    assert_eq!(listed, rows.collect::<Vec<_>>());
}

/// Lines of code that the shim may have, its part of the wire included, without tests, comments and blank lines.
const SHIM_LINES: usize = 3_600;

#[test]
fn the_shim_is_no_larger_than_the_architecture_says() {
    let is_product = |path: &PathBuf| !path.ends_with("tests.rs") && !path.ends_with("child.rs");
    let code = |path: PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let (product, _) = text.split_once("#[cfg(test)]\nmod tests {").unwrap_or((&text, ""));
        let lines = product.lines().map(str::trim);
        lines.filter(|line| !line.is_empty() && !line.starts_with("//")).count()
    };
    let lines: usize = files("csi/src", ".rs").into_iter().filter(is_product).map(code).sum();
    assert!(lines > 1_000, "{lines}: the shim is not where it was");
    assert!(lines <= SHIM_LINES, "{lines} lines of code in csi/src, at most {SHIM_LINES}");
    let limit = format!("{},{:03} lines", SHIM_LINES / 1_000, SHIM_LINES % 1_000);
    assert!(file("docs/architecture.md").contains(&limit), "docs/architecture.md does not say {limit}");
}

#[test]
fn every_link_of_a_document_leads_to_a_file_and_a_heading() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let documents = files("docs", ".md").into_iter().chain(
        ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "deploy/README.md"]
            .map(|name| root.join(name)),
    );
    let anchor = |heading: &str| -> String {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.collect::<String>().to_lowercase().replace(' ', "-")
    };
    let (mut count, mut broken) = (0, Vec::new());
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            count += 1;
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let at = if path.is_empty() { document.clone() } else { document.parent().unwrap().join(path) };
            let headings = fs::read_to_string(&at).unwrap_or_default();
            let mut headings = headings.lines().filter(|line| line.starts_with('#'));
            let leads = at.exists()
                && (heading.is_empty()
                    || headings.any(|line| anchor(line.trim_start_matches('#').trim()) == heading));
            if !leads {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(count > 30, "{count}");
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn operations_lists_the_exit_codes_of_the_help() {
    let help = Arguments::command().render_long_help().to_string();
    let (_, codes) = help.split_once("Exit codes:\n").unwrap();
    let rows: Vec<String> = codes
        .lines()
        .map_while(|line| line.trim().split_once(' '))
        .map(|(code, meaning)| format!("| {code} | {} |", meaning.trim()))
        .collect();
    assert!(rows.len() > 5, "{codes}");
    let document = file("docs/operations.md");
    let (_, section) = document.split_once("## Exit codes").unwrap();
    let listed: Vec<&str> =
        section.lines().filter(|line| line.starts_with("| ")).take(rows.len() + 1).collect();
    assert_eq!(listed[1..], rows);
}

#[test]
fn every_test_that_a_document_names_exists() {
    let source: String = ["src", "csi", "fuse-tests", "xtask", "tests"]
        .iter()
        .flat_map(|directory| files(directory, ".rs"))
        .filter(|path| !path.to_string_lossy().contains("/target/"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let documents = files("docs", ".md").into_iter().chain(
        ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
            .map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join(name)),
    );
    // Five words and more, joined by underscores and in code: nothing else is written so.
    let is_test = |word: &&str| {
        word.split('_').count() >= 5
            && !word.starts_with("fuse_secrets_")
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let mut named = BTreeSet::new();
    for document in documents {
        let text = fs::read_to_string(document).unwrap();
        named.extend(text.split('`').filter(is_test).map(ToOwned::to_owned));
    }
    // The one that shows how tests are named.
    named.remove("a_handle_that_is_open_keeps_its_version");
    assert!(named.len() > 20, "{named:?}");
    let missing: Vec<_> = named.iter().filter(|name| !source.contains(&format!("{name}("))).collect();
    assert!(missing.is_empty(), "no such test: {missing:?}");
}

#[test]
fn the_configuration_example_is_good() {
    let example = Layer::from_yaml(&file("examples/mount.yaml")).unwrap();
    let flags = Layer { token_file: Some("token".into()), ..Layer::default() };
    let config = Config::resolve(flags, Layer::default(), example).unwrap();
    assert_eq!(config.under.connection.addresses.map(|addresses| addresses.len()), Some(2));
}

#[test]
fn the_agents_example_is_good() {
    let example = Layer::from_yaml(&file("examples/agent.yaml")).unwrap();
    let config = AgentConfig::resolve(Layer::default(), Layer::default(), example).unwrap();
    assert_eq!(config.policy.allow.len(), 2);
    assert_eq!(config.policy.files, config.reach.beneath);
}

#[test]
fn the_unit_starts_a_command_that_exists() {
    for unit in ["examples/fuse-secrets.service", "deploy/systemd/fuse-secrets-agent.service"] {
        let unit = file(unit).replace("\\\n", " ");
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        assert!(Arguments::try_parse_from(line.split_whitespace()).is_ok(), "{line}");
    }
}

/// Commands that fail, and the text of docs/errors.md that each prints.
#[cfg(feature = "dev")]
mod texts {
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::process::Command;

    use fuse_secrets::dev::{Embedded, Options};
    use serde_json::json;

    use super::file;

    const CLASS: &str = "\
apiVersion: secrets-store.csi.x-k8s.io/v1
kind: SecretProviderClass
metadata: {name: app}
spec:
  provider: vault
  parameters:
    roleName: app
    objects: |
      - {objectName: password, secretPath: secret/data/app, secretKey: password}
";

    /// What is changed in the class, further arguments, the directory, the exit code.
    const FAILURES: [([&str; 2], &[&str], &str, i32); 11] = [
        (["", ""], &["--token-file", "token", "--max-age", "1"], "d", 64),
        (["", ""], &["--token-file", "token", "FUSE_SECRETS_MAXAGE=1m"], "d", 64),
        (["", ""], &[], "d", 64),
        (["roleName", "roleNam"], &["--token-file", "token"], "d", 65),
        (["", ""], &["--token-file", "token", "--class", "nofile.yaml"], "d", 66),
        (["secret/data/app", "secret/app"], &["--token-file", "token"], "d", 77),
        (["secret/data/app", "secret/data/nope"], &["--token-file", "token"], "d", 77),
        (["", ""], &["--token-file", "wrong"], "d", 77),
        (["secretKey: password", "secretKey: pasword"], &["--token-file", "token"], "d", 65),
        (["", ""], &["--token-file", "token"], "none", 73),
        (["", ""], &["--token-file", "token"], "/proc", 73),
    ];

    #[tokio::test(flavor = "multi_thread")]
    async fn texts_of_the_errors_document_are_those_of_the_program() {
        let document = file("docs/errors.md");
        let fenced: Vec<&str> = document.split("```\n").skip(1).step_by(2).flat_map(str::lines).collect();
        let store = Embedded::start(Options::default()).await.unwrap();
        store.put("secret/app", &json!({ "password": "s3cret" })).unwrap();
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir(here.path().join("d")).unwrap();
        for (name, text) in [("token", store.root_token().expose()), ("wrong", "wrong")] {
            let options = std::fs::File::options().write(true).create_new(true).mode(0o600).clone();
            std::io::Write::write_all(&mut options.open(here.path().join(name)).unwrap(), text.as_bytes())
                .unwrap();
        }
        let address = store.address().to_string();
        let mut printed = Vec::new();
        for ([from, to], more, directory, code) in FAILURES {
            let class = if from.is_empty() { CLASS.to_owned() } else { CLASS.replace(from, to) };
            std::fs::write(here.path().join("vault.yaml"), class).unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_fuse-secrets"));
            command.current_dir(here.path()).env("XDG_RUNTIME_DIR", here.path());
            command.args(["--log", "error", "mount", "--address", &address]);
            if !more.contains(&"--class") {
                command.args(["--class", "vault.yaml"]);
            }
            for argument in more {
                match argument.split_once('=') {
                    Some((name, value)) => command.env(name, value),
                    None => command.arg(argument),
                };
            }
            command.arg(directory);
            let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
            let text = String::from_utf8(output.stderr).unwrap().replace(&address, "http://vault:8200");
            assert_eq!(output.status.code(), Some(code), "{text}");
            assert!(!text.contains("s3cret"), "{text}");
            printed.push(text);
        }
        use fuse_secrets::secret::pages::{SecretMemory, Sharing};
        let memory = SecretMemory::with_limit(64 << 10).unwrap();
        printed.push(memory.allocate(1 << 20, Sharing::Own).err().unwrap().to_string());
        store.shutdown().await;
        let printed = printed.concat();
        for line in fenced {
            assert!(printed.contains(line), "nothing prints\n{line}\nbut\n{printed}");
        }
    }
}
