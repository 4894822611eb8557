//! The shim: kubelet's side of fuse-secrets.

/// Below kubelet's root: where a volume is to be mounted, resolved without following links.
mod target;
/// FUSE mounts: made detached, attached by descriptor, taken away.
mod mount;
/// What is mounted where, as the kernel tells it.
mod mountinfo;
/// Dead mounts in the mount namespaces of running pods get the new mount.
mod heal;
/// System calls that rustix lacks and the wiping allocator: the only unsafe code.
mod sys;
/// For tests that need a mount namespace of their own.
#[cfg(test)]
mod child;

fn main() {}
