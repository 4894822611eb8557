//! The shim: kubelet's side of fuse-secrets.
fn main() {}
