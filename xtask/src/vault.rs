//! The real Vault server that tests run against, from `fuse-tests/servers/vault`: a Go module with nothing but a `main`,
//! whose `go.sum` pins everything.
//!
//! Vault's own tree holds a newer sdk than the one published under the version that it names. The differences that stop it
//! from compiling are changed in a copy of the published sdk ([`CHANGES`], [`ADDED`]).

use std::fs;
use std::path::{Path, PathBuf};

use crate::command::{self, Error};
use crate::{go, tools};

const SDK: &str = "github.com/hashicorp/vault/sdk";
const SDK_VERSION: &str = "v0.21.0";

/// File, what stands in it once, what is to stand there.
const CHANGES: [(&str, &str, &str); 2] = [
    (
        "framework/backend.go",
        "ActivationFunc func(context.Context, *logical.Request, string) error",
        "ActivationFunc func(context.Context, *logical.Request) error",
    ),
    (
        "helper/keysutil/lock_manager.go",
        "func (lm *LockManager) RestorePolicy(",
        "func (lm *LockManager) restorePolicy(",
    ),
];

const ADDED: (&str, &str) = (
    "helper/keysutil/restore.go",
    "package keysutil\n\nimport (\n\t\"context\"\n\n\t\"github.com/hashicorp/vault/sdk/logical\"\n)\n\n\
     // RestorePolicy also answers under which name the policy is restored.\n\
     func (lm *LockManager) RestorePolicy(ctx context.Context, s logical.Storage, name, backup string, force bool) (string, error) {\n\
     \treturn name, lm.restorePolicy(ctx, s, name, backup, force)\n}\n",
);

/// The binary `vault`; built on first use.
pub(crate) fn binary() -> Result<PathBuf, Error> {
    let module = tools::root().join("fuse-tests/servers/vault");
    let changed: Vec<&str> =
        CHANGES.iter().flat_map(|&(file, old, new)| [file, old, new]).chain([ADDED.1]).collect();
    let directory = tools::directory("vault", &go::key(&module, &["main.go"], &changed)?);
    let binary = directory.join("vault");
    if !binary.exists() {
        println!("building a Vault server once, 10 to 15 minutes on two cores");
        build(&module, &directory)?;
    }
    Ok(binary)
}

fn build(module: &Path, directory: &Path) -> Result<(), Error> {
    let source = directory.join("source");
    if source.exists() {
        fs::remove_dir_all(&source)?;
    }
    fs::create_dir_all(&source)?;
    for file in ["go.mod", "go.sum", "main.go"] {
        fs::copy(module.join(file), source.join(file))?;
    }
    let published =
        command::output(go::go(&source).args(["mod", "download", "-json", &format!("{SDK}@{SDK_VERSION}")]))?;
    let published: serde_json::Value = serde_json::from_str(&published)?;
    let published = published["Dir"].as_str().ok_or("go mod download named no directory")?;
    let sdk = source.join("sdk");
    copy(Path::new(published), &sdk)?;
    for (file, old, new) in CHANGES {
        change(&sdk.join(file), old, new)?;
    }
    fs::write(sdk.join(ADDED.0), ADDED.1)?;
    let require = format!("-require={SDK}@{SDK_VERSION}");
    command::run(go::go(&source).args(["mod", "edit", &require, &format!("-replace={SDK}=./sdk")]))?;
    go::build(&source, ".", &directory.join("vault"))?;
    fs::remove_dir_all(&source)?;
    Ok(())
}

/// Copies a tree and makes the copy writable, which Go's module cache is not.
fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            // Its content only: fs::copy would take the read-only mode along.
            fs::write(&target, fs::read(entry.path())?)?;
        }
    }
    Ok(())
}

fn change(file: &Path, old: &str, new: &str) -> Result<(), Error> {
    let text = fs::read_to_string(file)?;
    if text.matches(old).count() != 1 {
        return Err(format!("{}: expected to find {old:?} once: is it another sdk?", file.display()).into());
    }
    fs::write(file, text.replace(old, new))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_does_not_fit_once_is_refused() {
        let directory = std::env::temp_dir().join(format!("xtask-change-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("x.go");
        fs::write(&file, "one two two").unwrap();
        assert!(change(&file, "two", "2").unwrap_err().to_string().contains("another sdk"));
        change(&file, "one", "1").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "1 two two");
        fs::remove_dir_all(&directory).unwrap();
    }
}
