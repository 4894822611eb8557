//! What a machine must have to build and test this repository. Each row is looked at in the way it will be used, not by
//! the name of a package.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use crate::command::{self, Error};

/// Says what this machine has and lacks for building and testing, and installs what it may
///
/// Installed, as root on Debian and its kin: fuse3, and what the cluster of one node is made of beside Go (static busybox, CNI
/// plugins, libseccomp, pkg-config, ip). Everything else is named with the command that gets it. Exit code 1:
/// something is missing.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only look, install nothing
    #[arg(long)]
    check: bool,
}

/// The lowest Go that the programs of the tests build with.
const GO: (u32, u32) = (1, 26);

/// One thing that is needed.
pub(crate) struct Need {
    pub(crate) name: &'static str,
    /// What cannot be done without it.
    pub(crate) for_what: &'static str,
    pub(crate) remedy: &'static str,
    /// The Debian packages that have it and that may be installed unasked.
    package: Option<&'static str>,
    /// What was found; or why not.
    look: fn() -> Result<String, String>,
}

/// Every need, in the order of the table.
pub(crate) const NEEDS: [Need; 10] = [
    Need {
        name: "rustfmt, clippy",
        for_what: "checks of form",
        remedy: "rustup component add rustfmt clippy",
        package: None,
        look: || {
            version("cargo", &["fmt", "--version"]).and_then(|_| version("cargo", &["clippy", "--version"]))
        },
    },
    Need {
        name: "C compiler",
        for_what: "the TLS library aws-lc, runc",
        remedy: "apt-get install -y gcc libc6-dev",
        package: None,
        look: || version("cc", &["--version"]),
    },
    Need {
        name: "Go",
        for_what: "the Vault server that tests run against, csi-sanity, the cluster of one node",
        remedy: "install Go 1.26 or newer from https://go.dev/dl",
        package: None,
        look: go,
    },
    Need {
        name: "fusermount3",
        for_what: "mounts of ordinary users",
        remedy: "apt-get install -y fuse3",
        package: Some("fuse3"),
        look: || version("fusermount3", &["--version"]),
    },
    Need {
        name: "/dev/fuse",
        for_what: "every mount",
        remedy: "modprobe fuse; chmod 666 /dev/fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN",
        package: None,
        look: dev_fuse,
    },
    Need {
        name: "static libc",
        for_what: "images of pods: the cluster of one node",
        remedy: "apt-get install -y libc6-dev",
        package: Some("libc6-dev"),
        look: static_libc,
    },
    Need {
        name: "busybox",
        for_what: "images of pods: the cluster of one node",
        remedy: "apt-get install -y busybox-static",
        package: Some("busybox-static"),
        look: busybox,
    },
    Need {
        name: "CNI plugins",
        for_what: "the network of pods: the cluster of one node",
        remedy: "apt-get install -y containernetworking-plugins",
        package: Some("containernetworking-plugins"),
        look: || {
            let plugins = ["bridge", "host-local", "loopback", "portmap"].map(|name| format!("{CNI}/{name}"));
            let missing = plugins.iter().find(|plugin| !Path::new(plugin).exists());
            missing.map_or_else(|| Ok(CNI.to_owned()), |plugin| Err(format!("{plugin} is not there")))
        },
    },
    Need {
        name: "libseccomp",
        for_what: "runc: the cluster of one node",
        remedy: "apt-get install -y libseccomp-dev pkg-config",
        package: Some("libseccomp-dev pkg-config"),
        look: || version("pkg-config", &["--modversion", "libseccomp"]),
    },
    Need {
        name: "ip, nsenter",
        for_what: "the network of the cluster of one node",
        remedy: "apt-get install -y iproute2 util-linux",
        package: Some("iproute2 util-linux"),
        look: || version("nsenter", &["--version"]).and_then(|_| version("ip", &["-Version"])),
    },
];

/// Those without which there is no cluster of one node.
const CLUSTER: [&str; 8] =
    ["C compiler", "Go", "/dev/fuse", "static libc", "busybox", "CNI plugins", "libseccomp", "ip, nsenter"];

/// Where Debian has a static one.
pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// Where Debian has the plugins that connect pods.
const CNI: &str = "/usr/lib/cni";

/// Why the cluster of one node cannot be built or run here, if so.
pub(crate) fn lacking_cluster() -> Option<String> {
    let is_root = command::output(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim() == "0");
    if !is_root {
        return Some("namespaces and cgroups of its own need root".to_owned());
    }
    NEEDS.iter().filter(|need| CLUSTER.contains(&need.name)).find_map(Need::lacking)
}

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    let mut missing = false;
    let width = NEEDS.iter().map(|need| need.name.len()).max().unwrap_or(0);
    for need in &NEEDS {
        let (state, text) = match (need.look)() {
            Ok(found) => ("found", found),
            Err(_) if !args.check && install(need)? => match (need.look)() {
                Ok(found) => ("installed", found),
                Err(why) => ("missing", need.explain(&why)),
            },
            Err(why) => ("missing", need.explain(&why)),
        };
        missing |= state == "missing";
        println!("{:width$}  {state:9}  {text}", need.name);
    }
    if missing {
        println!("\nWhat is missing keeps some tests from running: see the lines above.");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

impl Need {
    /// Why it cannot be used, if so, with the remedy.
    pub(crate) fn lacking(&self) -> Option<String> {
        (self.look)().err().map(|why| self.explain(&why))
    }

    fn explain(&self, why: &str) -> String {
        format!("needed for {}: {why}; {}", self.for_what, self.remedy)
    }
}

/// Installs a need's package if this user and this system can. Whether it did.
fn install(need: &Need) -> Result<bool, Error> {
    let Some(package) = need.package else { return Ok(false) };
    let is_root = command::output(Command::new("id").arg("-u"))?.trim() == "0";
    if !is_root || version("apt-get", &["--version"]).is_err() {
        return Ok(false);
    }
    let apt_get = |arguments: &[&str]| {
        command::run(Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    let packages: Vec<&str> = package.split(' ').collect();
    let install = [&["install", "-y"], &packages[..]].concat();
    if apt_get(&install).is_err() {
        // Often only the list of packages is missing or old.
        apt_get(&["update"])?;
        apt_get(&install)?;
    }
    Ok(true)
}

/// First line of what a program says of itself.
fn version(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} {} ended with {}", arguments.join(" "), output.status));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn go() -> Result<String, String> {
    let text = version("go", &["version"])?;
    let found = parse_go(&text).ok_or_else(|| format!("cannot read a version from {text:?}"))?;
    if found < GO { Err(format!("Go {}.{} is too old", found.0, found.1)) } else { Ok(text) }
}

/// `go version go1.26.8 linux/amd64` → (1, 26).
fn parse_go(text: &str) -> Option<(u32, u32)> {
    let word = text.split_whitespace().find_map(|word| word.strip_prefix("go1."))?;
    let minor = word.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((1, minor.parse().ok()?))
}

fn dev_fuse() -> Result<String, String> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    open.map(|_| "can be opened".to_owned()).map_err(|error| format!("cannot be opened: {error}"))
}

/// Links a program as the images' programs are linked.
fn static_libc() -> Result<String, String> {
    let mut cc = Command::new("cc");
    cc.args(["-static", "-x", "c", "-o", "/dev/null", "-"]).stdin(Stdio::piped()).stderr(Stdio::null());
    let mut child = cc.spawn().map_err(|error| format!("cc: {error}"))?;
    let input = child.stdin.take().ok_or("cc reads nothing")?;
    { input }.write_all(b"int main(void) { return 0; }\n").map_err(|error| format!("cc: {error}"))?;
    match child.wait() {
        Ok(status) if status.success() => Ok("links".to_owned()),
        Ok(status) => Err(format!("cc -static ended with {status}")),
        Err(error) => Err(format!("cc: {error}")),
    }
}

/// The program of pods: one that needs no file beside itself.
fn busybox() -> Result<String, String> {
    let text = version(BUSYBOX, &["--help"])?;
    let program = std::fs::read(BUSYBOX).map_err(|error| format!("{BUSYBOX}: {error}"))?;
    let interpreter = b"/ld-linux";
    if program.windows(interpreter.len()).any(|window| window == interpreter) {
        return Err(format!("{BUSYBOX} is linked to shared libraries"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_compared_by_number() {
        assert_eq!(parse_go("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(parse_go("go version go1.27rc1 linux/amd64"), Some((1, 27)));
        assert_eq!(parse_go("nothing"), None);
        assert!(parse_go("go version go1.9.7 linux/amd64").unwrap() < GO);
    }
}
