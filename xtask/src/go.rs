//! Programs in Go that tests use: modules below `fuse-tests/servers` with little more than `main`s, whose `go.sum` pins
//! everything. Built once, kept under `target/tools` by what they are made of.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::command::{self, Error};

/// What a module is made of, as a short name: the versions of others', its `sources`, and what is `changed` in others' before
/// it is built.
pub(crate) fn key(module: &Path, sources: &[&str], changed: &[&str]) -> Result<String, Error> {
    let mut hash = Fnv::new();
    for file in ["go.sum", "go.mod"].iter().chain(sources) {
        hash.add(&fs::read(module.join(file))?);
    }
    changed.iter().for_each(|text| hash.add(text.as_bytes()));
    Ok(format!("{:016x}", hash.0))
}

/// The `go` command in a module's directory.
pub(crate) fn go(directory: &Path) -> Command {
    let mut go = Command::new("go");
    go.current_dir(directory);
    go.envs([("GOFLAGS", "-mod=mod"), ("GOTOOLCHAIN", "local"), ("CGO_ENABLED", "0")]);
    go
}

/// How a package is built, beside the usual.
#[derive(Clone, Copy, Default)]
pub(crate) struct How<'a> {
    /// Texts that are set while linking: `package.Variable=text`.
    pub(crate) texts: &'a [&'a str],
    /// Build tags.
    pub(crate) tags: &'a str,
    /// With C, for which a compiler and libraries must be there.
    pub(crate) cgo: bool,
}

/// Builds one package of a module. Renamed into place when it is whole, so that a run that was interrupted leaves no half of
/// a program.
pub(crate) fn build(module: &Path, package: &str, program: &Path) -> Result<(), Error> {
    build_with(module, package, program, How::default())
}

/// The same in another way.
pub(crate) fn build_with(module: &Path, package: &str, program: &Path, how: How<'_>) -> Result<(), Error> {
    let partial = program.with_extension("partial");
    let texts: Vec<String> = how.texts.iter().map(|text| format!(" -X {text}")).collect();
    let mut go = go(module);
    go.args(["build", "-trimpath", "-buildvcs=false"]).arg(format!("-ldflags=-s -w{}", texts.concat()));
    if how.cgo {
        go.env("CGO_ENABLED", "1");
    }
    if !how.tags.is_empty() {
        go.arg("-tags").arg(how.tags);
    }
    command::run(go.arg("-o").arg(&partial).arg(package))?;
    fs::rename(&partial, program)?;
    Ok(())
}

/// FNV-1a, 64 bits: a name for a cache's directory, no protection against anybody.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools;

    #[test]
    fn the_key_follows_the_pinned_versions_and_the_changes() {
        let module = tools::root().join("fuse-tests/servers/vault");
        let plain = key(&module, &["main.go"], &[]).unwrap();
        assert_eq!(plain.len(), 16);
        assert_ne!(plain, key(&module, &["main.go"], &["changed"]).unwrap());
        assert_ne!(plain, key(&module.with_file_name("csi"), &["dial/main.go"], &[]).unwrap());
        assert!(key(&module.join("nowhere"), &[], &[]).is_err());
    }
}
