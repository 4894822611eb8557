//! Volumes whose mount is somebody else's: the shim's, who keeps the descriptor and all that a successor needs. What is served here
//! can be served by another agent a moment later.
//!
//! ```text
//!   lend  (a new mount)         ─▶ INIT answered ─▶ all files fetched ─▶ deposited ─┐
//!   adopt (of a former agent)   ─▶ restored from what that one deposited ───────────┴▶ served ─┬─ drain ─▶ a successor's
//!                                                                                              └─ end ───▶ wiped
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::message::Part;
use tokio::task::JoinSet;

use super::{Agent, Seat, ServeError, Served, Setup, StartError, ended};
use crate::fs::Fs;
use crate::fuse::handshake;
use crate::metrics::Metrics;
use crate::reference::{VolumeId, VolumeSpec};
use crate::secret::Token;
use crate::store::{Credential, Store};
use crate::time::Moment;
use crate::volume::record::Init;
use crate::volume::restore::Legacy;
use crate::volume::{Lending, Pod, Trust, Volume};

pub use crate::volume::Keeper;

/// How long requests that were read may take to be answered: an open waits for 5 s at most.
const FINISH: Duration = Duration::from_secs(6);
/// The same where the mount has gone.
const FINISH_GONE: Duration = Duration::from_secs(1);
/// How often notes are brought up to date that a successor would read.
const SWEEP: Duration = Duration::from_secs(5);
/// A thread that is longer at one thing is taken for stuck.
const STUCK: Duration = Duration::from_secs(5);
/// The cache's task never waits for anything: one that does not answer in this time is stuck.
const ANSWER: Duration = Duration::from_secs(2);
/// Files belong to root, unless the class says otherwise; their group is the pod's.
const ROOT: (u32, u32) = (0, 0);

/// A new volume on a mount that was just made.
pub struct Order {
    /// Its name on this node.
    pub id: VolumeId,
    /// Where it will be mounted, for people.
    pub target: String,
    /// What it asks for.
    pub spec: VolumeSpec,
    /// Whose it is.
    pub pod: Pod,
    /// The pod's group: that of all files to which neither class nor file gives one.
    pub group: Option<u32>,
    /// The pod's token.
    pub token: Token,
    /// Whether that is known.
    pub trust: Trust,
    /// The mount's descriptor, with the kernel's INIT waiting in it; of a volume that is served, but blank, that one's.
    pub fuse: OwnedFd,
}

/// A volume with all that there is of it.
pub struct Estate {
    /// Its name on this node.
    pub id: VolumeId,
    /// Where it is mounted.
    pub target: String,
    /// `namespace/name` of its pod.
    pub pod: String,
    /// The mount's descriptor.
    pub fuse: OwnedFd,
    /// What was deposited.
    pub parts: Vec<(Part, OwnedFd)>,
    /// An agent died while it adopted this and no other: generations are not read.
    pub suspect: bool,
    /// Have the kernel send again what a former agent had read and not answered.
    pub resend: bool,
}

impl Served {
    /// The descriptor of its mount, once more.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn fuse(&self) -> io::Result<OwnedFd> {
        self.session.fuse().as_fd().try_clone_to_owned()
    }
}

impl Agent {
    /// As [`Agent::start`], for volumes whose parts somebody keeps.
    ///
    /// # Errors
    /// [`StartError`]
    pub fn start_lending<S: Store>(
        store: Arc<S>,
        metrics: Arc<Metrics>,
        setup: Setup,
        keeper: Arc<dyn Keeper>,
    ) -> Result<Arc<Self>, StartError> {
        let agent = Self::assemble(store, metrics, setup, Some(keeper))?;
        tokio::spawn(sweep(Arc::downgrade(&agent)));
        Ok(agent)
    }

    /// Bytes of the largest reply: a mount's `max_read` may be no more. Small where RLIMIT_MEMLOCK is.
    #[must_use]
    pub fn largest_reply(&self) -> usize {
        self.pool.buffer_size()
    }

    /// Answers INIT, fetches every file, deposits all that a successor needs, and serves. Takes the place of a blank volume
    /// of the same name. May be dropped while it waits: nothing is served yet.
    ///
    /// # Errors
    /// [`ServeError`]; nothing is held.
    pub async fn lend(self: &Arc<Self>, order: Order, deadline: Instant) -> Result<Arc<Served>, ServeError> {
        let keeper = self.keeper()?;
        let Order { id, target, mut spec, pod, group, token, trust, fuse } = order;
        let former = self.find(&id);
        if former.as_ref().is_some_and(|served| !served.volume().is_blank()) {
            return Err(ServeError::Twice(id.0));
        }
        spec.ownership.gid = spec.ownership.gid.or(group);
        let (fuse, init) = match &former {
            Some(_) => (fuse, Init::default()),
            // A blocking read.
            None => tokio::task::spawn_blocking(move || negotiate(fuse))
                .await
                .unwrap_or_else(|_| Err(ended()))
                .map_err(ServeError::Serve)?,
        };
        let lending = Lending { keeper, target, group, init };
        let volume =
            Volume::lent(id, spec, pod, self.surroundings(ROOT), lending).map_err(ServeError::Serve)?;
        if let Some(former) = &former {
            let highest = former.volume().generations().next_number() - 1;
            volume.generations().restore(Vec::new(), &[highest], true, Moment::now());
        }
        let credential = Arc::new(Credential::Jwt(token));
        volume.publish(&self.cache, Arc::clone(&credential), trust, deadline).await?;
        volume.deposit_all(&credential).await.map_err(ServeError::Serve)?;
        if let Some(former) = &former {
            self.drain(former.volume().id()).await.map_err(ServeError::Serve)?;
        }
        self.serve_lent(volume, fuse, former.is_some()).await
    }

    /// Serves a lent volume that has content, on a mount whose INIT was answered; `known`: and which its kernel knows from
    /// before.
    ///
    /// # Errors
    /// [`ServeError::Serve`]; nothing is held.
    pub async fn serve_lent(
        self: &Arc<Self>,
        volume: Arc<Volume>,
        fuse: OwnedFd,
        known: bool,
    ) -> Result<Arc<Served>, ServeError> {
        let fs = if known { Fs::restored(volume) } else { Fs::new(volume) };
        let session = self.session(fuse, &fs, false).await.map_err(ServeError::Serve)?;
        if known {
            fs.invalidate_all();
        }
        let served = Arc::new(Served { fs, seat: Seat::Lent, session });
        self.keep(&served);
        Ok(served)
    }

    /// Serves what a former agent served, from what that one deposited, without a word of the store. What cannot be read of it
    /// is fetched again, as soon as the store answers; meanwhile its readers get EIO (`volume::restore`).
    ///
    /// # Errors
    /// [`ServeError`]; nothing is held, and nothing is lost.
    pub async fn adopt(self: &Arc<Self>, estate: Estate) -> Result<Arc<Served>, ServeError> {
        let keeper = self.keeper()?;
        let Estate { id, target, pod: _, fuse, parts, suspect, resend } = estate;
        if self.find(&id).is_some() {
            return Err(ServeError::Twice(id.0));
        }
        let agent = Arc::clone(self);
        let adopt = move || {
            let legacy = Legacy { id, target, parts, suspect };
            let surroundings = agent.surroundings(ROOT);
            let volume = Volume::restore(legacy, surroundings, keeper, &agent.cache, Moment::now())?;
            let fs = Fs::restored(volume);
            let session = agent.session_now(fuse, &fs, resend)?;
            fs.invalidate_all();
            Ok(Arc::new(Served { fs, seat: Seat::Lent, session }))
        };
        let adopted = tokio::task::spawn_blocking(adopt).await.unwrap_or_else(|_| Err(ended()));
        let served = adopted.map_err(ServeError::Serve)?;
        self.keep(&served);
        Ok(served)
    }

    /// Reads no more requests of a volume, answers those that were read, and lets go of it, as it is, for a successor. One that
    /// is not served is drained already.
    ///
    /// # Errors
    /// `TimedOut`: a request is not answered within 6 s. It is let go of all the same.
    pub async fn drain(&self, id: &VolumeId) -> io::Result<()> {
        match self.find(id) {
            Some(served) => self.drain_one(&served).await,
            None => Ok(()),
        }
    }

    async fn drain_one(&self, served: &Arc<Served>) -> io::Result<()> {
        let drained = served.session.drain(Instant::now() + FINISH).await;
        served.volume().sweep(Moment::now()).await;
        served.volume().retire().await;
        self.let_go(served);
        drained
    }

    /// Drains all of these at the same time.
    pub(super) async fn drain_all(self: &Arc<Self>, lent: Vec<Arc<Served>>) {
        let mut draining = JoinSet::new();
        for served in lent {
            let agent = Arc::clone(self);
            draining.spawn(async move {
                if let Err(error) = agent.drain_one(&served).await {
                    tracing::warn!(volume = %served.volume().id().0, %error, "not drained");
                }
            });
        }
        draining.join_all().await;
    }

    /// A volume is gone: whatever it was, it is wiped, and what was leased for it is given back.
    pub async fn end(&self, id: &VolumeId) {
        let Some(served) = self.find(id) else { return };
        if let Err(error) = served.session.drain(Instant::now() + FINISH_GONE).await {
            tracing::debug!(volume = %id.0, %error, "readers of a volume that is gone get an error");
        }
        served.volume().give_up().await;
        self.let_go(&served);
    }

    /// Gives a served volume, and its successors, a newer token. `false`: there is no such volume, or it is blank, and to be lent
    /// again.
    pub async fn renew(&self, id: &VolumeId, token: Token) -> bool {
        let Some(served) = self.find(id).filter(|served| !served.volume().is_blank()) else { return false };
        if let Err(error) = served.volume().renew(token).await {
            tracing::warn!(volume = %id.0, %error, "a successor would have to log in with an older token");
        }
        true
    }

    /// One volume that is served.
    #[must_use]
    pub fn find(&self, id: &VolumeId) -> Option<Arc<Served>> {
        self.served.get(id).map(|entry| Arc::clone(entry.value()))
    }

    /// The names of all that are served, in no order.
    #[must_use]
    pub fn names(&self) -> Vec<VolumeId> {
        self.served.iter().map(|entry| entry.key().clone()).collect()
    }

    /// All lent volumes with all their parts, for a keeper that was started anew. One for which no descriptor is left is missing.
    #[must_use]
    pub fn estates(&self) -> Vec<Estate> {
        let lent = self.served().into_iter().filter(|served| matches!(served.seat, Seat::Lent));
        let estate = |served: Arc<Served>| {
            let volume = served.volume();
            let collect = || Ok::<_, io::Error>((served.fuse()?, volume.parts()?));
            let (fuse, parts) = collect()
                .inspect_err(
                    |error| tracing::error!(volume = %volume.id().0, %error, "cannot be deposited again"),
                )
                .ok()?;
            let pod = volume.pod().map(|pod| format!("{}/{}", pod.namespace, pod.name)).unwrap_or_default();
            let (id, target) = (volume.id().clone(), served.path().display().to_string());
            Some(Estate { id, target, pod, fuse, parts, suspect: false, resend: false })
        };
        lent.filter_map(estate).collect()
    }

    /// Whether all moves that readers depend on: the cache's task, the invalidator, every handler; and that none has
    /// ended that should not.
    pub async fn alive(&self) -> bool {
        // Asked every second: not for a sorted copy of all.
        let is_stuck = || self.served.iter().any(|served| served.session.busy_for() > STUCK);
        if self.failed.load(Ordering::Acquire) {
            tracing::error!("a volume cannot be served any more");
        } else if self.invalidator.busy_for() > STUCK {
            tracing::error!("the kernel has not taken an invalidation for 5 s");
        } else if is_stuck() {
            tracing::error!("a request has not been answered for 5 s");
        } else if !matches!(tokio::time::timeout(ANSWER, self.cache.answers()).await, Ok(true)) {
            tracing::error!("the cache does not answer");
        } else {
            return true;
        }
        false
    }

    fn keeper(&self) -> Result<Arc<dyn Keeper>, ServeError> {
        let nobody = || io::Error::new(io::ErrorKind::Unsupported, "nobody keeps what a successor needs");
        self.keeper.clone().ok_or_else(|| ServeError::Serve(nobody()))
    }
}

fn negotiate(fuse: OwnedFd) -> io::Result<(OwnedFd, Init)> {
    let handshake::Negotiated { minor, flags } = handshake::negotiate(fuse.as_fd())?;
    tracing::debug!(minor, flags, "FUSE negotiated");
    Ok((fuse, Init { minor, flags }))
}

/// Brings up to date what a successor would read, until the agent is gone.
async fn sweep(agent: Weak<Agent>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(agent) = agent.upgrade() else { return };
        let served: Vec<_> = agent.served.iter().map(|entry| Arc::clone(entry.value())).collect();
        drop(agent);
        for served in served {
            served.volume().sweep(Moment::now()).await;
        }
    }
}

#[cfg(test)]
mod tests;
