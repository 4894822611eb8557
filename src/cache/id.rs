//! What the cache's parts call each other's things: numbers, so that no part holds another's.

macro_rules! ids {
    ($($(#[$doc:meta])+ $name:ident;)+) => { $(
        $(#[$doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);
    )+ };
}

ids! {
    /// One held key. Never used again for another, nor for the same key held anew.
    EntryId;
    /// One identity in use. Never used again.
    IdentityId;
    /// One request at a store. Never used again.
    FlightId;
    /// One registration; the driver's number.
    HolderId;
    /// One reader who waits; the driver's number.
    WantId;
}
