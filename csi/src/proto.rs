//! CSI and kubelet's plugin registration: what a node plugin needs of both, with the field numbers of their specifications
//! (container-storage-interface/spec v1.11 `csi.proto`; kubernetes `pluginregistration/v1`). Compiled from `proto/` by `build.rs`.
//!
//! A request is made of plain strings, also where it carries tokens: it has no `Debug`, is taken apart at once (`node`), and the
//! shim's allocator wipes what it leaves behind.

#![allow(missing_docs, reason = "generated: documented in `proto/`")]

/// Identity and Node.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// kubelet's side of a plugin's start.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
