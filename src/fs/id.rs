//! Inode numbers and handles. Both are pure functions of a generation's number and a position in the spec, never pointers or
//! counters: a successor that serves the same content understands every number that its predecessor gave out.

/// The generation of what is not frozen.
pub const LIVE: u32 = 0;

/// An inode number: the generation (0: live) above, the node's index + 1 below, so that the live root is 1 as FUSE wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Inode(pub u64);

impl Inode {
    /// The root of the mount.
    pub const ROOT: Self = Self(1);
    /// The link `..data`.
    pub const DATA: Self = Self(u32::MAX as u64);

    /// A node's inode in a generation, or live.
    #[must_use]
    pub fn new(generation: u32, node: u32) -> Self {
        Self(u64::from(generation) << 32 | (u64::from(node) + 1))
    }

    /// The generation; [`LIVE`] for live inodes.
    #[must_use]
    pub fn generation(self) -> u32 {
        u32::try_from(self.0 >> 32).unwrap_or(LIVE)
    }

    /// The node's index.
    #[must_use]
    pub fn node(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(0).wrapping_sub(1)
    }
}

/// An open handle: the pinned generation above, the node's index below. Directories of the live tree pin generation 0: none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

impl Handle {
    /// A handle on a node of a generation.
    #[must_use]
    pub fn new(generation: u32, node: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(node))
    }

    /// The pinned generation.
    #[must_use]
    pub fn generation(self) -> u32 {
        u32::try_from(self.0 >> 32).unwrap_or(LIVE)
    }
}
