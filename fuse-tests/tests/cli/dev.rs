use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::process::{Process, run, until};
use crate::world::{NOBODY, World};

/// What `dev` puts into its store.
const VALUES: [&str; 2] = ["correct-horse-battery-staple", "demo-0000-1111-2222"];
const READY: &str = "Ctrl-C";
const DIRECTORY: &str = "/run/fuse-secrets/agents/dev";

/// What it printed as something to try, as one shell would read it.
fn printed_curl(text: &str) -> String {
    let start = text.find("  curl ").unwrap();
    let end = start + text[start..].find("\n\n").unwrap();
    text[start..end].replace("\\\n", " ")
}

fn headers(home: &str) -> Vec<String> {
    let names =
        std::fs::read_dir(home).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".header")).collect()
}

fn shell(world: &World, line: &str) -> String {
    let ended = run(world.command("sh").args(["-ec", line]));
    assert_eq!(ended.code, 0, "{line}: {}", ended.err);
    ended.out
}

/// Prints, mounts, shows a change, unmounts: as `command` and for each way to end it.
fn whole_life(world: &World, command: &mut Command, as_user: impl Fn(&str) -> Command, signal: Signal) {
    let mut dev = Process::start(command);
    let text = dev.says(READY);
    let directory = text.lines().find_map(|line| line.strip_prefix("Mounted at ")).unwrap();
    let directory = directory.split(". Try").next().unwrap().to_owned();
    assert!(world.is_mounted(&directory));
    let in_shell = |line: &str| {
        let ended = run(as_user("sh").args(["-ec", line]));
        assert_eq!(ended.code, 0, "{line}: {}", ended.err);
        ended.out
    };
    let cat = text.lines().find(|line| line.contains(" cat /")).unwrap();
    assert_eq!(in_shell(cat), VALUES[0]);
    in_shell(&printed_curl(&text).replace("curl ", "curl -sSf "));
    until("the change shows", || in_shell(cat) == "changed");
    for line in text.lines().filter(|line| line.contains("  fuse-secrets mounts")) {
        assert!(in_shell(line).contains(&directory), "{line}");
    }
    let ended = dev.end_by(signal);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(!world.is_mounted(&directory));
    for said in ["mounted", "changed", "files=\"db-password\"", "unmounted"] {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
    for value in VALUES.iter().chain(&["hvs."]) {
        assert!(!ended.out.contains(value) && !ended.err.contains(value), "{value}");
    }
    let home = Path::new(&directory).parent().unwrap().to_str().unwrap();
    assert_eq!(headers(home), [""; 0]);
}

#[test]
fn what_dev_prints_works_as_printed_and_nothing_is_left() {
    let Some(world) = World::new() else { return };
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        whole_life(&world, world.program().arg("dev"), |program| world.command(program), signal);
    }
}

#[test]
fn an_ordinary_user_gets_the_same_by_fusermount3() {
    let Some(world) = World::new() else { return };
    let as_user = |program: &str| world.command_as(NOBODY, program);
    whole_life(&world, world.program_as(NOBODY).arg("dev"), as_user, Signal::INT);
    let mut bare = world.program_as(NOBODY);
    whole_life(
        &world,
        bare.env_remove("XDG_RUNTIME_DIR").arg("dev"),
        |program| {
            let mut command = world.command_as(NOBODY, program);
            command.env_remove("XDG_RUNTIME_DIR");
            command
        },
        Signal::TERM,
    );
}

#[test]
fn a_killed_dev_leaves_a_dead_mount_and_a_token_which_the_next_one_takes_away() {
    let Some(world) = World::new() else { return };
    for user in [0, NOBODY] {
        let program = || if user == 0 { world.program() } else { world.program_as(user) };
        let home = if user == 0 {
            "/run/fuse-secrets/agents".to_owned()
        } else {
            format!("/run/user/{user}/fuse-secrets")
        };
        let directory = format!("{home}/dev");
        let mut dev = Process::start(program().arg("dev"));
        dev.says(READY);
        dev.end_by(Signal::KILL);
        assert!(world.is_mounted(&directory));
        assert_eq!(headers(&home).len(), 1);

        let told = run(program().arg("mounts"));
        assert!(told.err.contains(&directory), "the dead mount is named: {}", told.err);
        let told = run(program().args(["mounts", &directory]));
        assert_eq!(told.code, 1);
        assert!(told.err.contains("its agent is gone"), "{}", told.err);

        let mut dev = Process::start(program().arg("dev"));
        dev.says(READY);
        dev.logs("taking away a dead mount");
        assert_eq!(headers(&home), [format!("dev-{}.header", dev.id())]);
        let cat = format!("cat {directory}/db-password");
        let mut reader = if user == 0 { world.command("sh") } else { world.command_as(user, "sh") };
        assert_eq!(run(reader.args(["-c", &cat])).out, VALUES[0]);
        assert_eq!(dev.end_by(Signal::TERM).code, 0);
        assert!(!world.is_mounted(&directory));
    }
}

#[test]
fn any_way_to_name_a_directory_works_and_missing_ones_are_made() {
    let Some(world) = World::new() else { return };
    shell(&world, "mkdir -p /tmp/there /tmp/real && ln -s real /tmp/link");
    for (given, mounted) in [
        ("/tmp/new", "/tmp/new"),
        ("/tmp/a/b/c", "/tmp/a/b/c"),
        ("there", "/tmp/there"),
        ("./there/", "/tmp/there"),
        ("with a blank", "/tmp/with a blank"),
        ("it's", "/tmp/it's"),
        ("link", "/tmp/real"),
    ] {
        let mut dev = Process::start(world.program().args(["dev", "--mount", given]));
        let text = dev.says(READY);
        assert!(world.is_mounted(mounted), "{given}");
        let cat = text.lines().find(|line| line.contains("  cat ")).unwrap();
        assert_eq!(shell(&world, cat), VALUES[0], "{cat}");
        let asked = run(world.program().args(["mounts", given]));
        assert_eq!(asked.code, 0, "{given}: {}", asked.err);
        assert_eq!(dev.end_by(Signal::INT).code, 0);
        assert!(!world.is_mounted(mounted));
    }
}

#[test]
fn a_directory_that_cannot_be_mounted_on_is_refused_with_73_and_the_reason() {
    let Some(world) = World::new() else { return };
    shell(
        &world,
        "mkdir /tmp/foreign /tmp/mine && touch /tmp/file && ln -s mine /tmp/link && mount -t tmpfs none /tmp/foreign",
    );
    let mut dev = Process::start(world.program().args(["dev", "--mount", "/tmp/mine"]));
    dev.says(READY);
    for (directory, reason) in [
        ("file", "not a directory"),
        ("file/x", "cannot mount on file/x"),
        ("foreign", "mount point of another file system"),
        ("/", "mount point of another file system"),
        ("mine", "a mount of fuse-secrets already"),
        ("link", "/tmp/mine is a mount of fuse-secrets already"),
        ("/proc/x", "cannot be made"),
    ] {
        let refused = run(world.program().args(["dev", "--mount", directory]));
        assert_eq!(refused.code, 73, "{directory}: {}", refused.err);
        assert!(refused.err.contains(reason), "{directory}: {}", refused.err);
    }
    assert_eq!(dev.end_by(Signal::INT).code, 0);
}

#[test]
fn two_run_beside_each_other_and_both_are_listed() {
    let Some(world) = World::new() else { return };
    let mut one = Process::start(world.program().arg("dev"));
    let mut other = Process::start(world.program().args(["dev", "--mount", "/tmp/other"]));
    one.says(READY);
    other.says(READY);
    let listed = run(world.program().arg("mounts"));
    assert_eq!(listed.code, 0);
    assert!(listed.out.contains(DIRECTORY) && listed.out.contains("/tmp/other"), "{}", listed.out);
    assert!(listed.out.ends_with("2 mounts, 0 stale, 0 gone\n"), "{}", listed.out);
    one.end_by(Signal::INT);
    let listed = run(world.program().arg("mounts"));
    assert!(!listed.out.contains(DIRECTORY) && listed.out.contains("/tmp/other"), "{}", listed.out);
    assert_eq!(headers("/run/fuse-secrets/agents"), [format!("dev-{}.header", other.id())]);
    other.end_by(Signal::INT);
}

#[test]
fn an_unmount_from_outside_ends_it_with_0() {
    let Some(world) = World::new() else { return };
    let mut dev = Process::start(world.program().arg("dev"));
    dev.says(READY);
    shell(&world, &format!("umount {DIRECTORY}"));
    let ended = dev.end();
    assert_eq!(ended.code, 0);
    assert!(ended.err.contains("unmounted"), "{}", ended.err);
}

#[test]
fn the_embedded_store_does_not_leave_this_machine() {
    let Some(world) = World::new() else { return };
    let refused = run(world.program().args(["dev", "--listen", "0.0.0.0:0"]));
    assert_eq!(refused.code, 64);
    assert!(refused.err.contains("127.0.0.1"), "{}", refused.err);
    assert!(!world.is_mounted(DIRECTORY));
}

#[test]
fn a_runtime_directory_that_others_may_enter_is_refused() {
    let Some(world) = World::new() else { return };
    // Somebody else was first to make it.
    world.directory(&format!("fuse-secrets-{NOBODY}"), crate::world::DAEMON);
    let refused = run(world.program_as(NOBODY).env_remove("XDG_RUNTIME_DIR").arg("dev"));
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("mode 0700"), "{}", refused.err);
}

/// Where groups can be made that bound their processes: cgroup version 1, else 2.
fn pids_controller() -> Option<PathBuf> {
    let (first, second) = (PathBuf::from("/sys/fs/cgroup/pids"), PathBuf::from("/sys/fs/cgroup"));
    if first.join("cgroup.procs").exists() {
        return Some(first);
    }
    let controllers = std::fs::read_to_string(second.join("cgroup.controllers")).ok()?;
    let there = controllers.split_whitespace().any(|name| name == "pids");
    (there && std::fs::write(second.join("cgroup.subtree_control"), "+pids").is_ok()).then_some(second)
}

#[test]
fn a_panic_unmounts_and_exits_with_70() {
    let Some(world) = World::new() else { return };
    // Nothing in the product panics on demand, but tokio does where no thread can be had for a name look-up.
    let Some(pids) = pids_controller() else {
        assert!(
            std::env::var_os("CI").is_none(),
            "this test needs the pids controller of a cgroup hierarchy"
        );
        println!("skipped: no pids controller in a cgroup hierarchy");
        return;
    };
    let group = pids.join(format!("fuse-secrets-test-{}", std::process::id()));
    std::fs::create_dir(&group).unwrap();
    let store = crate::store::Store::start();
    let (token, class) = (crate::store::token_file(&world), crate::store::class(&world, "app", ""));
    let directory = world.directory("mnt", 0);
    let port = store.embedded().address().to_string().rsplit(':').next().unwrap().to_owned();
    let mut mount = Process::start(
        world
            .program()
            .args(["mount", "--refresh-interval", "20s", "--max-age", "20s", "--address"])
            .arg(format!("http://localhost:{port}"))
            .arg("--token-file")
            .arg(token)
            .arg("--class")
            .arg(class)
            .arg(&directory),
    );
    mount.logs("mounted");
    // Answered: the file system's own threads are there.
    std::fs::read_dir(&directory).unwrap();
    std::fs::write(group.join("cgroup.procs"), mount.id().to_string()).unwrap();
    std::fs::write(group.join("pids.max"), "1").unwrap();
    // The next refresh needs a connection, that a look-up, and that a thread.
    let ended = mount.end();
    // It empties with the process, and goes.
    until("the group is gone", || std::fs::remove_dir(&group).is_ok());
    assert_eq!(ended.code, 70, "{}", ended.err);
    assert!(ended.err.contains("(panic)") && ended.err.contains("unmounted"), "{}", ended.err);
    assert!(!ended.err.contains("OS can't spawn"), "the message is not logged: {}", ended.err);
    assert!(!world.is_mounted(&directory));
}
