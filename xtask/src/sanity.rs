//! Programs that call the shim as Kubernetes does, from `fuse-tests/servers/csi`: `csi-sanity`, the conformance tests of the
//! Container Storage Interface, and `dial-registration`, kubelet's first call to a plugin.

use std::path::PathBuf;

use crate::command::Error;
use crate::{go, tools};

const SANITY: &str = "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity";

/// Where they are.
pub(crate) struct Programs {
    pub(crate) sanity: PathBuf,
    pub(crate) dial: PathBuf,
}

/// Both programs; built on first use.
pub(crate) fn programs() -> Result<Programs, Error> {
    let module = tools::root().join("fuse-tests/servers/csi");
    let directory = tools::directory("csi", &go::key(&module, &[])?);
    let programs =
        Programs { sanity: directory.join("csi-sanity"), dial: directory.join("dial-registration") };
    for (program, package) in [(&programs.sanity, SANITY), (&programs.dial, ".")] {
        if !program.exists() {
            println!("building {} once, half a minute", program.display());
            go::build(&module, package, program)?;
        }
    }
    Ok(programs)
}
