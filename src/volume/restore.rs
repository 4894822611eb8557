//! A volume that a predecessor left: served at once from its generations, whether or not the store answers.
//!
//! ```text
//!   record, opens, generations ─▶ restored: each file Fresh until its max age after the recorded refresh, then LastKnown
//!                                    │ the store answers for a file, in whatever time: the ordinary life of a volume
//!                                    │ its grace ends, counted from the recorded refresh: given up
//! ```
//! What a predecessor left may be what killed it, so none of it is trusted:
//!
//! | unreadable | what is left |
//! |---|---|
//! | a generation | the others; numbers go on above it |
//! | every generation | EIO until the store has answered for every file |
//! | the table of opens | all generations are kept until the limit pushes them out |
//! | the record | EIO until the volume is published again ([`Volume::is_blank`]) |

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use fuse_secrets_csi::wire::message::Part;

use super::lent::Lent;
use super::opens::Opens;
use super::record::Record;
use super::snapshot::Snapshot;
use super::{Keeper, Lending, Pod, Standing, Surroundings, Volume};
use crate::cache::Cache;
use crate::reference::{
    Auth, AuthMethod, Connection, Freshness, Identity, Ownership, Subject, VolumeId, VolumeSpec,
};
use crate::store::Credential;
use crate::time::Moment;

/// After this time a volume is registered again that the cache had no room for.
const RETRY: Duration = Duration::from_secs(5);

/// What a predecessor left.
pub struct Legacy {
    /// The volume's name on this node.
    pub id: VolumeId,
    /// Where it is mounted, for people.
    pub target: String,
    /// Its parts.
    pub parts: Vec<(Part, OwnedFd)>,
    /// Whether an earlier one died over it: then generations are not read.
    pub suspect: bool,
}

impl Volume {
    /// Restores a volume and serves what can be read of it; must be called inside a tokio runtime. Asks the cache for its
    /// secrets, and waits for none.
    ///
    /// # Errors
    /// No memory or descriptor left for a table of opens.
    pub fn restore(
        legacy: Legacy,
        surroundings: Surroundings,
        keeper: Arc<dyn Keeper>,
        cache: &Cache,
        now: Moment,
    ) -> std::io::Result<Arc<Self>> {
        let Legacy { id, target, parts, suspect } = legacy;
        let memory = &surroundings.memory;
        let (mut record, mut opens, mut generations) = (None, None, Vec::new());
        for (part, file) in parts {
            match part {
                Part::Record => record = Some(file),
                Part::Opens => opens = Some(file),
                Part::Generation(number) => generations.push((number, file)),
                Part::Other => {}
            }
        }
        let read = record.ok_or_else(|| "there is none".to_owned()).and_then(|file| {
            let pages = memory.adopt(file).map_err(|error| error.to_string())?;
            let record = Record::read(&pages).map_err(|error| error.to_string())?;
            Ok((pages, record))
        });
        let (pages, spec, pod, group, init, token) = match read {
            Ok((pages, record)) => {
                let Record { spec, pod, group, init, token, .. } = record;
                (Some(pages), spec, pod.unwrap_or_default(), group, init, Some(token))
            }
            Err(error) => {
                tracing::error!(volume = %id.0, error, "its record cannot be read: EIO until it is published again");
                (None, nothing(), Pod::default(), None, super::record::Init::default(), None)
            }
        };
        let credential = token.map(|token| Arc::new(Credential::Jwt(token)));
        let adopted = opens.map(|file| Opens::adopt(file, spec.files.len()));
        let counted = matches!(adopted, Some(Ok(_)));
        let opens = match adopted {
            Some(Ok(opens)) => opens,
            _ => Opens::lent(spec.files.len())?,
        };
        // The newest first: should there be room for some only, it is for these.
        generations.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        let (mut snapshots, mut lost) = (Vec::new(), Vec::new());
        for (number, file) in generations {
            if suspect || spec.files.is_empty() {
                lost.push(number);
                continue;
            }
            let read = memory.adopt(file).map_err(|error| error.to_string()).and_then(|pages| {
                let snapshot = Snapshot::open(pages).map_err(|error| error.to_string())?;
                let paths = snapshot.files().iter().map(|file| file.path.as_str());
                let is_ours = snapshot.generation() == number
                    && paths.eq(spec.files.iter().map(|file| file.path.as_str()));
                if is_ours { Ok(snapshot) } else { Err("of another volume".to_owned()) }
            });
            match read {
                Ok(snapshot) => snapshots.push(snapshot),
                // Given up by a predecessor that did not live to tell, and wiped.
                Err(error) if !snapshots.is_empty() => {
                    tracing::debug!(volume = %id.0, generation = number, error, "an old generation is gone");
                    lost.push(number);
                }
                Err(error) => {
                    tracing::warn!(volume = %id.0, generation = number, error, "the newest generation is lost");
                    lost.push(number);
                }
            }
        }
        let lending = Lending { keeper, target, group, init };
        let lent = Lent::new(lending, pages, credential.clone());
        let volume = Self::assemble(id, spec, Some(pod), surroundings, opens, Some(lent));
        volume.generations.restore(snapshots, &lost, counted, now);
        let _ = volume.inherited.set(volume.inheritance());
        if let Some(credential) = credential {
            tokio::spawn(register(Arc::downgrade(&volume), cache.clone(), credential));
        }
        Ok(volume)
    }

    /// Whether it could not be read what this volume asks for. It has no files until it is published again.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.spec.files.is_empty()
    }

    /// Per file that has a value, when it was refreshed last: as noted, else when its generation was made, which was before.
    fn inheritance(&self) -> Vec<Option<SystemTime>> {
        let current = self.generations.current();
        let refreshed = |file| {
            let current = current.as_ref().filter(|current| current.snapshot.value(file).is_some())?;
            Some(self.generations.opens().refreshed(file).unwrap_or_else(|| current.snapshot.created()))
        };
        (0..self.spec.files.len()).map(refreshed).collect()
    }

    /// How the inherited value of a file stands.
    pub(super) fn inherited_standing(&self, file: usize, now: Moment) -> Standing {
        let noted = self.inherited.get().and_then(|noted| noted.get(file).copied().flatten());
        let Some(refreshed) = noted else { return Standing::Gone };
        let Freshness { max_age, stale_grace, .. } = self.spec.freshness;
        let current = self.generations.current();
        let record = current.as_ref().and_then(|current| current.snapshot.files().get(file));
        let leased_until =
            record.filter(|record| record.lease_id.is_some()).and_then(|record| record.expires);
        let since = |time| now.wall.duration_since(time).unwrap_or_default();
        // A leased value may be as old as its lease.
        let late = leased_until.map_or_else(|| since(refreshed).saturating_sub(max_age), since);
        if stale_grace.is_some_and(|grace| late > grace) {
            Standing::Gone
        } else if late.is_zero() {
            Standing::Fresh
        } else {
            Standing::LastKnown
        }
    }
}

/// Gives a restored volume its keys, as soon as the cache takes them.
async fn register(volume: Weak<Volume>, cache: Cache, credential: Arc<Credential>) {
    while let Some(restored) = volume.upgrade() {
        match restored.register(&cache, Arc::clone(&credential)).await {
            Ok(registration) => {
                restored.hold(registration);
                if let Some(newer) = restored.newer_than(&credential) {
                    restored.set_credential(newer).await;
                }
                // An answer that came before the keys were held was told to nobody.
                let _ = restored.rebuild(Moment::now()).await;
                return;
            }
            Err(error) => tracing::warn!(volume = %restored.id.0, %error, "not refreshed; tried again"),
        }
        drop(restored);
        tokio::time::sleep(RETRY).await;
    }
}

/// In place of what cannot be read.
fn nothing() -> VolumeSpec {
    let auth = Auth { method: AuthMethod::Token, mount: String::new(), role: String::new(), audience: None };
    let subject = Subject::Local("nobody".to_owned());
    VolumeSpec {
        class: String::new(),
        identity: Arc::new(Identity { connection: Connection::to(Vec::new()), auth, subject }),
        files: Vec::new(),
        freshness: Freshness::default(),
        ownership: Ownership::default(),
    }
}

#[cfg(test)]
mod tests;
