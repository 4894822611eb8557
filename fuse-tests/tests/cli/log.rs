use rustix::process::Signal;

use crate::process::{Process, run, until};
use crate::store::{Store, assert_silent, class, token_file};
use crate::world::World;

#[test]
fn json_logs_have_one_object_per_line_and_no_secret_even_at_trace() {
    let Some(world) = World::new() else { return };
    let store = Store::start();
    world.directory("mnt", 0);
    let mut mount = world.program();
    mount.args(["--log", "trace", "--log-format", "json", "mount", "--address", &store.address(), "mnt"]);
    mount.arg("--token-file").arg(token_file(&world)).arg("--class").arg(class(&world, "app", ""));
    let mut mount = Process::start(&mut mount);
    mount.logs("\"mounted\"");
    run(world.command("cat").arg("/tmp/mnt/password"));
    let ended = mount.end_by(Signal::TERM);
    assert!(ended.err.lines().count() > 3, "{}", ended.err);
    for line in ended.err.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(value["level"].is_string() && value["timestamp"].is_string(), "{line}");
    }
    assert_silent(&ended.err);
}

#[test]
fn an_outage_is_told_once_when_it_begins_and_once_when_it_ends() {
    let Some(world) = World::new() else { return };
    let mut dev = Process::start(world.program().arg("dev"));
    let text = dev.says("Ctrl-C");
    let address = text.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
    let address = address.trim_end_matches(':');
    let header = text.split_whitespace().find(|word| word.starts_with('@')).unwrap();
    let control = |what: &str| {
        let url = format!("{address}/v1/sys/embedded/{what}");
        let ended = run(world.command("curl").args(["-sSf", "-X", "POST", "-H", header, &url]));
        assert_eq!(ended.code, 0, "{}", ended.err);
    };
    let failures = || {
        let text = run(world.program().args(["mounts", "--metrics"])).out;
        let line = text.lines().find(|line| line.starts_with("fuse_secrets_cache_refresh_failures_total{"));
        line.and_then(|line| line.rsplit(' ').next()).and_then(|n| n.parse::<u32>().ok()).unwrap()
    };
    control("seal");
    until("each secret has failed several times", || failures() >= 9);
    control("unseal");
    for _ in 0..3 {
        dev.logs("can be read again");
    }
    until("all are fresh", || {
        let listed = run(world.program().args(["mounts", "-o", "json"])).out;
        listed.contains("\"fresh\"")
    });
    let ended = dev.end_by(Signal::TERM);
    assert_eq!(ended.err.matches("cannot be read").count(), 3, "{}", ended.err);
    assert_eq!(ended.err.matches("can be read again").count(), 3, "{}", ended.err);
    assert!(ended.err.contains("sealed"), "{}", ended.err);
}

#[test]
fn the_filter_comes_by_flag_or_environment_and_a_wrong_one_is_64() {
    let Some(world) = World::new() else { return };
    for filter in ["inof", "info,cache=bogus", "info,bogus", "=", "a=b=c"] {
        let by_flag = run(world.program().args(["--log", filter, "mounts"]));
        let by_variable = run(world.program().env("FUSE_SECRETS_LOG", filter).arg("mounts"));
        for ended in [by_flag, by_variable] {
            assert_eq!(ended.code, 64, "{filter}");
            assert!(ended.err.contains("FUSE_SECRETS_LOG"), "{}", ended.err);
        }
    }
    for filter in ["", "off", "warn", "debug,fuse_secrets::cache=trace", "fuse_secrets::store"] {
        let ended = run(world.program().env("FUSE_SECRETS_LOG", filter).arg("mounts"));
        assert_eq!(ended.code, 0, "{filter}: {}", ended.err);
    }
    let quiet = run(world.program().env("FUSE_SECRETS_LOG_FORMAT", "xml").arg("mounts"));
    assert_eq!(quiet.code, 64);
}
