//! What this machine must have. A test that cannot run says so by name; under `CI=true` it fails.

use std::io::Write as _;
use std::path::PathBuf;

use crate::cluster::Options;
use crate::node::peer::Cgroup;

/// Whether mounts can be made; if not, says so.
///
/// # Panics
/// They cannot, and `CI=true`.
#[must_use]
pub fn kernel() -> bool {
    let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let privileged = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN));
    match fuse {
        Err(error) => lacking(&format!("/dev/fuse cannot be opened: {error}")),
        Ok(_) if !privileged => lacking("CAP_SYS_ADMIN is missing: run as root"),
        Ok(_) => true,
    }
}

/// A server's binary that an environment variable names.
///
/// # Panics
/// It is `required`, not there, and `CI=true`.
#[must_use]
pub fn server(variable: &str, required: bool) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        let text = format!("{variable} names no binary");
        if required {
            let _ = lacking(&text);
        } else {
            skipped(&format!("{text} (optional)"));
        }
    }
    found
}

/// A cgroup of a test's own; if none can be made, says so.
///
/// # Panics
/// It cannot, and `CI=true`.
#[must_use]
pub fn cgroup() -> Option<Cgroup> {
    let made = Cgroup::new();
    if made.is_none() {
        let _ = lacking("no hierarchy of cgroups can be written");
    }
    made
}

/// What a cluster of one node is made of, as the environment names it; if it cannot be started here, says so.
///
/// # Panics
/// It cannot, and `CI=true`.
#[must_use]
pub fn cluster() -> Option<Options> {
    if !kernel() {
        return None;
    }
    let found = Options::from_env().and_then(|options| {
        let files = ["hyperkube", "etcd", "containerd", "containerd-shim-runc-v2", "ctr", "runc"];
        let files = files.map(|name| options.programs.join(name)).into_iter();
        let images = ["pause.tar", "tools.tar"].map(|name| options.images.join(name));
        let missing = files.chain(images).chain(["/usr/lib/cni/bridge".into()]).find(|file| !file.exists());
        missing.map_or(Ok(options), |file| Err(format!("{} is missing", file.display())))
    });
    found.map_err(|why| lacking(&format!("a cluster of one node: {why}"))).ok()
}

fn lacking(why: &str) -> bool {
    assert!(!std::env::var("CI").is_ok_and(|ci| ci == "true"), "this must run under CI=true: {why}");
    skipped(why);
    false
}

fn skipped(why: &str) {
    let thread = std::thread::current();
    // Not by a macro: what those print is kept back while a test passes.
    let _ = writeln!(std::io::stderr(), "skipped: {}: {why}", thread.name().unwrap_or("a test"));
}
