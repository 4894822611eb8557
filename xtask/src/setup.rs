//! What a machine must have to build and test this repository. Each row is looked at in the way it will be used, not by
//! the name of a package.

use std::fs::OpenOptions;
use std::process::{Command, ExitCode};

use crate::command::{self, Error};

/// Says what this machine has and lacks for building and testing, and installs what it may
///
/// Installed, as root on Debian and its kin: fuse3. Everything else is named with the command that gets it. Exit code 1:
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
    /// The Debian package that has it and that may be installed unasked.
    package: Option<&'static str>,
    /// What was found; or why not.
    look: fn() -> Result<String, String>,
}

/// Every need, in the order of the table.
pub(crate) const NEEDS: [Need; 5] = [
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
        for_what: "the TLS library aws-lc",
        remedy: "apt-get install -y gcc libc6-dev",
        package: None,
        look: || version("cc", &["--version"]),
    },
    Need {
        name: "Go",
        for_what: "the Vault server that tests run against, csi-sanity",
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
];

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
    if apt_get(&["install", "-y", package]).is_err() {
        // Often only the list of packages is missing or old.
        apt_get(&["update"])?;
        apt_get(&["install", "-y", package])?;
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
