use super::*;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/classes").join(name)
}

fn printed(outcome: &Outcome, format: Format) -> String {
    let mut out = Vec::new();
    outcome.print(&mut out, format).unwrap();
    String::from_utf8(out).unwrap()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn fits(text: &str) -> bool {
    text.lines().all(|line| line.chars().count() <= COLUMNS)
}

#[test]
fn a_good_class_is_printed_as_a_table() {
    let outcome = run(&[example("secrets-store-import.yaml")]);
    assert_eq!(outcome.exit_code(), 0);
    let text = printed(&outcome, Format::Table);
    assert!(fits(&text), "{text}");
    assert!(text.starts_with("ok     SecretsStoreImport app-ns/app"), "{text}");
    // Before it stands the file's path, which is this checkout's.
    let body = &text[text.find("       https").unwrap()..];
    assert_eq!(
        body,
        "       https://stronghold.example:8300, role app-role, read every 2m
       FILE         SECRET            KEY      ENCODING  MODE
       db-password  demo-kv/data/app  DB_PASS  utf-8     0440
       keytab       demo-kv/data/app  keytab   base64    0440
"
    );
}

#[test]
fn all_examples_are_good_and_fit_the_screen() {
    let mut files: Vec<_> =
        std::fs::read_dir(example("")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 4);
    let outcome = run(&files);
    let text = printed(&outcome, Format::Table);
    assert_eq!(outcome.exit_code(), 0, "{text}");
    assert!(fits(&text), "{text}");
}

#[test]
fn good_and_bad_documents_of_one_file_are_told_apart() {
    let good = std::fs::read_to_string(example("secret-provider-class-openbao.yaml")).unwrap();
    let bad = good.replace("name: web", "name: other").replace("roleName: web", "roleNmae: web");
    let file = file(&format!("{good}---\n{bad}"));
    let outcome = run(&[file.path().to_owned()]);
    assert_eq!(outcome.exit_code(), 65);
    let text = printed(&outcome, Format::Table);
    assert!(fits(&text), "{text}");
    assert!(text.contains("ok     SecretProviderClass web"), "{text}");
    assert!(text.contains("FAULT  SecretProviderClass other"), "{text}");
    assert!(text.contains("spec.parameters.roleName: is missing;"), "{text}");
    assert!(text.contains("did you mean roleName?"), "{text}");
    assert_eq!(text.matches("FAULT").count(), 1, "{text}");
}

#[test]
fn an_unreadable_file_does_not_hide_the_others() {
    let outcome = run(&[example("nothing-here.yaml"), example("secrets-store-import.yaml")]);
    assert_eq!(outcome.exit_code(), 66);
    let text = printed(&outcome, Format::Table);
    assert!(text.contains("cannot be read") && text.contains("ok     SecretsStoreImport"), "{text}");
}

#[test]
fn json_has_everything_and_no_arguments() {
    let broken = file("kind: Pod\napiVersion: v1");
    let outcome = run(&[example("secret-provider-class.yaml"), broken.path().to_owned()]);
    let text = printed(&outcome, Format::Json);
    assert!(!text.contains("common_name"), "{text}");
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(all["ok"], false);
    let good = &all["documents"][0];
    assert_eq!((good["name"].as_str(), good["refreshInterval"].as_str()), (Some("shop"), Some("30s")));
    assert_eq!(good["files"][1]["query"], "version=3");
    assert_eq!(good["files"][1]["mode"], "0600");
    assert_eq!(good["files"][3]["hasArgs"], true);
    let fault = &all["documents"][1]["faults"][0];
    assert_eq!((fault["field"].as_str(), fault["rule"].as_str()), (Some("kind"), Some("Pod is not a class")));
}

#[test]
fn long_names_are_shortened_and_hostile_ones_escaped() {
    let long = "x".repeat(200);
    let text = format!(
        "apiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\nmetadata: {{name: {long}}}\nspec:\n  \
         provider: vault\n  parameters:\n    roleName: r\n    objects: |\n      - {{objectName: \"{long}\", secretPath: \
         \"{long}/{long}\", secretKey: \"{long}\"}}\n      - {{objectName: \"a\\e[31m\\nb\", secretPath: s}}\n"
    );
    let outcome = run(&[file(&text).path().to_owned()]);
    assert_eq!(outcome.exit_code(), 0);
    let text = printed(&outcome, Format::Table);
    assert!(fits(&text), "{text}");
    assert!(text.contains('…') && !text.contains('\u{1b}'), "{text:?}");
}
