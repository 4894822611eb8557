//! For tests that need a process of their own: the test binary runs one of its tests again, under other limits.

use std::process::Command;

const VARIABLE: &str = "FUSE_SECRETS_TEST_CHILD";

/// Whether this process was made by [`run`].
pub(crate) fn is_one() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Runs the test `name` in a process of its own, started by `wrapper` (a program and its arguments), and fails if it fails.
pub(crate) fn run(name: &str, wrapper: &[&str]) {
    let binary = std::env::current_exe().unwrap();
    let mut words = wrapper.iter().map(std::ffi::OsStr::new).chain([binary.as_os_str()]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["--exact", name, "--nocapture", "--test-threads=1"]).env(VARIABLE, "1");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} failed in its own process: {}", output.status);
    assert!(text.contains("1 passed"), "there is no test {name}");
}

/// Runs the test `name` with `RLIMIT_MEMLOCK` at `limit` bytes and without `CAP_IPC_LOCK`.
pub(crate) fn run_with_little_memory(name: &str, limit: u64) {
    let limit = format!("--memlock={limit}:{limit}");
    let mut wrapper = vec!["prlimit", &limit];
    if rustix::process::geteuid().is_root() {
        // An ordinary user has neither; root loses both by losing them from the bounding set.
        wrapper.extend(["setpriv", "--inh-caps=-all", "--bounding-set=-ipc_lock,-sys_resource"]);
    }
    run(name, &wrapper);
}
