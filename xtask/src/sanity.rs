//! Programs that call the shim as Kubernetes does, from `fuse-tests/servers/csi`: `csi-sanity`, the conformance tests of the
//! Container Storage Interface with a controller beside them, and `dial-registration`, kubelet's first calls to a plugin.

use std::path::PathBuf;

use crate::command::Error;
use crate::{go, tools};

/// Where they are.
pub(crate) struct Programs {
    pub(crate) sanity: PathBuf,
    pub(crate) dial: PathBuf,
}

/// Both programs; built on first use.
pub(crate) fn programs() -> Result<Programs, Error> {
    let module = tools::root().join("fuse-tests/servers/csi");
    let directory = tools::directory("csi", &go::key(&module, &["dial/main.go", "sanity/main.go"], &[])?);
    let programs =
        Programs { sanity: directory.join("csi-sanity"), dial: directory.join("dial-registration") };
    for (program, package) in [(&programs.sanity, "./sanity"), (&programs.dial, "./dial")] {
        if !program.exists() {
            println!("building {} once, half a minute", program.display());
            go::build(&module, package, program)?;
        }
    }
    Ok(programs)
}
