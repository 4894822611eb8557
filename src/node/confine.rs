//! What a process may: as many descriptors as it can get, and no right that is not needed, given up before there is a second
//! thread, as capabilities belong to each thread.

use std::io;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What is left of the bounding set, which an ordinary user cannot empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounding {
    /// Nothing.
    Empty,
    /// Something, which no program that this process executes can gain: `no_new_privs` holds.
    Inert,
}

/// Gives up every capability, for this process and all it executes.
///
/// # Errors
/// prctl(2) or capset(2); none can fail for want of a right.
pub fn drop_capabilities() -> io::Result<Bounding> {
    set_no_new_privs(true)?;
    // Kernels before 4.3 have no ambient set.
    match clear_ambient_capability_set() {
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let mut bounding = Bounding::Empty;
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => {}
            Ok(false) => continue,
            // Past the last one that this kernel knows.
            Err(_) => break,
        }
        if remove_capability_from_bounding_set(capability).is_err() {
            bounding = Bounding::Inert;
        }
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    let CapabilitySets { effective, permitted, inheritable } = capabilities(None)?;
    if (effective | permitted | inheritable).is_empty() {
        return Ok(bounding);
    }
    Err(io::Error::other("the kernel left some in force"))
}

/// As many descriptors as the hard limit allows: a volume has up to a dozen.
///
/// # Errors
/// setrlimit(2); not for want of a right.
pub fn raise_descriptors() -> io::Result<()> {
    let most = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?)
}

/// Ends this process as soon as the one that started it has ended, whatever it does then.
///
/// # Errors
/// prctl(2)
pub fn end_with_parent() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::child;

    #[test]
    fn no_capability_is_left_in_any_set() {
        if !child::is_one() {
            // In a process of its own: it cannot be undone.
            return child::run("node::confine::tests::no_capability_is_left_in_any_set", &[]);
        }
        // Capabilities are each thread's own, and so is their account.
        let root = rustix::process::geteuid().is_root();
        let bounding = drop_capabilities().unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let sets = ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"];
        let of =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        assert!(sets.iter().all(|name| of(name) == "0000000000000000"), "{status}");
        assert_eq!(of("NoNewPrivs:"), "1");
        assert_eq!(of("CapBnd:") == "0000000000000000", bounding == Bounding::Empty);
        assert!(!root || bounding == Bounding::Empty);
    }
}
