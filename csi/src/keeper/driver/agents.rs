//! Who connects, and as what.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::{Asked, End, Link, Reply};
use fuse_secrets_csi::wire::message::{Adopt, Deposit, Hello, Refused, Role, Stats, Unsupported, Worker};
use rustix::fs::{Gid, Mode, Uid, chmod, chown};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use super::{Agent, Held, Keeper, Refusal, Settings, answer, code, hold};
use crate::keeper::{About, Event, MOST_AGENTS, Name, SILENCE, State};
use crate::peer::{Peer, pid_of};
use crate::sys;

/// Supervisors, workers, observers, and those who turn out to be nobody; more wait in the socket.
const MOST_CONNECTIONS: usize = 16;
/// Who connects says Hello at once.
const HELLO: Duration = Duration::from_secs(5);
const HEARTBEAT: Duration = Duration::from_secs(1);
const PROGRAM: &str = concat!("fuse-secrets-csi ", env!("CARGO_PKG_VERSION"));

type Questions = mpsc::Receiver<Asked>;

/// A supervisor that is connected.
pub(super) struct Supervisor {
    peer: Peer,
    /// The worker that it announced.
    worker: Option<u32>,
}

/// Makes the node socket, in a directory that only root and the agent's group can enter. What a dead shim left is removed.
pub(super) fn listen(settings: &Settings) -> io::Result<UnixListener> {
    let path = &settings.node_socket;
    let (root, group) = (Some(Uid::ROOT), Some(Gid::from_raw(settings.agent_gid)));
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
        chown(directory, root, group)?;
        chmod(directory, Mode::RWXU | Mode::RGRP | Mode::XGRP)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    chown(path, root, group)?;
    chmod(path, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP)?;
    Ok(listener)
}

impl Keeper {
    pub(super) async fn accept(self, listener: UnixListener) {
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        while let Ok(permit) = room.clone().acquire_owned().await {
            match listener.accept().await {
                Ok((socket, _)) => drop(tokio::spawn(self.clone().connection(socket, permit))),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the node socket");
                    tokio::time::sleep(HEARTBEAT).await;
                }
            }
        }
    }

    /// Somebody, until the end of the connection.
    async fn connection(self, socket: UnixStream, _room: OwnedSemaphorePermit) {
        let looked = tokio::task::spawn_blocking(move || Peer::of(&socket).map(|peer| (socket, peer))).await;
        let (socket, peer) = match looked.map_err(io::Error::other).flatten() {
            Ok(known) => known,
            Err(error) => return tracing::warn!(%error, "somebody unknown on the node socket"),
        };
        let (link, mut asked) = Link::start(socket, End::Accepted);
        let Ok(Some(Asked { message, reply, .. })) = timeout(HELLO, asked.recv()).await else {
            return tracing::warn!(pid = peer.pid, "said nothing on the node socket");
        };
        let (pid, uid) = (peer.pid, peer.uid);
        let refused = match message {
            Message::Hello(hello) => match hello.role {
                Role::Supervisor => self.supervisor(peer, &mut asked, reply).await,
                Role::Worker => self.worker(peer, hello.program, &link, &mut asked, reply).await,
                Role::Observer => self.observer(&peer, &mut asked, reply).await,
                Role::Shim | Role::Unknown => refuse(reply, "no such role".to_owned()),
            },
            _ => refuse(reply, "Hello comes first".to_owned()),
        };
        if let Err(why) = refused {
            tracing::warn!(pid, uid, why, "refused on the node socket");
        }
        link.close();
    }

    async fn supervisor(&self, peer: Peer, asked: &mut Questions, reply: Reply) -> Result<(), String> {
        if let Err(why) = peer.may_supervise(&self.0.settings.agents) {
            return refuse(reply, why);
        }
        let (pid, memlock) = (peer.pid, self.0.settings.memlock);
        if let Err(error) = raise_memlock(pid, memlock) {
            tracing::warn!(pid, memlock, %error, "cannot raise RLIMIT_MEMLOCK of the agent");
        }
        let number = {
            let mut kept = self.kept();
            if kept.supervisors.len() >= MOST_AGENTS {
                drop(kept);
                return refuse(reply, format!("{MOST_AGENTS} supervisors are connected already"));
            }
            let number = kept.number();
            kept.supervisors.insert(number, Supervisor { peer, worker: None });
            number
        };
        tracing::info!(pid, "a supervisor is connected");
        reply.answer(self.hello(0));
        while let Some(Asked { message, descriptors, reply }) = asked.recv().await {
            reply.answer(match message {
                Message::Worker(worker) => answer(self.announced(number, pid, worker, &descriptors)),
                other => unsupported(&other),
            });
        }
        self.kept().supervisors.remove(&number);
        tracing::info!(pid, "a supervisor is gone");
        Ok(())
    }

    fn announced(
        &self,
        supervisor: u64,
        pid: u32,
        worker: Worker,
        pidfds: &[OwnedFd],
    ) -> Result<(), Refusal> {
        let [pidfd] = pidfds else { return Err(Refusal::new(code::INVALID_ARGUMENT, "not one pidfd")) };
        let new = pid_of(pidfd.as_fd()).map_err(|error| Refusal::new(code::INVALID_ARGUMENT, error))?;
        if !worker.ended.is_empty() {
            self.apply(Event::Ended(pid, worker.ended));
        }
        if let Some(supervisor) = self.kept().supervisors.get_mut(&supervisor) {
            supervisor.worker = Some(new);
        }
        Ok(())
    }

    async fn worker(
        &self,
        peer: Peer,
        program: String,
        link: &Link,
        asked: &mut Questions,
        reply: Reply,
    ) -> Result<(), String> {
        let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let pid = peer.pid;
        let program = program.chars().take(64).collect();
        let about = About { pid, supervisor: peer.parent, program, since };
        let pidfd = peer.pidfd.try_clone().and_then(sys::watch).map_err(|error| error.to_string())?;
        let mut reply = Some(reply);
        let mut number = 0;
        let admitted = self.apply_if(|kept| {
            let announced = |supervisor: &&Supervisor| supervisor.worker == Some(pid);
            let supervisor = kept.supervisors.values().find(announced);
            let supervisor = supervisor.ok_or("no supervisor that is connected announced this process")?;
            peer.may_work_for(&supervisor.peer, supervisor.worker)?;
            if !kept.machine.admits(pid) {
                return Err("it is attached already, or too many agents are");
            }
            number = kept.number();
            kept.agents.insert(number, Agent { link: link.clone(), pidfd: Arc::new(peer.pidfd) });
            // Before anything is asked of it.
            if let Some(reply) = reply.take() {
                reply.answer(self.hello(number));
            }
            Ok(Event::Attached(number, about, kept.waiting()))
        });
        if let (Err(why), Some(reply)) = (admitted, reply) {
            return refuse(reply, why.to_owned());
        }
        tracing::info!(agent = number, pid, "an agent is attached");
        tokio::spawn(self.clone().outlive(number, pidfd));
        tokio::spawn(self.clone().heartbeats(number, link.clone()));
        while let Some(Asked { message, descriptors, reply }) = asked.recv().await {
            reply.answer(match message {
                Message::Adopt(adopt) => answer(self.claimed(number, adopt, descriptors)),
                Message::Deposit(deposit) => answer(self.deposited(number, &deposit, descriptors)),
                other => unsupported(&other),
            });
        }
        self.apply(Event::Left(number));
        Ok(())
    }

    /// Waits for the end of an agent's process: only that ends its reading.
    async fn outlive(self, agent: u64, pidfd: AsyncFd<OwnedFd>) {
        if let Err(error) = pidfd.readable().await {
            return tracing::error!(agent, %error, "cannot watch an agent; its volumes stay with it");
        }
        self.0.metrics.deaths.increment();
        tracing::info!(agent, "an agent is gone");
        let Ok(()) = self.apply_if(|kept| {
            // Somebody else may hold its end of the connection.
            kept.agents.remove(&agent).inspect(|gone| gone.link.close());
            Ok::<_, std::convert::Infallible>(Event::Gone(agent, kept.waiting()))
        });
    }

    async fn heartbeats(self, agent: u64, link: Link) {
        let mut every = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                _ = every.tick() => {}
                () = link.closed() => return,
            }
            let how = Message::Stats(Stats::default());
            if let Ok(Message::Stats(_)) = link.ask(&how, Vec::new(), Instant::now() + SILENCE).await {
                self.apply(Event::Answered(agent));
            }
        }
    }

    /// Keeps again what an agent served before this shim ran.
    fn claimed(&self, agent: u64, adopt: Adopt, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
        let invalid = |text: String| Refusal::new(code::INVALID_ARGUMENT, text);
        let mut descriptors = descriptors.into_iter();
        let fuse = descriptors.next().ok_or_else(|| invalid("no descriptor".to_owned()))?;
        if descriptors.len() != adopt.parts.len() {
            return Err(invalid(format!("{} parts, {} descriptors", adopt.parts.len(), descriptors.len())));
        }
        let fuse = hold::keep(fuse, self.0.settings.handover).map_err(|error| invalid(error.to_string()))?;
        let Adopt { volume, target, pod, parts, .. } = adopt;
        let parts = parts.into_iter().zip(descriptors).collect();
        let held = Held { fuse: Arc::new(fuse), parts, at: None, target, pod };
        self.apply_if(|kept| {
            let name = Name::from(volume);
            if kept.machine.state(&name) != Some(State::Unclaimed) {
                let text = format!("{name} is not a mount that waits to be given back");
                return Err(Refusal::new(code::FAILED_PRECONDITION, text));
            }
            kept.volumes.insert(Arc::clone(&name), held);
            Ok(Event::Claimed(name, agent))
        })
    }

    fn deposited(&self, agent: u64, deposit: &Deposit, files: Vec<OwnedFd>) -> Result<(), Refusal> {
        let mut kept = self.kept();
        if kept.machine.state(&deposit.volume).is_none_or(|state| state.agent() != agent) {
            let text = format!("{} is not served by this agent", deposit.volume);
            return Err(Refusal::new(code::FAILED_PRECONDITION, text));
        }
        let (Ok([file]), Some(held)) =
            (<[OwnedFd; 1]>::try_from(files), kept.volumes.get_mut(&*deposit.volume))
        else {
            return Err(Refusal::new(code::INVALID_ARGUMENT, "a part is one descriptor"));
        };
        match held.deposit(deposit.part, file, &deposit.gone) {
            true => Ok(()),
            false => Err(Refusal::new(code::RESOURCE_EXHAUSTED, "too many parts; let some generations go")),
        }
    }

    async fn observer(&self, peer: &Peer, asked: &mut Questions, reply: Reply) -> Result<(), String> {
        if peer.uid != 0 {
            return refuse(reply, "only root observes".to_owned());
        }
        reply.answer(self.hello(0));
        while let Some(Asked { message, reply, .. }) = asked.recv().await {
            reply.answer(match message {
                Message::Volumes(_) => Message::Volumes(self.status()),
                Message::Abort(abort) => answer(self.clone().abort(&abort.volume).await),
                other => unsupported(&other),
            });
        }
        Ok(())
    }

    fn hello(&self, agent: u64) -> Message {
        let handover = self.0.settings.handover;
        Message::Hello(Hello { program: PROGRAM.to_owned(), role: Role::Shim, handover, agent })
    }
}

fn refuse(reply: Reply, why: String) -> Result<(), String> {
    reply.answer(Message::Refused(Refused { code: code::PERMISSION_DENIED, text: why.clone() }));
    Err(why)
}

fn unsupported(message: &Message) -> Message {
    Message::Unsupported(Unsupported { kind: message.kind() })
}

/// Never lowered, and inherited by workers. Beyond the process's own hard limit needs CAP_SYS_RESOURCE, see getrlimit(2).
fn raise_memlock(pid: u32, bytes: u64) -> io::Result<()> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or_else(|| io::Error::other("not a process number"))?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let hard = memlock(&text).ok_or_else(|| io::Error::other("its limits cannot be read"))?;
    let set = |limit| prlimit(Some(number), Resource::Memlock, Rlimit { current: limit, maximum: limit });
    set(hard.map(|hard| hard.max(bytes))).map(drop).map_err(|error| {
        // What it may have without us. The first refusal is the one to tell.
        let _ = set(hard);
        error.into()
    })
}

/// The hard limit of locked memory in `/proc/PID/limits`; `Some(None)`: unlimited.
fn memlock(limits: &str) -> Option<Option<u64>> {
    let hard =
        limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?.split_whitespace().nth(1)?;
    if hard == "unlimited" { Some(None) } else { hard.parse().ok().map(Some) }
}
