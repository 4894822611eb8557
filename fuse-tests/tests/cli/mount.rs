use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use fuse_secrets::dev::{Fault, StatusCode};
use rustix::process::Signal;
use serde_json::json;

use crate::process::{Ended, PATIENCE, Process, run, until};
use crate::store::{CANARY, Store, TOKEN, assert_silent, class, token_file};
use crate::world::{NOBODY, World};

fn mount(world: &World, arguments: &[&str]) -> Command {
    let mut command = world.program();
    command.arg("mount").args(arguments);
    command
}

fn read(world: &World, path: &str) -> String {
    run(world.command("cat").arg(path)).out
}

fn refused(command: &mut Command, code: i32, texts: &[&str]) {
    let Ended { code: was, out, err } = run(command);
    assert_eq!(was, code, "{err}");
    assert_eq!(out, "");
    for text in texts {
        assert!(err.contains(text), "{text:?} is missing: {err}");
    }
    assert_silent(&err);
}

/// Serves the canary at /tmp/mnt with these arguments, and ends in order.
fn serves(world: &World, command: &mut Command) {
    let mut mount = Process::start(command);
    mount.logs("mounted");
    assert_eq!(read(world, "/tmp/mnt/password"), CANARY);
    let ended = mount.end_by(Signal::TERM);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(!world.is_mounted("/tmp/mnt"));
    assert_silent(&(ended.out + &ended.err));
}

#[test]
fn a_change_shows_an_outage_does_not_and_sigterm_unmounts() {
    let Some(world) = World::new() else { return };
    let mut store = Store::start();
    let (token, class) = (token_file(&world), class(&world, "app", ""));
    world.directory("mnt", 0);
    let mut mount = mount(&world, &["--foreground", "--address", &store.address(), "mnt"]);
    let mut mount = Process::start(mount.arg("--class").arg(class).arg("--token-file").arg(token));
    mount.logs("mounted");
    assert_eq!(read(&world, "/tmp/mnt/password"), CANARY);
    store.put("second");
    until("the change shows", || read(&world, "/tmp/mnt/password") == "second");
    store.stop();
    mount.logs("cannot be read");
    assert_eq!(read(&world, "/tmp/mnt/password"), "second");
    assert_eq!(mount.end_by(Signal::TERM).code, 0);
    assert!(!world.is_mounted("/tmp/mnt"));
}

#[test]
fn every_way_to_log_in_serves() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", 0);
    let class = class(&world, "app", "");
    let class = class.to_str().unwrap();
    let address = store.address();
    let common = ["--class", class, "--address", &address, "mnt"];
    let policy = json!({ "policy": "path \"secret/*\" { capabilities = [\"read\"] }" });
    store.write("sys/policies/acl/app", &policy);

    let token = token_file(&world);
    serves(&world, mount(&world, &common).arg("--token-file").arg(&token));

    store.write("sys/auth/approle", &json!({ "type": "approle" }));
    store.write("auth/approle/role/app", &json!({ "token_policies": ["app"] }));
    let role = "role-of-the-test";
    store.write("auth/approle/role/app/role-id", &json!({ "role_id": role }));
    let made = store.write("auth/approle/role/app/secret-id", &json!({}));
    let secret = made["data"]["secret_id"].as_str().unwrap();
    let file = world.file("secret-id", secret);
    serves(&world, mount(&world, &common).args(["--role-id", role, "--secret-id-file"]).arg(&file));
    refused(
        mount(&world, &common).args(["--role-id", "other", "--secret-id-file"]).arg(&file),
        77,
        &["check the role id"],
    );
}

#[test]
fn flags_win_over_environment_over_class_over_file() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", 0);
    let (token, class) = (token_file(&world), class(&world, "app", ""));
    let file = |interval: &str, mode: &str| {
        let text = format!(
            "address: {}\ntokenFile: {}\nrefreshInterval: {interval}\nmode: '{mode}'\n",
            store.address(),
            token.display()
        );
        world.file("config.yaml", &text)
    };
    let mode = |command: &mut Command| {
        let mut mount = Process::start(command);
        let log = mount.logs("mounted");
        let mode = run(world.command("stat").args(["-c", "%a", "/tmp/mnt/password"])).out;
        assert_eq!(mount.end_by(Signal::INT).code, 0);
        (log, mode.trim().to_owned())
    };
    let class = class.to_str().unwrap();
    let config = file("9s", "0400");
    let config = config.to_str().unwrap();
    // The class says an interval and no mode.
    let (log, by_file) = mode(&mut mount(&world, &["--config", config, "--class", class, "mnt"]));
    assert!(log.contains("interval=1s"), "the class wins over the file: {log}");
    assert_eq!(by_file, "400");
    let mut command = mount(&world, &["--class", class, "mnt"]);
    command
        .env("FUSE_SECRETS_CONFIG", config)
        .env("FUSE_SECRETS_MODE", "0440")
        .env("FUSE_SECRETS_REFRESH_INTERVAL", "5s");
    let (log, by_variable) = mode(&mut command);
    assert!(log.contains("interval=5s"), "the environment wins over the class: {log}");
    assert_eq!(by_variable, "440");
    let (log, by_flag) = mode(command.args(["--mode", "0404", "--refresh-interval", "3s"]));
    assert!(log.contains("interval=3s"), "{log}");
    assert_eq!(by_flag, "404");
}

#[test]
fn of_several_classes_one_is_named() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", 0);
    let token = token_file(&world);
    let documents = ["one", "two"].map(|name| std::fs::read_to_string(class(&world, name, "")).unwrap());
    let both = world.file("both.yaml", &documents.join("---\n"));
    let address = store.address();
    let common = [
        "--class",
        both.to_str().unwrap(),
        "--address",
        &address,
        "--token-file",
        token.to_str().unwrap(),
        "mnt",
    ];
    refused(&mut mount(&world, &common), 64, &["--class-name, one of one, two"]);
    refused(mount(&world, &common).args(["--class-name", "tow"]), 64, &["no class of that name", "one, two"]);
    serves(&world, mount(&world, &common).args(["--class-name", "two"]));
}

#[test]
fn wrong_settings_and_a_wrong_class_are_told_together_with_64() {
    let Some(world) = World::new() else { return };
    world.directory("mnt", 0);
    let config = world.file("config.yaml", "adress: https://store\nstaleGrace: 5\n");
    let class = class(&world, "app", "{objectName: ../up, secretPath: ''}");
    refused(
        mount(&world, &["--max-age", "5", "--token-file", "nosuch", "mnt", "--class"])
            .arg(class)
            .arg("--config")
            .arg(config)
            .env("FUSE_SECRETS_MAXAGE", "5m")
            .env("FUSE_SECRETS_MODE", "0777"),
        64,
        &[
            "--max-age: has no unit",
            "FUSE_SECRETS_MAXAGE: is unknown; did you mean FUSE_SECRETS_MAX_AGE?",
            "FUSE_SECRETS_MODE: has bits",
            "adress: is unknown; did you mean address?",
            "staleGrace: has no unit",
            "objects[0].objectName",
            "objects[0].secretPath",
        ],
    );
}

#[test]
fn what_is_wrong_has_its_exit_code_and_a_text_that_mends_it() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", 0);
    let (token, address) = (token_file(&world), store.address());
    let good = class(&world, "app", "");
    let with = |class: &Path, token: &Path, more: &[&str]| {
        let mut command = mount(&world, &["--address", &address]);
        command.arg("--class").arg(class).arg("--token-file").arg(token).args(more);
        command
    };
    let (nosuch, bad_token) = (Path::new("nosuch"), world.file("bad-token", "hvs.canary-wrong"));
    refused(
        &mut mount(&world, &["--class", "app.yaml", "mnt"]),
        64,
        &["--token-file", "--jwt-file", "--role-id"],
    );
    let bad = class(&world, "bad", "{objectName: ../up, secretPath: ''}");
    refused(&mut with(&bad, &token, &["mnt"]), 65, &["objectName", "secretPath: is empty"]);
    let key = class(&world, "key", "{objectName: a, secretPath: secret/data/app, secretKey: passwd}");
    refused(
        &mut with(&key, &token, &["mnt"]),
        65,
        &["a: the secret has no key \"passwd\"; it has \"password\""],
    );
    refused(&mut with(nosuch, &token, &["mnt"]), 66, &["cannot read nosuch"]);
    refused(&mut with(&good, nosuch, &["mnt"]), 66, &["cannot use nosuch", "check that it exists"]);
    refused(
        &mut with(&good, &token, &["nosuch"]),
        73,
        &["cannot mount on nosuch", "name a directory that exists"],
    );
    refused(&mut with(&good, &bad_token, &["mnt"]), 77, &["403", "token-file:/tmp/bad-token"]);
    let path = class(
        &world,
        "path",
        "{objectName: a, secretPath: secret/app, secretKey: password}\n\
         {objectName: b, secretPath: secret/app, secretKey: password}",
    );
    let hint = "secret/ is a KV v2 mount, did you mean secret/data/app?";
    refused(&mut with(&path, &token, &["mnt"]), 77, &["a, b: GET", hint]);
    let two = class(
        &world,
        "two",
        "{objectName: a, secretPath: secret/data/app}\n{objectName: b, secretPath: secret/data/other}",
    );
    refused(&mut with(&two, &token, &["--cache-entries", "1", "mnt"]), 75, &["entries", "1"]);
    store.embedded().inject(Fault::status(StatusCode::INTERNAL_SERVER_ERROR).times(1000)).unwrap();
    let mut waiting = Process::start(&mut with(&good, &token, &["mnt"]));
    // It waits for the store, and says so at once; a signal ends that.
    waiting.logs("cannot be read; goes on trying");
    let ended = waiting.end_by(Signal::INT);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(!world.is_mounted("/tmp/mnt"));
}

#[test]
fn a_store_that_is_down_at_the_start_is_69_with_its_address() {
    let Some(world) = World::new() else { return };
    let mut store = Store::start();
    world.directory("mnt", 0);
    let (token, class, address) = (token_file(&world), class(&world, "app", ""), store.address());
    store.stop();
    let mut command = mount(&world, &["--address", &address, "mnt"]);
    command.arg("--class").arg(class).arg("--token-file").arg(token);
    refused(&mut command, 69, &[&address, "connection refused", "check that the store is running"]);
}

#[test]
fn the_service_manager_hears_when_it_is_ready_and_when_it_stops() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", 0);
    let (token, class) = (token_file(&world), class(&world, "app", ""));
    let socket = UnixDatagram::bind("/tmp/notify").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let heard = || {
        let mut text = [0; 100];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).trim().to_owned()
    };
    let mut mount = mount(&world, &["--address", &store.address(), "mnt"]);
    mount.arg("--class").arg(class).arg("--token-file").arg(token).env("NOTIFY_SOCKET", "/tmp/notify");
    let mount = Process::start(&mut mount);
    assert_eq!(heard(), "READY=1");
    assert!(world.is_mounted("/tmp/mnt"), "ready means mounted");
    run(world.command("umount").arg("/tmp/mnt"));
    assert_eq!(heard(), "STOPPING=1");
    assert_eq!(mount.end().code, 0);
}

#[test]
fn with_64_kib_of_locked_memory_small_volumes_work_and_a_large_one_is_refused_with_75() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", NOBODY);
    let token = world.file("token", TOKEN);
    std::os::unix::fs::chown(&token, Some(NOBODY), None).unwrap();
    std::fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let little = |class: &Path| {
        let mut command = world.command_as(NOBODY, "prlimit");
        command.args([
            "--memlock=65536:65536",
            "fuse-secrets",
            "mount",
            "--address",
            &store.address(),
            "mnt",
        ]);
        command.arg("--class").arg(class).arg("--token-file").arg(&token);
        command
    };
    let mut mount = Process::start(&mut little(&class(&world, "app", "")));
    mount.logs("mounted");
    assert_eq!(run(world.command_as(NOBODY, "cat").arg("/tmp/mnt/password")).out, CANARY);
    assert_eq!(mount.end_by(Signal::TERM).code, 0);
    assert!(!world.is_mounted("/tmp/mnt"));

    store.embedded().put("secret/large", &json!({ "password": "x".repeat(200_000) })).unwrap();
    let large =
        class(&world, "large", "{objectName: password, secretPath: secret/data/large, secretKey: password}");
    refused(
        &mut little(&large),
        75,
        &["raise RLIMIT_MEMLOCK", "of 65536 bytes in use", "200704 more wanted"],
    );
}
