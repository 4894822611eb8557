//! What goes into the machine and what comes out.

use std::time::Instant;

use crate::cache::State;
use crate::cache::id::{EntryId, FlightId, HolderId, IdentityId, WantId};
use crate::cache::identity::Terms;
use crate::reference::{Freshness, Key};
use crate::store::{Lease, StoreError};

/// What happened.
pub enum Event {
    /// A volume wants these keys. [`super::Machine::admit`] has admitted it.
    Register {
        /// Its registration.
        holder: HolderId,
        /// What it holds; all of one identity.
        keys: Vec<Key>,
        /// How fresh.
        freshness: Freshness,
        /// A login that was made for it already; the driver keeps the token.
        login: Option<Terms>,
    },
    /// A registration ended.
    Unregister {
        /// Which.
        holder: HolderId,
    },
    /// A reader found values that are too old. Ends with [`Action::Wake`], at `until` at the latest.
    Want {
        /// Who.
        want: WantId,
        /// Through which registration.
        holder: HolderId,
        /// What.
        entries: Vec<EntryId>,
        /// How long it waits.
        until: Instant,
    },
    /// An identity has a new credential.
    Credential {
        /// Whose.
        identity: IdentityId,
        /// Whether it is the store's token itself, so that the one in use is outdated.
        replaces_token: bool,
    },
    /// A login or a renewal ended.
    LoggedIn {
        /// Which.
        flight: FlightId,
        /// What it gave; the driver keeps the token.
        result: Result<Terms, StoreError>,
    },
    /// A read ended.
    Answered {
        /// Which.
        flight: FlightId,
        /// The lease; the driver keeps the value.
        result: Result<Lease, StoreError>,
    },
    /// [`super::Machine::wake_at`] came.
    Tick,
}

/// What the driver must do, in this order.
#[derive(Debug)]
pub enum Action {
    /// Log in.
    Login {
        /// The request; its end names it.
        flight: FlightId,
        /// Whose.
        identity: IdentityId,
        /// By when the store must answer.
        deadline: Instant,
    },
    /// Prolong the identity's token.
    Renew {
        /// The request; its end names it.
        flight: FlightId,
        /// Whose.
        identity: IdentityId,
        /// By when the store must answer.
        deadline: Instant,
    },
    /// The token that the registration, or the ended login or renewal, brought is the identity's from now on.
    Hold {
        /// Whose.
        identity: IdentityId,
    },
    /// Nobody uses the identity any more: give its token back, wipe token and credentials.
    Forget {
        /// Whose.
        identity: IdentityId,
    },
    /// Read with the identity's token.
    Read {
        /// The request; its end names it.
        flight: FlightId,
        /// Whose.
        identity: IdentityId,
        /// Which entry.
        entry: EntryId,
        /// By when the store must answer.
        deadline: Instant,
    },
    /// The answer that the ended read brought is the entry's value from now on, and Fresh.
    Publish {
        /// Which entry.
        entry: EntryId,
    },
    /// A read failed; the entry is in this state.
    Fail {
        /// Which entry.
        entry: EntryId,
        /// The state that it is in now.
        state: State,
        /// What came back.
        error: StoreError,
    },
    /// Time moved the entry into this state. A value that is Gone is wiped.
    Age {
        /// Which entry.
        entry: EntryId,
        /// The state that it is in now.
        state: State,
    },
    /// Nobody holds the entry any more: wipe it.
    Drop {
        /// Which entry.
        entry: EntryId,
    },
    /// The reader need not wait any longer.
    Wake {
        /// Who.
        want: WantId,
        /// Whether it waited for a request.
        waited: bool,
        /// Whether all that it wanted is young enough.
        fresh: bool,
    },
}
