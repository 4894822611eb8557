//! The shim: kubelet's side of fuse-secrets.
/// k
pub mod keeper;
fn main() {}
