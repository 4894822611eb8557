//! Does what the machine says: descriptors, connections, mounts.
//!
//! One lock holds machine, descriptors and connections, so that what an event changes is never seen half; it is never held across
//! a wait. What the machine asks for runs as tasks, which report back as events; calls that may block run on threads for it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuse_secrets_csi::node::{self, Publish, Refusal, VolumeStats};
use fuse_secrets_csi::wire::link::{AskError, Link};
use fuse_secrets_csi::wire::message::{Done, Drain, Handover, Message, Refused, VolumeStatus, Volumes};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::watch;
use tokio::time::timeout_at;

use crate::gap::Gap;
use crate::keeper::{Action, Event, Machine, Name, State};
use crate::metrics::Metrics;
use crate::peer::Rule;
use crate::target::{Root, TargetError};
use crate::{mount, mountinfo};
use hold::Held;

/// Who speaks: connections, roles, heartbeats.
mod agents;
/// Publish, unpublish, statistics, abort.
mod volumes;
/// What is kept of one volume.
mod hold;
#[cfg(test)]
mod tests;

/// The gRPC codes that are used here.
pub(crate) mod code {
    #![allow(missing_docs, reason = "their names are gRPC's")]
    pub(crate) const INVALID_ARGUMENT: u32 = 3;
    pub(crate) const NOT_FOUND: u32 = 5;
    pub(crate) const PERMISSION_DENIED: u32 = 7;
    pub(crate) const RESOURCE_EXHAUSTED: u32 = 8;
    pub(crate) const FAILED_PRECONDITION: u32 = 9;
    pub(crate) const UNIMPLEMENTED: u32 = 12;
    pub(crate) const INTERNAL: u32 = 13;
    pub(crate) const UNAVAILABLE: u32 = 14;
}

/// An agent maps what it is given, and answers; it waits for no store.
const ADOPT: Duration = Duration::from_secs(10);
/// An agent gives requests that it has read 6 s.
const DRAIN: Duration = Duration::from_secs(8);
const TICK: Duration = Duration::from_secs(1);

/// How this node is set up.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Below it all targets lie.
    pub kubelet_root: PathBuf,
    /// Where agents connect.
    pub node_socket: PathBuf,
    /// Whose processes may.
    pub agents: Rule,
    /// The group that may reach the socket.
    pub agent_gid: u32,
    /// Bytes that an agent may lock at least.
    pub memlock: u64,
    /// How requests survive an agent.
    pub handover: Handover,
    /// How long readers wait for an agent before they get EIO.
    pub gap_deadline: Duration,
    /// How volumes are mounted.
    pub mount: mount::Options,
    /// Most volumes.
    pub max_volumes: usize,
}

/// The keeper at work. A clone is the same one.
#[derive(Clone)]
pub(crate) struct Keeper(Arc<Inner>);

struct Inner {
    settings: Settings,
    root: Root,
    metrics: Arc<Metrics>,
    gap: Mutex<Gap>,
    kept: Mutex<Kept>,
    changed: watch::Sender<()>,
    /// Who works on which volume, one after the other.
    turns: Mutex<HashMap<Name, Arc<tokio::sync::Mutex<()>>>>,
}

struct Kept {
    machine: Machine,
    volumes: BTreeMap<Name, Held>,
    /// Mounts of before that were dead when this shim started.
    dead: BTreeSet<Name>,
    agents: BTreeMap<u64, Agent>,
    supervisors: BTreeMap<u64, agents::Supervisor>,
    next: u64,
}

struct Agent {
    link: Link,
    pidfd: Arc<OwnedFd>,
}

impl Kept {
    fn link(&self, agent: u64) -> Option<Link> {
        self.agents.get(&agent).map(|agent| agent.link.clone())
    }

    /// A number that no agent or supervisor had.
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Whether a volume's mount has lost its connection: its next publish replaces it.
    fn is_dead(&self, volume: &str) -> bool {
        self.volumes.get(volume).map_or_else(|| self.dead.contains(volume), Held::is_dead)
    }

    /// Volumes with readers that wait.
    fn waiting(&self) -> BTreeSet<Name> {
        self.volumes.iter().filter(|(_, held)| held.waits()).map(|(name, _)| name.clone()).collect()
    }
}

/// A result of a thread, with the outcome of having one.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let failed = |_| Refusal::new(code::INTERNAL, "the shim failed in this call; see its log");
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

impl Keeper {
    /// Listens for agents, and knows the mounts that an earlier shim left. From within a tokio runtime.
    ///
    /// # Errors
    /// No socket can be made, the kubelet root is not there, or mounts cannot be listed.
    pub(crate) fn start(settings: Settings, metrics: Arc<Metrics>) -> io::Result<Self> {
        let root = Root::open(&settings.kubelet_root).map_err(io::Error::other)?;
        let listener = agents::listen(&settings)?;
        let mut machine = Machine::new(settings.gap_deadline);
        // Another driver on this node has another root.
        let mut mounts = mountinfo::read()?;
        mounts.retain(|entry| root.holds(&entry.point));
        for volume in mounts.iter().filter_map(mountinfo::Entry::volume) {
            machine.handle(Event::Found(volume.into()), Instant::now());
        }
        let found = machine.states().count();
        if found > 0 {
            tracing::info!(mounts = found, "waiting for agents to give back mounts of before");
        }
        let kept = Kept {
            machine,
            volumes: BTreeMap::new(),
            dead: BTreeSet::new(),
            agents: BTreeMap::new(),
            supervisors: BTreeMap::new(),
            next: 0,
        };
        let keeper = Self(Arc::new(Inner {
            root,
            gap: Mutex::new(Gap::new(settings.handover == Handover::Resend, metrics.clone())),
            metrics,
            settings,
            kept: Mutex::new(kept),
            changed: watch::Sender::new(()),
            turns: Mutex::default(),
        }));
        tokio::spawn(keeper.clone().accept(listener));
        let looking = keeper.clone();
        drop(tokio::task::spawn_blocking(move || looking.look_for_dead(&mounts)));
        let ticking = keeper.clone();
        tokio::spawn(async move {
            let mut every = tokio::time::interval(TICK);
            loop {
                every.tick().await;
                ticking.apply(Event::Tick);
            }
        });
        Ok(keeper)
    }

    /// Tells which mounts of before nobody can serve any more: all processes that had their connections were killed.
    fn look_for_dead(&self, mounts: &[mountinfo::Entry]) {
        let mut dead = BTreeSet::new();
        for entry in mounts.iter().filter(|entry| entry.root == Path::new("/") && !entry.is_covered(mounts)) {
            let Some(volume) = entry.volume() else { continue };
            match mount::is_dead(&entry.point, entry.device) {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(volume, target = ?entry.point, "its mount is dead; its next publish replaces it");
                    dead.insert(Name::from(volume));
                }
                // Taken away, or covered, meanwhile.
                Err(error) => tracing::debug!(volume, %error, "cannot tell whether its mount is dead"),
            }
        }
        tracing::info!(dead = dead.len(), "looked for dead mounts of before");
        self.kept().dead = dead;
    }

    /// Waits until living agents hold every volume, so that the shim may go; `false`: not by then.
    pub(crate) async fn safe(&self, deadline: Instant) -> bool {
        self.until(deadline, |kept| kept.machine.is_safe().then_some(())).await.is_some()
    }

    /// What is kept, for an observer.
    fn status(&self) -> Volumes {
        let kept = self.kept();
        let status = |(name, state): (&Name, State)| {
            let held = kept.volumes.get(name);
            let dead = kept.is_dead(name) && !matches!(state, State::Publishing(_));
            VolumeStatus {
                volume: name.to_string(),
                target: held.map_or_else(String::new, |held| held.target.clone()),
                pod: held.map_or_else(String::new, |held| held.pod.clone()),
                state: if dead { "dead" } else { state.word() }.to_owned(),
                agent: state.agent(),
                waiting: held.is_some_and(Held::waits),
                generation: held.map_or(0, Held::generation),
                parts: held.map_or(0, |held| held.parts.len()),
            }
        };
        Volumes { volumes: kept.machine.states().map(status).collect(), agents: kept.machine.statuses() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something is so.
    async fn until<T>(&self, deadline: Instant, so: impl Fn(&Kept) -> Option<T>) -> Option<T> {
        let mut changes = self.0.changed.subscribe();
        let wait = async {
            loop {
                let found = so(&self.kept());
                if found.is_some() || changes.changed().await.is_err() {
                    return found;
                }
            }
        };
        timeout_at(deadline.into(), wait).await.ok().flatten()
    }

    fn apply(&self, event: Event) {
        let Ok(()) = self.apply_if(|_| Ok::<_, Infallible>(event));
    }

    /// Lets an event happen if it may, in one step with what else changes.
    fn apply_if<E>(&self, event: impl FnOnce(&mut Kept) -> Result<Event, E>) -> Result<(), E> {
        let mut kept = self.kept();
        let event = event(&mut kept)?;
        let actions = kept.machine.handle(event, Instant::now());
        self.0.metrics.volumes.set(kept.machine.states().count());
        self.0.metrics.agents.set(kept.agents.len());
        let still = |name: &&Name| kept.machine.state(name) == Some(State::Unclaimed);
        self.0.metrics.dead.set(kept.dead.iter().filter(still).count());
        drop(kept);
        self.0.changed.send_replace(());
        for action in actions {
            match action {
                Action::Adopt(volume, by, attempts) => {
                    drop(tokio::spawn(self.clone().adopt(volume, by, attempts)))
                }
                Action::Drain(volume, at) => drop(tokio::spawn(self.clone().drain(volume, at))),
                Action::Kill(agent) => self.kill(agent),
                Action::Gap => {
                    let keeper = self.clone();
                    drop(tokio::task::spawn_blocking(move || keeper.gap()));
                }
            }
        }
        Ok(())
    }

    /// Gives a volume to an agent. If the connection ends meanwhile, the end of the process tells what became of it.
    async fn adopt(self, volume: Name, by: u64, attempts: u32) {
        let asked = {
            let kept = self.kept();
            let held = kept.volumes.get(&volume);
            kept.link(by)
                .zip(held)
                .map(|(link, held)| (link, held.estate(&volume, attempts, self.0.settings.handover)))
        };
        let Some((link, estate)) = asked else { return };
        let outcome = match estate {
            Ok((message, descriptors)) => link.ask(&message, descriptors, Instant::now() + ADOPT).await,
            Err(error) => Ok(Message::Refused(Refused { code: code::INTERNAL, text: error.to_string() })),
        };
        match outcome {
            Ok(Message::Done(_)) => {
                self.0.metrics.adoptions.increment();
                self.apply(Event::Adopted(volume, by));
            }
            Err(AskError::Closed) => {}
            Err(AskError::Deadline) => {
                tracing::error!(%volume, agent = by, "not adopted in time; the agent is killed");
                self.apply(Event::Stuck(by));
            }
            other => {
                let why = why(other).text;
                tracing::warn!(%volume, agent = by, why, "not adopted; tried again later");
                self.apply(Event::Refused(volume, by));
            }
        }
    }

    /// Has an agent let go. One that does not is killed: until it is gone nobody else may read.
    async fn drain(self, volume: Name, at: u64) {
        let Some(link) = self.kept().link(at) else { return };
        let message = Message::Drain(Drain { volume: volume.to_string() });
        match link.ask(&message, Vec::new(), Instant::now() + DRAIN).await {
            Ok(Message::Done(_)) => {
                self.0.metrics.drains.increment();
                self.apply(Event::Drained(volume, at));
            }
            Err(AskError::Closed) => {}
            other => {
                tracing::error!(%volume, agent = at, why = why(other).text, "not let go of; the agent is killed");
                self.apply(Event::Stuck(at));
            }
        }
    }

    fn kill(&self, agent: u64) {
        let Some(pidfd) = self.kept().agents.get(&agent).map(|agent| agent.pidfd.clone()) else { return };
        self.0.metrics.hung.increment();
        tracing::error!(agent, "hung: killed");
        if let Err(error) = pidfd_send_signal(pidfd.as_fd(), Signal::KILL) {
            tracing::warn!(agent, %error, "cannot be killed");
        }
    }

    /// Has EIO answered for those volumes that the machine names, and for no other. One after the other, so that none acts on
    /// what an earlier one saw.
    fn gap(&self) {
        let mut gap = self.0.gap.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut quiet, mut failing) = (Vec::new(), BTreeMap::new());
        let kept = self.kept();
        for (name, state) in kept.machine.states() {
            match (state, kept.volumes.get(name)) {
                (State::Hushing, _) => quiet.push(Name::clone(name)),
                (State::Failing, Some(held)) => {
                    drop(failing.insert(Name::clone(name), Arc::clone(&held.fuse)))
                }
                _ => {}
            }
        }
        drop(kept);
        if let Err(error) = gap.answer(failing) {
            tracing::error!(%error, "readers without an agent cannot be answered");
        }
        quiet.into_iter().for_each(|volume| self.apply(Event::Quiet(volume)));
    }
}

/// What an answer that is no `Done` says.
fn why(answer: Result<Message, AskError>) -> Refusal {
    match answer {
        Ok(Message::Refused(Refused { code, text })) => Refusal { code, text },
        Ok(Message::Unsupported(_)) => {
            Refusal::new(code::UNIMPLEMENTED, "the agent is too old for this shim; update it")
        }
        Ok(_) => Refusal::new(code::INTERNAL, "the agent answered something else"),
        Err(AskError::Fault(fault)) => Refusal::new(code::INVALID_ARGUMENT, fault),
        Err(error) => {
            Refusal::new(code::UNAVAILABLE, format!("the agent gave no answer: {error}; tried again soon"))
        }
    }
}

fn done() -> Message {
    Message::Done(Done::default())
}

fn answer(outcome: Result<(), Refusal>) -> Message {
    match outcome {
        Ok(()) => done(),
        Err(Refusal { code, text }) => Message::Refused(Refused { code, text }),
    }
}
