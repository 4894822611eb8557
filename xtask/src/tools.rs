//! What is built once and kept: `target/tools/<name>-<version>/…`. A tool that is there is used as it is, so that a warm run
//! needs no network. Everything comes through cargo or go, by version and checksum.

use std::path::{Path, PathBuf};

use crate::command::{self, Error};

const CARGO_DENY: &str = "0.20.2";

/// The repository.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The directory of one tool in one version.
pub(crate) fn directory(name: &str, version: &str) -> PathBuf {
    target().join("tools").join(format!("{name}-{version}"))
}

/// Where images for tests are.
pub(crate) fn images() -> PathBuf {
    target().join("images")
}

/// Cargo's directory.
pub(crate) fn target() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// cargo-deny; installed on first use.
pub(crate) fn cargo_deny() -> Result<PathBuf, Error> {
    let directory = directory("cargo-deny", CARGO_DENY);
    let binary = directory.join("bin/cargo-deny");
    if !binary.exists() {
        println!("building cargo-deny {CARGO_DENY} once, a minute or two");
        let mut install = command::cargo();
        // It runs for seconds: optimising it would take longer than it ever saves.
        install.args([
            "install",
            "--quiet",
            "--locked",
            "--profile",
            "dev",
            "--version",
            CARGO_DENY,
            "--root",
        ]);
        install.env("CARGO_PROFILE_DEV_DEBUG", "false");
        command::run(install.arg(&directory).arg("cargo-deny"))?;
    }
    Ok(binary)
}
