use rustix::process::Signal;

use crate::process::{Process, run, until};
use crate::store::{Store, assert_silent, class, token_file};
use crate::world::{DAEMON, NOBODY, World};

/// A mount of the store's one secret for root, serving.
fn mounted(world: &World, store: &Store, directory: &str) -> Process {
    world.directory(directory, 0);
    let (token, class) = (token_file(world), class(world, "app", ""));
    let mut mount = world.program();
    mount.args(["mount", "--address", &store.address(), "--token-file"]).arg(token).arg("--class").arg(class);
    let mut mount = Process::start(mount.arg(directory));
    mount.logs("mounted");
    mount
}

#[test]
fn one_mount_is_found_by_every_spelling_of_its_path() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let _mount = mounted(&world, &store, "mnt");
    std::os::unix::fs::symlink("/tmp", "/tmp/up").unwrap();
    std::os::unix::fs::symlink("/tmp/mnt", "/tmp/straight").unwrap();
    for path in ["/tmp/mnt", "/tmp/mnt/", "mnt", "./mnt", "up/mnt", "/tmp/up/mnt/", "straight", "../tmp/mnt"]
    {
        let shown = run(world.program().args(["mounts", path]));
        assert_eq!(shown.code, 0, "{path}: {}", shown.err);
        for part in ["/tmp/mnt", "class       app", "fresh", "password", "0444", "secret/data/app#password"] {
            assert!(shown.out.contains(part), "{path}: {part}: {}", shown.out);
        }
        assert_silent(&shown.out);
    }
    let inside = run(world.program().current_dir("/tmp/mnt").args(["mounts", "."]));
    assert_eq!(inside.code, 0, "{}", inside.err);
}

#[test]
fn every_form_is_valid_without_a_value_and_the_table_has_80_columns() {
    let Some(world) = World::new() else { return };
    let mut store = Store::start();
    let long = "a-directory-with-a-name-that-is-longer-than-the-whole-column-for-mount-points-is-wide";
    let _mounts = [mounted(&world, &store, "mnt"), mounted(&world, &store, long)];
    store.stop();
    until("the outage is seen", || run(world.program().arg("mounts")).out.contains("2 stale"));
    let table = run(world.program().arg("mounts"));
    let detail = run(world.program().args(["mounts", "mnt"]));
    for text in [&table.out, &detail.out] {
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_silent(text);
    }
    assert!(detail.out.contains("last error  GET http"), "{}", detail.out);
    assert!(detail.out.contains("connection refused"), "{}", detail.out);
    let wide = run(world.program().args(["mounts", "-o", "wide"]));
    assert!(wide.out.contains(long) && wide.out.contains("connection refused"), "{}", wide.out);
    assert_silent(&wide.out);
    for arguments in [&["mounts", "-o", "json"][..], &["mounts", "-o", "json", "mnt"]] {
        let json = run(world.program().args(arguments));
        let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
        let mount = value.get(0).or(value.get("mount")).unwrap();
        assert_eq!(mount["state"], "stale");
        assert_silent(&json.out);
    }
}

#[test]
fn the_counters_of_several_agents_are_one_valid_text() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let agents = [mounted(&world, &store, "a"), mounted(&world, &store, "b")];
    let counters = run(world.program().args(["mounts", "--metrics"]));
    assert_eq!(counters.code, 0);
    assert_silent(&counters.out);
    for agent in &agents {
        let sample = format!("fuse_secrets_cache_entries{{agent=\"{}\"}} 1\n", agent.id());
        assert!(counters.out.contains(&sample), "{}", counters.out);
    }
    assert_eq!(counters.out.matches("# TYPE fuse_secrets_cache_entries gauge").count(), 1);
    let samples = counters.out.lines().filter(|line| !line.starts_with('#'));
    let distinct: std::collections::HashSet<_> = samples.clone().map(|line| line.split(' ').next()).collect();
    assert_eq!(samples.count(), distinct.len(), "no sample stands twice");
}

#[test]
fn root_sees_the_mounts_of_all_users_and_a_user_only_its_own() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let _root = mounted(&world, &store, "mnt");
    let mut nobody = Process::start(world.program_as(NOBODY).arg("dev"));
    let mut daemon = Process::start(world.program_as(DAEMON).env_remove("XDG_RUNTIME_DIR").arg("dev"));
    nobody.says("Ctrl-C");
    daemon.says("Ctrl-C");
    let of = |user: u32| format!("/run/user/{user}/fuse-secrets/dev");
    let all = run(world.program().args(["mounts", "-o", "wide"])).out;
    for path in ["/tmp/mnt", &of(NOBODY), "/tmp/fuse-secrets-1/dev"] {
        assert!(all.contains(path), "{path}: {all}");
    }
    let own = run(world.program_as(NOBODY).args(["mounts", "-o", "json"]));
    let own: serde_json::Value = serde_json::from_str(&own.out).unwrap();
    assert_eq!(own.as_array().unwrap().len(), 1);
    assert_eq!(own[0]["path"], of(NOBODY));
}

#[test]
fn another_user_gets_nothing_from_an_agents_socket() {
    let Some(world) = World::new() else { return };
    let mut dev = Process::start(world.program_as(NOBODY).arg("dev"));
    dev.says("Ctrl-C");
    let home = format!("/run/user/{NOBODY}/fuse-secrets");
    let socket = format!("{home}/agent-{}.sock", dev.id());
    let ask = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.settimeout(10)\ns.connect(sys.argv[1])\n\
               s.sendall(b'\"mounts\"\\n')\nsys.stdout.write(str(len(s.recv(100))))";
    let asked = |user: u32| run(world.command_as(user, "python3").args(["-c", ask, &socket]));
    if run(world.command("python3").args(["-c", ""])).code != 0 {
        assert!(std::env::var_os("CI").is_none(), "this test needs python3");
        println!("skipped: no python3");
        return;
    }
    assert_eq!(asked(NOBODY).out, "100");
    let refused = asked(DAEMON);
    assert!(refused.err.contains("Permission denied"), "{}", refused.err);
    // Even where somebody opened the doors: the peer's number is asked as well.
    run(world.command("chmod").args(["0777", &format!("/run/user/{NOBODY}"), &home, &socket]));
    let answer = asked(DAEMON);
    assert!(matches!(answer.out.as_str(), "" | "0"), "{} bytes", answer.out);
    assert!(!answer.err.contains("Permission denied"), "it was asked: {}", answer.err);
}

#[test]
fn an_agent_that_hangs_is_named_and_the_others_are_listed() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let _good = mounted(&world, &store, "good");
    let hanging: Vec<_> = (0..3).map(|i| mounted(&world, &store, &format!("hangs-{i}"))).collect();
    for agent in &hanging {
        agent.signal(Signal::STOP);
    }
    let listed = run(world.program().arg("mounts"));
    assert_eq!(listed.code, 1);
    assert!(listed.out.contains("/tmp/good"), "{}", listed.out);
    for (index, agent) in hanging.iter().enumerate() {
        assert!(listed.err.contains(&format!("agent-{}.sock: no answer", agent.id())), "{}", listed.err);
        assert!(listed.err.contains(&format!("/tmp/hangs-{index}")), "{}", listed.err);
    }
    // What hangs cannot be mounted over, and is not waited for.
    let refused = run(world.program().args(["dev", "--mount", "hangs-0"]));
    assert_eq!(refused.code, 73, "{}", refused.err);
    for agent in hanging {
        agent.signal(Signal::CONT);
        assert_eq!(agent.end_by(Signal::TERM).code, 0);
    }
}

#[test]
fn sockets_of_killed_agents_are_cleaned_and_not_asked_for() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let agent = mounted(&world, &store, "mnt");
    let socket = format!("/run/fuse-secrets/agents/agent-{}.sock", agent.id());
    agent.end_by(Signal::KILL);
    assert!(std::path::Path::new(&socket).exists());
    let listed = run(world.program().arg("mounts"));
    assert_eq!(listed.code, 0);
    assert!(listed.out.contains("nothing is mounted"), "{}", listed.out);
    assert!(!std::path::Path::new(&socket).exists());
}

#[test]
fn what_another_user_puts_in_the_way_of_root_is_not_trusted() {
    let Some(world) = World::new() else { return };
    // A directory in /tmp that is a link to somebody else's, where a stale socket would be removed.
    let other = world.directory("other", 0);
    drop(std::os::unix::net::UnixListener::bind(other.join("precious.sock")).unwrap());
    std::os::unix::fs::symlink(&other, format!("/tmp/fuse-secrets-{NOBODY}")).unwrap();
    world.directory("fuse-secrets-evil", NOBODY);
    let listed = run(world.program().arg("mounts"));
    assert_eq!(listed.code, 0, "{}", listed.err);
    assert!(other.join("precious.sock").exists());
}

#[test]
fn a_path_that_nobody_serves_exits_with_1_and_a_hint() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let none = run(world.program().args(["mounts", "/mnt/nothing"]));
    assert_eq!((none.code, none.out.as_str()), (1, ""));
    assert!(none.err.contains("lists what is served"), "{}", none.err);
    let _mount = mounted(&world, &store, "application");
    for (path, hint) in [
        ("/tmp/aplication", "did you mean /tmp/application?"),
        ("/srv/application", "did you mean /tmp/application?"),
        ("/tmp/application/password", "lies in the mount /tmp/application"),
    ] {
        let asked = run(world.program().args(["mounts", path]));
        assert_eq!(asked.code, 1);
        assert!(asked.err.contains(hint), "{path}: {}", asked.err);
    }
}

#[test]
fn a_closed_pipe_is_silent() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    let _mount = mounted(&world, &store, "mnt");
    for line in [
        "fuse-secrets mounts | head -0",
        "fuse-secrets mounts -o json | head -0",
        "fuse-secrets --help | head -0",
        "fuse-secrets doctor | head -0",
        "fuse-secrets check app.yaml | head -0",
    ] {
        let ended = run(world.command("bash").args(["-c", &format!("set -o pipefail; {line}")]));
        assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (0, "", ""), "{line}");
    }
    let line = "set -o pipefail; fuse-secrets mounts /nope 2>&1 >/dev/null | head -0";
    assert_eq!(run(world.command("bash").args(["-c", line])).code, 1);
}
