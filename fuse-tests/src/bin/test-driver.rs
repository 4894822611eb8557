//! Another driver of secrets, as small as can be: a tmpfs with one file for each volume. It ends when standard input does, and its volumes
//! stay; its registration goes with it, as node-driver-registrar does it.
//!
//! ```text
//!   test-driver NAME TEXT     under this name; the file `password` of every volume holds TEXT
//! ```

#![allow(clippy::unwrap_used, reason = "a program of the tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_secrets_csi::identity::Identity;
use fuse_secrets_csi::node::{Node, Publish, Refusal, VolumeStats, Volumes};
use fuse_secrets_csi::registration::Plugin;
use fuse_secrets_csi::rpc;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::io::AsyncReadExt as _;
use tonic::service::Routes;

/// kubelet's directory.
const ROOT: &str = "/var/lib/kubelet";
/// gRPC's `NOT_FOUND`, `INTERNAL`.
const NOT_FOUND: u32 = 5;
const INTERNAL: u32 = 13;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, text] = &arguments[..] else { panic!("usage: test-driver NAME TEXT") };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(run(name, text));
    // A read of standard input may hang in it.
    runtime.shutdown_background();
}

async fn run(name: &str, text: &str) {
    let driver = Tmpfs { text: text.into() };
    let socket = PathBuf::from(format!("{ROOT}/plugins/{name}-tmpfs/csi.sock"));
    let services = Routes::new(Identity::server(name.to_owned(), driver.clone()))
        .add_service(Node::server("node".to_owned(), driver));
    let registry = Path::new(ROOT).join("plugins_registry");
    let mut input = tokio::io::stdin();
    let mut nothing = [0];
    tokio::select! {
        served = rpc::serve(rpc::listen(&socket).unwrap(), services, std::future::pending()) => served.unwrap(),
        Err(error) = Plugin::new(name, &socket.display().to_string()).register(&registry) => panic!("{error}"),
        end = input.read(&mut nothing) => assert_eq!(end.unwrap(), 0, "nothing is said to it"),
    }
}

#[derive(Clone)]
struct Tmpfs {
    text: Arc<str>,
}

impl Volumes for Tmpfs {
    async fn publish(&self, Publish { target, .. }: Publish) -> Result<Vec<String>, Refusal> {
        if is_mounted(&target) {
            return Ok(Vec::new());
        }
        let made = fs::create_dir_all(&target)
            .and_then(|()| Ok(mount("tmpfs", &target, "tmpfs", MountFlags::empty(), Some(c"mode=755"))?))
            .and_then(|()| fs::write(target.join("password"), &*self.text));
        made.map(|()| Vec::new()).map_err(|error| Refusal::new(INTERNAL, error))
    }

    async fn unpublish(&self, _: &str, target: &Path) -> Result<(), Refusal> {
        while is_mounted(target) {
            unmount(target, UnmountFlags::empty()).map_err(|error| Refusal::new(INTERNAL, error))?;
        }
        match fs::remove_dir(target) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Refusal::new(INTERNAL, error)),
            _ => Ok(()),
        }
    }

    async fn stats(&self, _: &str, target: &Path) -> Result<VolumeStats, Refusal> {
        if is_mounted(target) {
            Ok(VolumeStats { bytes: self.text.len() as u64, files: 1, fault: None })
        } else {
            Err(Refusal::new(NOT_FOUND, "not mounted"))
        }
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

fn is_mounted(target: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4).is_some_and(|point| Path::new(point) == target))
}
