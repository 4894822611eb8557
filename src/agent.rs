//! The composition root: the parts of the read path wired together in the order of the way, once per process, and the
//! volumes that are served.
//!
//! ```text
//!   Agent::start:  memory ─▶ arena, bounce pool ─▶ store ─▶ cache ─▶ invalidator ─▶ admin socket
//!   Agent::mount:  spec ─▶ volume published (all files, or refused) ─▶ mounted ─▶ INIT answered ─▶ served
//!   Agent::lend:   the same on a mount that somebody else made; Agent::adopt: on one that another agent served (`lent`)
//!   shutdown:      unmounted, or drained ─▶ sessions ended ─▶ volumes dropped ─▶ cache drained (tokens revoked), each with a deadline
//! ```

/// The socket that the debug commands ask.
pub mod admin;
/// Volumes whose mount is somebody else's.
pub mod lent;
/// Where agents of one user meet: directories for sockets and mounts.
pub mod runtime;
/// What the debug commands show of a volume.
pub mod status;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use tokio::sync::watch;

use crate::cache::{Cache, Limits};
use crate::fs::Fs;
use crate::fuse::handshake;
use crate::fuse::mount::{Mount, MountError, Options};
use crate::fuse::notify::Invalidator;
use crate::fuse::session::{End, Parts, Session};
use crate::metrics::Metrics;
use crate::reference::{VolumeId, VolumeSpec};
use crate::secret::arena::Arena;
use crate::secret::bounce::Pool;
use crate::secret::pages::{MemoryError, SecretMemory};
use crate::store::{Credential, Store};
use crate::sys::alloc;
use crate::volume::{Keeper, Pod, PublishError, Surroundings, Trust, Volume};

/// Size of a bounce buffer where locked memory allows: the largest reply. 128 KiB stays in a core's second-level cache,
/// so that the extra copy of each reply costs little (docs/architecture.md).
const BOUNCE: usize = 128 << 10;
/// How long readers may go on after an unmount before the process ends anyway.
const DRAIN: Duration = Duration::from_millis(500);
/// How long after a volume came or went the heap gives back what it left: when idle connections and threads have gone too.
/// Whatever follows within this time is one go.
const TIDY: Duration = Duration::from_secs(12);

/// How an agent is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Bounds of the cache.
    pub limits: Limits,
    /// Secret memory in bytes; `None`: what the node gives.
    pub memory: Option<usize>,
    /// Threads per volume that read requests. Default 1.
    pub threads: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self { limits: Limits::default(), memory: None, threads: 1 }
    }
}

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No secret memory or bounce buffer.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

/// Why a volume could not be mounted. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its secrets cannot be had.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The directory cannot be mounted on.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel and this program do not agree, or no thread or descriptor is left.
    #[error("cannot serve the mount: {0}")]
    Serve(#[source] io::Error),
    /// A mount of that name is served.
    #[error("{0} is served by this agent already")]
    Twice(String),
}

/// The parts that all volumes of a process share.
pub struct Agent {
    setup: Setup,
    memory: Arc<SecretMemory>,
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
    cache: Cache,
    invalidator: Invalidator,
    keeper: Option<Arc<dyn Keeper>>,
    served: DashMap<VolumeId, Arc<Served>>,
    /// Whether a lent volume is not served any more that should be.
    failed: AtomicBool,
    /// Told of each volume that came or went.
    moved: watch::Sender<()>,
}

/// A volume that is mounted and answered.
pub struct Served {
    fs: Arc<Fs>,
    seat: Seat,
    session: Session,
}

/// Whose a mount is.
enum Seat {
    /// This agent's.
    Own(Mount),
    /// The one's who keeps the volume's parts.
    Lent,
}

impl Served {
    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        self.fs.volume()
    }

    /// The file system on it, for those who want to hear what it announces.
    #[must_use]
    pub fn fs(&self) -> &Arc<Fs> {
        &self.fs
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        match (&self.seat, self.volume().lending()) {
            (Seat::Own(mount), _) => mount.path(),
            (Seat::Lent, lending) => lending.map_or(Path::new(""), |lending| Path::new(&lending.target)),
        }
    }

    /// Takes an own mount away from its directory; a lent one is not ours to take.
    ///
    /// # Errors
    /// As [`Mount::detach`].
    pub fn detach(&self) -> io::Result<()> {
        match &self.seat {
            Seat::Own(mount) => mount.detach(),
            Seat::Lent => Ok(()),
        }
    }

    /// Returns when it is unmounted, whoever did it, and its last file is closed; or when it cannot be served any more, after
    /// its dead mount was taken away; or when it begins to be drained.
    pub async fn ended(&self) -> End {
        let end = self.session.ended().await;
        if end == End::Failed
            && let Err(error) = self.detach()
        {
            tracing::error!(path = %self.path().display(), %error, "a dead mount stays");
        }
        end
    }
}

impl Agent {
    /// Wires the parts. `store` is made with the same metrics.
    ///
    /// # Errors
    /// [`StartError`]
    pub fn start<S: Store>(
        store: Arc<S>,
        metrics: Arc<Metrics>,
        setup: Setup,
    ) -> Result<Arc<Self>, StartError> {
        Self::assemble(store, metrics, setup, None)
    }

    fn assemble<S: Store>(
        store: Arc<S>,
        metrics: Arc<Metrics>,
        setup: Setup,
        keeper: Option<Arc<dyn Keeper>>,
    ) -> Result<Arc<Self>, StartError> {
        let memory = match setup.memory {
            Some(bytes) => SecretMemory::with_limit(bytes)?,
            None => SecretMemory::new()?,
        };
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let pool = Pool::new(&memory, BOUNCE, threads.clamp(2, 8))?;
        let arena = Arena::new(Arc::clone(&memory));
        let cache = Cache::new(store, arena, setup.limits, Arc::clone(&metrics));
        let invalidator = Invalidator::start().map_err(StartError::Thread)?;
        let (moved, moves) = watch::channel(());
        tokio::spawn(tidy(moves));
        let (served, failed) = (DashMap::new(), AtomicBool::new(false));
        Ok(Arc::new(Self { setup, memory, pool, metrics, cache, invalidator, keeper, served, failed, moved }))
    }

    /// Fetches every file of a spec, then mounts them on a directory, and serves: [`Agent::publish`], then [`Agent::serve`].
    ///
    /// # Errors
    /// [`ServeError`]; nothing stays mounted or held.
    pub async fn mount(
        self: &Arc<Self>,
        path: &Path,
        spec: VolumeSpec,
        pod: Option<Pod>,
        credential: Arc<Credential>,
        allow_other: bool,
        deadline: Instant,
    ) -> Result<Arc<Served>, ServeError> {
        let volume = self.publish(path, spec, pod, credential, deadline).await?;
        self.serve(path, volume, allow_other).await
    }

    /// Fetches every file of a spec. May be dropped while it waits: nothing is mounted yet.
    ///
    /// # Errors
    /// [`ServeError::Publish`], [`ServeError::Twice`]; nothing is held.
    pub async fn publish(
        &self,
        path: &Path,
        spec: VolumeSpec,
        pod: Option<Pod>,
        credential: Arc<Credential>,
        deadline: Instant,
    ) -> Result<Arc<Volume>, ServeError> {
        let id = VolumeId(path.display().to_string());
        if self.served.contains_key(&id) {
            return Err(ServeError::Twice(id.0));
        }
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let volume = Volume::new(id, spec, pod, self.surroundings(owner));
        // Whoever mounts here gave the credential for this very mount.
        volume.publish(&self.cache, credential, Trust::Proven, deadline).await?;
        Ok(volume)
    }

    /// Mounts and serves a volume that has content, until it is unmounted by whomever. Must not be dropped while it waits: the
    /// mount might stay.
    ///
    /// # Errors
    /// [`ServeError::Mount`], [`ServeError::Serve`]; nothing stays mounted.
    pub async fn serve(
        self: &Arc<Self>,
        path: &Path,
        volume: Arc<Volume>,
        allow_other: bool,
    ) -> Result<Arc<Served>, ServeError> {
        let fs = Fs::new(volume);
        let options = Options { allow_other, max_read: self.pool.buffer_size() };
        let directory = path.to_owned();
        // The helper is a child to wait for, and INIT a blocking read.
        let attached = tokio::task::spawn_blocking(move || {
            let (mount, fuse) = Mount::attach(&directory, options)?;
            let negotiated = handshake::negotiate(std::os::fd::AsFd::as_fd(&fuse));
            Ok::<_, MountError>((mount, fuse, negotiated))
        });
        let (mount, fuse, negotiated) = attached.await.map_err(|_| ServeError::Serve(ended()))??;
        let started = match negotiated {
            Ok(negotiated) => {
                tracing::debug!(minor = negotiated.minor, flags = negotiated.flags, "FUSE negotiated");
                self.session(fuse, &fs, false).await
            }
            Err(error) => Err(error),
        };
        match started {
            Ok(session) => {
                let served = Arc::new(Served { fs, seat: Seat::Own(mount), session });
                self.keep(&served);
                Ok(served)
            }
            Err(error) => {
                if let Err(error) = mount.detach() {
                    tracing::warn!(%error, path = %path.display(), "a mount that cannot be served stays");
                }
                Err(ServeError::Serve(error))
            }
        }
    }

    /// Starts a session; its threads are waited for on a thread that may wait.
    async fn session(self: &Arc<Self>, fuse: OwnedFd, fs: &Arc<Fs>, resend: bool) -> io::Result<Session> {
        let (agent, fs) = (Arc::clone(self), Arc::clone(fs));
        let start = move || agent.session_now(fuse, &fs, resend);
        tokio::task::spawn_blocking(start).await.map_err(|_| ended())?
    }

    fn session_now(&self, fuse: OwnedFd, fs: &Arc<Fs>, resend: bool) -> io::Result<Session> {
        let Self { pool, invalidator, setup: Setup { threads, .. }, .. } = self;
        Session::start(fuse, fs, &Parts { pool, invalidator, threads: *threads }, resend)
    }

    fn surroundings(&self, default_owner: (u32, u32)) -> Surroundings {
        Surroundings { memory: Arc::clone(&self.memory), metrics: Arc::clone(&self.metrics), default_owner }
    }

    /// Holds what is served until it has ended.
    fn keep(self: &Arc<Self>, served: &Arc<Served>) {
        let spec = served.volume().spec();
        let (path, files, interval) = (served.path(), spec.files.len(), spec.freshness.interval);
        tracing::info!(path = %path.display(), class = spec.class, files, ?interval, "mounted");
        self.served.insert(served.volume().id().clone(), Arc::clone(served));
        self.moved.send_replace(());
        let (agent, watched) = (Arc::downgrade(self), Arc::clone(served));
        tokio::spawn(async move {
            let end = watched.ended().await;
            let Some(agent) = agent.upgrade() else { return };
            match (end, &watched.seat) {
                // It is let go of by who drains it, when its last reply is out.
                (End::Drained, _) => return,
                (End::Unmounted, Seat::Lent) => watched.volume().give_up().await,
                // Its readers wait, and only another process can answer them.
                (End::Failed, Seat::Lent) => agent.failed.store(true, Ordering::Release),
                (End::Unmounted | End::Failed, Seat::Own(_)) => {}
            }
            if agent.let_go(&watched) {
                tracing::info!(path = %watched.path().display(), "unmounted");
            }
        });
    }

    /// Whether it was held. Another one of the same name is not touched.
    fn let_go(&self, served: &Arc<Served>) -> bool {
        let is_it = |_: &VolumeId, held: &Arc<Served>| Arc::ptr_eq(held, served);
        let held = self.served.remove_if(served.volume().id(), is_it).is_some();
        self.moved.send_replace(());
        held
    }

    /// What is served, sorted by mount point.
    #[must_use]
    pub fn served(&self) -> Vec<Arc<Served>> {
        let mut served: Vec<_> = self.served.iter().map(|entry| Arc::clone(entry.value())).collect();
        served.sort_by(|a, b| a.path().cmp(b.path()));
        served
    }

    /// The counters.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Secret memory of the process.
    #[must_use]
    pub fn memory(&self) -> &Arc<SecretMemory> {
        &self.memory
    }

    /// Unmounts everything that is mounted here, waits a moment for readers of them all, drains what is lent, drops the volumes
    /// and drains the cache. Blocks its thread for a few system calls per mount: at the end of a process that runs out of threads,
    /// this must still work.
    pub async fn shutdown(self: &Arc<Self>) {
        let (lent, own): (Vec<_>, Vec<_>) =
            self.served().into_iter().partition(|served| matches!(served.seat, Seat::Lent));
        for served in &own {
            self.served.remove(served.volume().id());
            let path = served.path().display();
            match served.detach() {
                Ok(()) => tracing::info!(%path, "unmounted"),
                Err(error) => tracing::error!(%path, %error, "cannot unmount"),
            }
        }
        self.drain_all(lent).await;
        let end = Instant::now() + DRAIN;
        for served in own {
            if tokio::time::timeout_at(end.into(), served.ended()).await.is_err() {
                let path = served.path().display();
                tracing::warn!(%path, "files are still open; their readers get ENOTCONN");
            }
        }
        self.cache.stop(Instant::now() + DRAIN).await;
    }
}

/// Gives back the heap's free pages a while after volumes came or went, until the agent is gone.
async fn tidy(mut moves: watch::Receiver<()>) {
    while moves.changed().await.is_ok() {
        tokio::time::sleep(TIDY).await;
        moves.mark_unchanged();
        // An error means that the runtime ends.
        let _ = tokio::task::spawn_blocking(alloc::trim).await;
    }
}

/// In place of a task's own error, whose text would carry a panic's message.
fn ended() -> io::Error {
    io::Error::other("a thread of this program ended by a fault")
}
