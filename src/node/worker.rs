//! The agent's second process: attached to the shim, it serves what it is given.
//!
//! ```text
//!   Away ──Hello──▶ Returning ──everything that is served was offered (Adopt)──▶ Attached
//!    ▲                                                                              │
//!    └──────────────────────── the connection ended ◀───────────────────────────────┘
//! ```
//! Volumes are served in each of these states. It leaves only Attached: who lets go of a volume must know that the shim holds it.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::{Asked, Link};
use fuse_secrets_csi::wire::message::{
    Adopt, Deposit, Done, Drain, Event, Handover, Part, Publish, Role, Stats, Unpublish, Unsupported,
};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::publish::{Resolved, kind, pick, resolve};
use super::refusal::{Code, Refusal};
use super::{PATIENCE, attach_at_last, undone};
use crate::agent::ServeError;
use crate::agent::lent::{Estate, Keeper, Order};
use crate::class::Classes;
use crate::config::AgentConfig;
use crate::kubernetes::Cluster;
use crate::kubernetes::events::Reason;
use crate::kubernetes::issuer::{Forged, Verdict};
use crate::kubernetes::token::Claims;
use crate::metrics::Metrics;
use crate::reference::VolumeId;
use crate::secret::Token;
use crate::volume::{Pod, Trust};

/// How long a worker that leaves waits for a shim that is away.
const FAREWELL: Duration = Duration::from_secs(20);
/// Volumes that are offered to a restarted shim at a time.
const OFFERS: usize = 16;
/// How often a worker that does not feel well looks again; the shim's patience is 5 s.
const UNWELL: Duration = Duration::from_millis(100);
/// How long a volume waits for classes that are not known yet, as after the agent's start; kubelet asks again.
const UNKNOWN: Duration = Duration::from_secs(10);

/// What the protocol asks of the agent. The agent itself, and scripts in tests.
pub trait Volumes: Send + Sync + 'static {
    /// Fetches every file and serves, from a descriptor of which the shim keeps a duplicate.
    fn lend(&self, order: Order, deadline: Instant) -> impl Future<Output = Result<(), ServeError>> + Send;
    /// Serves on what an earlier agent served.
    fn adopt(&self, estate: Estate) -> impl Future<Output = Result<(), ServeError>> + Send;
    /// Finishes what was read of a volume and lets go of it; the shim has everything.
    fn drain(&self, id: &VolumeId) -> impl Future<Output = io::Result<()>> + Send;
    /// Wipes a volume that is gone. One that is not served is gone.
    fn end(&self, id: &VolumeId) -> impl Future<Output = ()> + Send;
    /// Gives a volume a newer token. Asks nobody. Whether it is served.
    fn renew(&self, id: &VolumeId, token: Token) -> impl Future<Output = bool> + Send;
    /// What is served, with everything that the shim keeps of it.
    fn estates(&self) -> Vec<Estate>;
    /// The names of what is served.
    fn served(&self) -> Vec<VolumeId>;
    /// The descriptor of a volume that was adopted without anything that tells what it is: it is lent anew.
    fn blank(&self, id: &VolumeId) -> Option<OwnedFd>;
    /// Whose a volume is; `None`: no such volume is served.
    fn holder(&self, id: &VolumeId) -> Option<Holder>;
    /// Bytes of all values, and number of files; `None`: no such volume is served.
    fn size(&self, id: &VolumeId) -> Option<(u64, u64)>;
    /// Whether the threads and tasks that matter move.
    fn alive(&self) -> impl Future<Output = bool> + Send;
}

/// Whose a served volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The audience whose token it takes; `None`: the only one that comes.
    pub audience: Option<String>,
    /// The pod.
    pub pod: Pod,
    /// The uid of its service account.
    pub account_uid: String,
}

/// Where the connection stands.
#[derive(Clone)]
enum State {
    Away,
    Returning(Link),
    Attached(Link),
}

impl State {
    fn link(&self) -> Option<&Link> {
        match self {
            Self::Away => None,
            Self::Returning(link) | Self::Attached(link) => Some(link),
        }
    }
}

/// The connection to the shim, as far as there is one: what the agent deposits through.
pub struct Attachment {
    state: watch::Sender<State>,
    metrics: Arc<Metrics>,
}

impl Attachment {
    /// Without a connection.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { state: watch::Sender::new(State::Away), metrics })
    }

    /// Whether the shim is there.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.state.borrow().link().is_some()
    }

    fn set(&self, state: State) {
        self.metrics.node_attached.set(u64::from(state.link().is_some()));
        self.state.send_replace(state);
    }

    async fn keep(&self, message: Message, file: OwnedFd) -> io::Result<()> {
        let link = self.state.borrow().link().cloned();
        let Some(link) = link else { return Err(io::ErrorKind::NotConnected.into()) };
        let answer = link.ask(&message, vec![file], Instant::now() + PATIENCE).await;
        undone(answer).map_err(io::Error::other)
    }
}

impl Keeper for Attachment {
    fn deposit(
        &self,
        volume: &VolumeId,
        part: Part,
        file: OwnedFd,
        gone: Vec<u32>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + '_>> {
        let message = Message::Deposit(Deposit { volume: volume.0.clone(), part, gone });
        Box::pin(async move {
            let kept = self.keep(message, file).await;
            if kept.is_err() {
                self.metrics.node_deposits_failed.increment();
            }
            kept
        })
    }
}

/// The process that serves.
pub struct Worker<V> {
    volumes: V,
    classes: Arc<dyn Classes>,
    cluster: Option<Cluster>,
    config: AgentConfig,
    attachment: Arc<Attachment>,
    /// No new volume is taken any more.
    leaving: AtomicBool,
}

impl<V: Volumes> Worker<V> {
    /// Serves with these parts; without a cluster each new volume's token proves itself by a login. `attachment` is also what the
    /// volumes deposit through.
    pub fn new(
        volumes: V,
        classes: Arc<dyn Classes>,
        cluster: Option<Cluster>,
        config: AgentConfig,
        attachment: Arc<Attachment>,
    ) -> Arc<Self> {
        Arc::new(Self { volumes, classes, cluster, config, attachment, leaving: AtomicBool::new(false) })
    }

    /// Attaches and answers, again and again, until it is dropped.
    pub async fn run(self: Arc<Self>) {
        loop {
            let (link, mut questions, hello) = attach_at_last(&self.config.node_socket, Role::Worker).await;
            tracing::info!(agent = hello.agent, handover = ?hello.handover, shim = hello.program, "attached");
            self.attachment.set(State::Returning(link.clone()));
            let resend = hello.handover == Handover::Resend;
            // Before any question is heard: what this shim gives is not to be given back to it.
            let estates = self.volumes.estates();
            let answering = async {
                let mut tasks = JoinSet::new();
                while let Some(asked) = questions.recv().await {
                    let worker = Arc::clone(&self);
                    tasks.spawn(async move { worker.answer(asked, resend).await });
                    while tasks.try_join_next().is_some() {}
                }
                // What was begun is finished, though nobody hears of it: half a volume is of no use.
                tasks.detach_all();
            };
            let offering = async {
                Self::offer(&link, estates).await;
                self.attachment.set(State::Attached(link.clone()));
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = answering => {}
                () = offering => {}
            }
            self.attachment.set(State::Away);
            tracing::warn!("the shim is gone; its volumes are served on");
        }
    }

    /// Finishes what was read, leaves everything to the shim and ends the connection. Waits for a shim that is away: without it,
    /// the mounts would die with us.
    pub async fn leave(self: &Arc<Self>) {
        self.leaving.store(true, Ordering::Relaxed);
        let mut state = self.attachment.state.subscribe();
        let attached = state.wait_for(|state| matches!(state, State::Attached(_)));
        let link = match tokio::time::timeout(FAREWELL, attached).await {
            Ok(Ok(state)) => state.link().cloned(),
            _ if self.volumes.served().is_empty() => None,
            _ => {
                tracing::error!("leaves though the shim is away: its mounts die with this process");
                None
            }
        };
        let mut drains = JoinSet::new();
        for id in self.volumes.served() {
            let worker = Arc::clone(self);
            drains.spawn(async move {
                if let Err(error) = worker.volumes.drain(&id).await {
                    tracing::warn!(volume = id.0, %error, "not drained");
                }
            });
        }
        drains.join_all().await;
        if let Some(link) = link {
            link.close();
            link.closed().await;
        }
    }

    /// Gives a shim that restarted what it had.
    async fn offer(link: &Link, estates: Vec<Estate>) {
        let mut offers = JoinSet::new();
        for estate in estates {
            if offers.len() >= OFFERS {
                offers.join_next().await;
            }
            let link = link.clone();
            offers.spawn(async move { Self::offer_one(&link, estate).await });
        }
        offers.join_all().await;
    }

    async fn offer_one(link: &Link, estate: Estate) {
        let id = estate.id;
        let (parts, files): (Vec<_>, Vec<_>) = estate.parts.into_iter().unzip();
        let descriptors = std::iter::once(estate.fuse).chain(files).collect();
        let adopt =
            Adopt { volume: id.0.clone(), target: estate.target, pod: estate.pod, parts, attempts: 0 };
        // One that it does not keep is served on: without its mount it ends by itself.
        if let Err(why) =
            undone(link.ask(&Message::Adopt(adopt), descriptors, Instant::now() + PATIENCE).await)
        {
            tracing::warn!(volume = id.0, why, "the shim does not keep it");
        }
    }

    async fn answer(&self, asked: Asked, resend: bool) {
        let Asked { message, descriptors, reply } = asked;
        let done = |result: Result<Vec<String>, Refusal>| match result {
            Ok(warnings) => Message::Done(Done { warnings }),
            Err(refusal) => refusal.into(),
        };
        reply.answer(match message {
            Message::Publish(publish) => done(self.publish(publish, descriptors).await),
            Message::Unpublish(Unpublish { volume }) => {
                self.volumes.end(&VolumeId(volume)).await;
                done(Ok(Vec::new()))
            }
            Message::Adopt(adopt) => done(self.adopt(adopt, descriptors, resend).await),
            Message::Drain(Drain { volume }) => done(self.drain(VolumeId(volume)).await),
            Message::Stats(stats) => self.stats(stats).await,
            Message::Event(event) => done(self.event(event)),
            other => Message::Unsupported(Unsupported { kind: other.kind() }),
        });
    }

    async fn publish(&self, publish: Publish, descriptors: Vec<OwnedFd>) -> Result<Vec<String>, Refusal> {
        let id = VolumeId(publish.volume.clone());
        let given = descriptors.into_iter().next().or_else(|| self.volumes.blank(&id));
        let Some(fuse) = given else { return self.renew(&id, publish).await };
        let (target, group) = (publish.target.clone(), publish.group);
        let metrics = &self.attachment.metrics;
        metrics.node_publishes.increment();
        let result = self.lend(publish, move |Resolved { spec, pod, token, warnings }, trust| {
            (Order { id, target, spec, pod, group, token, trust, fuse }, warnings)
        });
        let result = result.await;
        if let Err(refusal) = &result {
            refusal.metric(metrics).increment();
        }
        result
    }

    async fn lend(
        &self,
        publish: Publish,
        order: impl FnOnce(Resolved, Trust) -> (Order, Vec<String>) + Send,
    ) -> Result<Vec<String>, Refusal> {
        let deadline = Instant::now() + self.config.publish_deadline;
        if self.leaving.load(Ordering::Relaxed) {
            return Err(Refusal::new(Code::Unavailable, "this agent is leaving; ask the next one"));
        }
        let (volume, pod) = (publish.volume.clone(), publish.pod.get("csi.storage.k8s.io/pod.name").cloned());
        if let Some(kind) = kind(&publish.attributes) {
            let patience = UNKNOWN.min(self.config.publish_deadline);
            // Whether they are known by then is told by who looks for one.
            let _ = tokio::time::timeout(patience, self.classes.known(kind)).await;
        }
        let (classes, config) = (Arc::clone(&self.classes), self.config.clone());
        let resolving = tokio::task::spawn_blocking(move || resolve(publish, classes.as_ref(), &config));
        let resolved = match resolving.await {
            Ok(resolved) => resolved,
            Err(_) => Err(Refusal::new(Code::Internal, "a fault of this program; its log tells where")),
        };
        let trusted = match resolved {
            Ok(resolved) => {
                let audience = resolved.spec.identity.auth.audience.as_deref().unwrap_or_default();
                self.trust(&resolved.token, audience).await.map(|trust| (resolved, trust))
            }
            Err(refusal) => Err(refusal),
        };
        let lent = match trusted {
            Ok((resolved, trust)) => {
                let owner = resolved.pod.clone();
                let (order, warnings) = order(resolved, trust);
                let lent = self.volumes.lend(order, deadline).await.map_err(Refusal::from);
                lent.map(|()| {
                    let metrics = &self.attachment.metrics;
                    match trust {
                        Trust::Proven => metrics.tokens_signed.increment(),
                        Trust::Login => metrics.tokens_login.increment(),
                    }
                    self.warn(&volume, &owner, &warnings);
                    warnings
                })
            }
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &lent {
            tracing::warn!(volume, pod, code = ?refusal.code, "refused: {refusal}");
        }
        lent
    }

    /// Whether a token is known to be its pod's. With no keys at hand nobody can tell; then it must log in by itself.
    async fn trust(&self, token: &Token, audience: &str) -> Result<Trust, Refusal> {
        let Some(cluster) = &self.cluster else { return Ok(Trust::Login) };
        match cluster.issuer.verify(token, audience).await {
            Ok(Verdict::Signed) => Ok(Trust::Proven),
            Ok(Verdict::Unknown) => Ok(Trust::Login),
            Err(forged) => {
                self.attachment.metrics.tokens_refused_publish.increment();
                let code = match forged {
                    Forged::Expired | Forged::Early => Code::FailedPrecondition,
                    _ => Code::PermissionDenied,
                };
                Err(Refusal::new(code, format!("the token for audience {audience:?} {forged}")))
            }
        }
    }

    /// Tells a pod's owner what works otherwise than they may think.
    fn warn(&self, volume: &str, pod: &Pod, warnings: &[String]) {
        if let (Some(cluster), false) = (&self.cluster, warnings.is_empty()) {
            cluster.events.tell(volume, pod, Reason::VolumeWarning, &warnings.join("\n"));
        }
    }

    /// The shim has something to tell a pod's owner. Without an API server the log has it.
    fn event(&self, event: Event) -> Result<Vec<String>, Refusal> {
        let Event { volume, text, .. } = event;
        let unknown = || Refusal::new(Code::NotFound, "this agent does not serve the volume");
        let holder = self.volumes.holder(&VolumeId(volume.clone())).ok_or_else(unknown)?;
        if let Some(cluster) = &self.cluster {
            cluster.events.tell(&volume, &holder.pod, Reason::DeadMount, &text);
        }
        Ok(Vec::new())
    }

    /// A volume that is served gets its newer token. No store is asked, and no error is answered: kubelet may take a mount away
    /// whose republish failed. A token that is not its pod's is left, and the volume keeps the one that it has.
    async fn renew(&self, id: &VolumeId, publish: Publish) -> Result<Vec<String>, Refusal> {
        let unknown = || Refusal::new(Code::NotFound, "this agent does not serve the volume");
        let holder = self.volumes.holder(id).ok_or_else(unknown)?;
        match self.newer(&holder, publish).await {
            Ok(token) => {
                if self.volumes.renew(id, token).await {
                    Ok(Vec::new())
                } else {
                    Err(unknown())
                }
            }
            Err(why) => {
                self.attachment.metrics.tokens_refused_renewal.increment();
                let pod = holder.pod.name;
                tracing::warn!(
                    volume = id.0,
                    pod,
                    "a newer token is not taken, the volume keeps its own: {why}"
                );
                Ok(Vec::new())
            }
        }
    }

    /// The newer token of a served volume, as far as it is its pod's.
    async fn newer(&self, holder: &Holder, mut publish: Publish) -> Result<Token, String> {
        let picked = pick(&mut publish.tokens, holder.audience.as_deref());
        let (audience, token) = picked.map_err(|refusal| refusal.text)?;
        let of = |why: &str| format!("the token for audience {audience:?} {why}");
        let claims = Claims::read(&token).map_err(of)?;
        if let Some(why) = claims.stranger_to(&holder.pod) {
            return Err(of(&why));
        }
        if claims.account_uid != holder.account_uid {
            return Err(of(
                "is that of a service account that was made anew since; the pod must be created anew",
            ));
        }
        if let Some(cluster) = &self.cluster {
            cluster.issuer.verify(&token, &audience).await.map_err(|forged| of(&forged.to_string()))?;
        }
        Ok(token)
    }

    async fn adopt(
        &self,
        adopt: Adopt,
        descriptors: Vec<OwnedFd>,
        resend: bool,
    ) -> Result<Vec<String>, Refusal> {
        let Adopt { volume, target, pod, parts, attempts } = adopt;
        if descriptors.len() != parts.len() + 1 {
            let text = format!("{} descriptors for a mount and {} parts", descriptors.len(), parts.len());
            return Err(Refusal::new(Code::InvalidArgument, text));
        }
        let mut descriptors = descriptors.into_iter();
        let Some(fuse) = descriptors.next() else {
            return Err(Refusal::new(Code::InvalidArgument, "a volume without a descriptor"));
        };
        let parts = parts.into_iter().zip(descriptors).collect();
        let suspect = attempts > 0;
        let estate = Estate { id: VolumeId(volume.clone()), target, pod, fuse, parts, suspect, resend };
        match self.volumes.adopt(estate).await {
            Ok(()) => {
                self.attachment.metrics.node_adoptions.increment();
                Ok(Vec::new())
            }
            Err(error) => {
                let refusal = Refusal::from(error);
                tracing::error!(volume, "not adopted: {refusal}");
                Err(refusal)
            }
        }
    }

    async fn drain(&self, id: VolumeId) -> Result<Vec<String>, Refusal> {
        let drained = self.volumes.drain(&id).await;
        drained
            .map_err(|error| Refusal::new(Code::Internal, format!("cannot let go of {}: {error}", id.0)))?;
        self.attachment.metrics.node_hand_overs.increment();
        Ok(Vec::new())
    }

    async fn stats(&self, mut stats: Stats) -> Message {
        if stats.volume.is_empty() {
            // No answer is what the shim takes for hung.
            while !self.volumes.alive().await {
                tokio::time::sleep(UNWELL).await;
            }
            stats.counters.insert("volumes".to_owned(), self.volumes.served().len() as u64);
            return Message::Stats(stats);
        }
        match self.volumes.size(&VolumeId(stats.volume.clone())) {
            Some((bytes, files)) => {
                stats.counters = [("bytes".to_owned(), bytes), ("files".to_owned(), files)].into();
                Message::Stats(stats)
            }
            None => Refusal::new(Code::NotFound, "this agent does not serve the volume").into(),
        }
    }
}

#[cfg(test)]
mod tests;
