//! CSI and kubelet's plugin registration: what a node plugin needs of both, with the field numbers of their specifications
//! (container-storage-interface/spec v1.11 `csi.proto`; kubernetes `pluginregistration/v1`). Compiled from `proto/` by `build.rs`.
