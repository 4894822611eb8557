//! The real Kubernetes for a cluster of one node, from `fuse-tests/servers/kubernetes`: Go modules with little more than a list of what
//! to build, whose `go.sum` pins everything; and the images of its pods.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{self, Error};
use crate::go::{self, How};
use crate::images::Architecture;
use crate::oci::Image;
use crate::{setup, tools};

/// A program: the file below `target/tools`, its module, its package.
struct Program {
    name: &'static str,
    module: &'static str,
    package: &'static str,
    how: How<'static>,
}

const PLAIN: How<'static> = How { texts: &[], tags: "", cgo: false };

/// What kubelet tells of itself; without it, a version that no client takes for a new one.
const KUBERNETES: How<'static> = How {
    texts: &[
        "k8s.io/component-base/version.gitVersion=v1.36.3",
        "k8s.io/component-base/version.gitMajor=1",
        "k8s.io/component-base/version.gitMinor=36",
    ],
    ..PLAIN
};

/// kubelet asks the runtime for its version too.
const CONTAINERD: How<'static> =
    How { texts: &["github.com/containerd/containerd/v2/version.Version=2.2.9"], ..PLAIN };

/// Without seccomp runc refuses every ordinary pod.
const RUNC: How<'static> = How { tags: "seccomp", cgo: true, ..PLAIN };

const PROGRAMS: [Program; 6] = [
    Program { name: "runc", module: "runc", package: "github.com/opencontainers/runc", how: RUNC },
    Program { name: "etcd", module: "etcd", package: "go.etcd.io/etcd/server/v3", how: PLAIN },
    Program {
        name: "containerd",
        module: "containerd",
        package: "github.com/containerd/containerd/v2/cmd/containerd",
        how: CONTAINERD,
    },
    Program {
        name: "containerd-shim-runc-v2",
        module: "containerd",
        package: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        how: CONTAINERD,
    },
    Program {
        name: "ctr",
        module: "containerd",
        package: "github.com/containerd/containerd/v2/cmd/ctr",
        how: CONTAINERD,
    },
    Program { name: "hyperkube", module: "kube", package: ".", how: KUBERNETES },
];

/// The directory with all programs; built on first use.
pub(crate) fn programs() -> Result<PathBuf, Error> {
    let directory = directory()?;
    for Program { name, module, package, how } in PROGRAMS {
        let program = directory.join(name);
        if !program.exists() {
            let time = if name == "hyperkube" { "7 to 15 minutes on two cores" } else { "a minute" };
            println!("building {name} once, {time}");
            fs::create_dir_all(&directory)?;
            go::build_with(&modules().join(module), package, &program, how)?;
        }
    }
    Ok(directory)
}

/// By what all of them are made of.
fn directory() -> Result<PathBuf, Error> {
    let mut key = String::new();
    for (module, sources) in [("runc", &[][..]), ("etcd", &[]), ("containerd", &[]), ("kube", &["main.go"])] {
        let how = PROGRAMS.iter().filter(|program| program.module == module);
        let how: Vec<&str> = how.flat_map(|program| program.how.texts.iter().copied()).collect();
        key.push_str(&go::key(&modules().join(module), sources, &how)?[..8]);
    }
    Ok(tools::directory("kubernetes", &key))
}

fn modules() -> PathBuf {
    tools::root().join("fuse-tests/servers/kubernetes")
}

/// Writes the images of pods that are not the product's into `target/images`: `pause.tar`, which holds a pod's namespaces, and
/// `tools.tar`, a shell with its commands.
pub(crate) fn images() -> Result<(), Error> {
    let directory = tools::images();
    fs::create_dir_all(&directory)?;
    let pause = directory.join("pause");
    let mut cc = Command::new("cc");
    cc.args(["-static", "-Os", "-s", "-Wall", "-Werror", "-o"]).arg(&pause).arg(modules().join("pause.c"));
    command::run(&mut cc)?;
    let image = Image {
        name: "localhost/pause:1",
        architecture: Architecture::HOST.name(),
        entrypoint: &["/pause"],
        files: &[(&pause, "/pause", 0o755)],
        ..Image::default()
    };
    image.write(&directory.join("pause.tar"))?;
    fs::remove_file(&pause)?;

    let applets = command::output(Command::new(setup::BUSYBOX).arg("--list"))?;
    let applets = applets.lines().filter(|name| *name != "busybox");
    let links: Vec<(String, &str)> = applets.map(|name| (format!("/bin/{name}"), "busybox")).collect();
    let image = Image {
        name: "localhost/tools:1",
        architecture: Architecture::HOST.name(),
        directories: &[("/bin", 0o755), ("/etc", 0o755), ("/mnt", 0o755), ("/tmp", 0o1777)],
        files: &[(Path::new(setup::BUSYBOX), "/bin/busybox", 0o755)],
        links: &links,
        ..Image::default()
    };
    image.write(&directory.join("tools.tar"))
}
