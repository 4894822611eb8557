//! What kubelet asks for, and root. One call per volume at a time, volumes side by side; a call that has begun runs to its end
//! in a task of its own, whatever its caller does.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use fuse_secrets_csi::wire::message::{self, Message, Stats, Unpublish};
use tokio::sync::OwnedMutexGuard;

use super::*;
use crate::heal;
use crate::mount::Detached;
use crate::mountinfo::{Device, Entry};
use crate::target::{Occupant, Target};

/// Calls that are worked on or wait for their volume.
const MOST_CALLS: usize = 2048;
/// For an agent to attach; kubelet tries again.
const AGENT: Duration = Duration::from_secs(10);
/// For an agent of before to give its volume back.
const BACK: Duration = Duration::from_secs(5);
/// For an agent to fetch all files; it has its own, shorter deadline. kubelet gives a call 2 min.
const FETCH: Duration = Duration::from_secs(100);
/// For what an agent does without its store.
const BRIEF: Duration = Duration::from_secs(5);

impl node::Volumes for Keeper {
    async fn publish(&self, publish: Publish) -> Result<Vec<String>, Refusal> {
        let keeper = self.clone();
        let whole = async move {
            let outcome = keeper.publish_whole(publish).await;
            if outcome.is_err() {
                keeper.0.metrics.refusals.increment();
            }
            outcome
        };
        to_its_end(whole).await
    }

    async fn unpublish(&self, volume: &str, target: &Path) -> Result<(), Refusal> {
        let (keeper, volume, target) = (self.clone(), Name::from(volume), target.to_owned());
        to_its_end(async move { keeper.unpublish_whole(&volume, target).await }).await
    }

    async fn stats(&self, volume: &str, target: &Path) -> Result<VolumeStats, Refusal> {
        let faulty = |fault: &str| Ok(VolumeStats { bytes: 0, files: 0, fault: Some(fault.to_owned()) });
        let missing = || Refusal::new(code::NOT_FOUND, format!("no volume {volume} at {target:?}"));
        let (dead, link) = {
            let kept = self.kept();
            let state = kept.machine.state(volume).ok_or_else(missing)?;
            let held = kept.volumes.get(volume);
            if held.is_some_and(|held| held.is_elsewhere(target)) {
                return Err(missing());
            }
            (kept.is_dead(volume), kept.link(state.agent()))
        };
        if dead {
            return faulty("the mount is dead; the next publish replaces it");
        }
        let Some(link) = link else { return faulty("no agent serves it; its readers wait") };
        let asked = Message::Stats(Stats { volume: volume.to_owned(), counters: BTreeMap::new() });
        match link.ask(&asked, Vec::new(), Instant::now() + BRIEF).await {
            Ok(Message::Stats(Stats { counters, .. })) => {
                let count = |name: &str| counters.get(name).copied().unwrap_or(0);
                Ok(VolumeStats { bytes: count("bytes"), files: count("files"), fault: None })
            }
            other => Err(why(other)),
        }
    }

    fn ready(&self) -> Result<(), String> {
        let serving = self.kept().machine.serving();
        serving.map(drop).ok_or_else(|| "no agent is attached; see the agent's pod on this node".to_owned())
    }
}

impl Keeper {
    /// Ends a volume's connection: its readers get an error wherever they are. The dead mount stays where it is, so that the next
    /// publish finds it, and heals every pod that has it.
    pub(super) async fn abort(self, volume: &str) -> Result<(), Refusal> {
        let volume = Name::from(volume);
        let _turn = self.turn(&volume).await?;
        if self.kept().machine.state(&volume).is_none() {
            return Err(Refusal::new(code::NOT_FOUND, format!("no volume {volume}")));
        }
        let agent = self.forget(&volume);
        let (inner, name) = (Arc::clone(&self.0), Name::clone(&volume));
        blocking(move || {
            let failed =
                |error: io::Error| Refusal::new(code::INTERNAL, format!("cannot abort {name}: {error}"));
            let ours = mountinfo::read().map_err(failed)?;
            let is = |entry: &&Entry| entry.volume() == Some(&name) && inner.root.holds(&entry.point);
            ours.iter().filter(is).try_for_each(|entry| mount::abort(entry.device)).map_err(failed)
        })
        .await?;
        tracing::warn!(%volume, "aborted");
        self.tell(&volume, agent).await;
        Ok(())
    }

    async fn unpublish_whole(&self, volume: &Name, target: PathBuf) -> Result<(), Refusal> {
        let _turn = self.turn(volume).await?;
        let inner = Arc::clone(&self.0);
        let elsewhere = {
            let kept = self.kept();
            kept.alone(volume, &target)?;
            kept.volumes.get(volume).is_some_and(|held| held.is_elsewhere(&target))
        };
        let found = blocking(move || match inner.root.resolve(&target) {
            Err(TargetError::Missing(_)) => Ok(None),
            resolved => resolved.map(Some).map_err(invalid),
        });
        let found = found.await?;
        let agent = if elsewhere { None } else { self.forget(volume) };
        blocking(move || {
            let Some(target) = found else { return Ok(()) };
            mount::detach_all(&target).and_then(|_| target.remove()).map_err(|error| {
                Refusal::new(code::INTERNAL, format!("cannot take {:?} away: {error}", target.path()))
            })
        })
        .await?;
        self.tell(volume, agent).await;
        Ok(())
    }

    async fn publish_whole(&self, publish: Publish) -> Result<Vec<String>, Refusal> {
        let name = Name::from(publish.volume.as_str());
        let _turn = self.turn(&name).await?;
        let held = |held: &Held| (held.is_elsewhere(&publish.target), held.is_dead(), held.target.clone());
        let is_dead = match self.kept().volumes.get(&name).map(held) {
            Some((true, _, at)) => {
                let text = format!("volume {name} is published at {at:?}; a pod's volume has one target");
                return Err(Refusal::new(code::FAILED_PRECONDITION, text));
            }
            held => held.map(|(_, is_dead, _)| is_dead),
        };
        match is_dead {
            Some(false) => return Ok(self.renew(&name, publish).await),
            Some(true) => self.tell(&name, self.forget(&name)).await,
            None => {}
        }
        let (inner, path, volume) = (Arc::clone(&self.0), publish.target.clone(), Name::clone(&name));
        let looked = blocking(move || {
            let target = inner.root.resolve(&path).map_err(invalid)?;
            let failed = |error| Refusal::new(code::INTERNAL, format!("cannot look at {path:?}: {error}"));
            let mounts = mountinfo::read().map_err(failed)?;
            Ok(match target.occupant(&mounts) {
                Occupant::Nothing => {
                    if !target.is_empty().map_err(failed)? {
                        let text = format!("{path:?} holds files, which a mount would hide; move them away");
                        return Err(Refusal::new(code::FAILED_PRECONDITION, text));
                    }
                    Some((target, None))
                }
                Occupant::Ours { volume: ours, device }
                    if *ours == *volume && mount::is_dead(target.path(), device).map_err(failed)? =>
                {
                    Some((target, Some(device)))
                }
                Occupant::Ours { volume: ours, .. } if *ours == *volume => None,
                Occupant::Ours { volume: other, .. } => return Err(occupied(&path, &other)),
                Occupant::Foreign => {
                    tracing::info!(volume = %volume, "its target is another driver's; left alone");
                    None
                }
            })
        });
        let Some((target, dead)) = looked.await? else {
            // Of a driver whose name was taken over; or of ours, and its agent will give it back.
            if self.kept().machine.state(&name).is_some() {
                let back = |kept: &Kept| kept.volumes.contains_key(&name).then_some(());
                if self.until(Instant::now() + BACK, back).await.is_some() {
                    return Ok(self.renew(&name, publish).await);
                }
            }
            return Ok(Vec::new());
        };
        let outcome = self.fresh(&name, publish, target, dead).await;
        if outcome.is_ok() {
            self.0.metrics.publishes.increment();
        } else if dead.is_some() {
            self.apply(Event::Found(name));
        }
        outcome
    }

    /// Passes newer tokens on. Never an error: kubelet would take the volume away.
    async fn renew(&self, name: &Name, publish: Publish) -> Vec<String> {
        let served = |kept: &Kept| match (kept.machine.state(name), kept.machine.serving()) {
            (Some(State::Served(agent)), _) => Some(kept.link(agent)),
            (_, None) => Some(None),
            _ => None,
        };
        let Some(Some(link)) = self.until(Instant::now() + BRIEF, served).await else { return Vec::new() };
        match link.ask(&order(publish), Vec::new(), Instant::now() + BRIEF).await {
            Ok(Message::Done(done)) => done.warnings,
            other => {
                tracing::warn!(volume = %name, why = why(other).text, "newer tokens were not taken");
                Vec::new()
            }
        }
    }

    /// Has an agent make a volume of a mount that nobody sees yet, and then lets it be seen.
    async fn fresh(
        &self,
        name: &Name,
        publish: Publish,
        target: Target,
        dead: Option<Device>,
    ) -> Result<Vec<String>, Refusal> {
        let serving = |kept: &Kept| kept.machine.serving().and_then(|agent| Some((agent, kept.link(agent)?)));
        let none =
            || Refusal::new(code::UNAVAILABLE, "no agent is attached; see the agent's pod on this node");
        let (agent, link) = self.until(Instant::now() + AGENT, serving).await.ok_or_else(none)?;
        let (inner, volume) = (Arc::clone(&self.0), Name::clone(name));
        let made = blocking(move || {
            let failed = |error: &dyn ToString| Refusal::new(code::INTERNAL, error.to_string());
            let (fuse, mount) =
                mount::create(&volume, &inner.settings.mount).map_err(|error| failed(&error))?;
            let lent = hold::lend(fuse.as_fd(), inner.settings.handover).map_err(|error| failed(&error))?;
            Ok((fuse, mount, lent))
        });
        let (fuse, mount, lent) = made.await?;
        let pod = |key| publish.pod.get(key).map_or("", String::as_str);
        let pod = [pod("csi.storage.k8s.io/pod.namespace"), pod("csi.storage.k8s.io/pod.name")].join("/");
        let shown = publish.target.to_string_lossy().into_owned();
        let held = Held {
            fuse: Arc::new(fuse),
            parts: BTreeMap::new(),
            at: Some(publish.target.clone()),
            target: shown,
            pod: pod.clone(),
        };
        self.apply_if(|kept| {
            let most = self.0.settings.max_volumes;
            let count = kept.machine.states().count();
            if kept.machine.state(name).is_none() && count >= most {
                let text = format!(
                    "{count} of {most} volumes are on this node; raise the shim's --max-volumes (to 1000 at most), \
                     or have fewer pods here"
                );
                return Err(Refusal::new(code::RESOURCE_EXHAUSTED, text));
            }
            kept.alone(name, &publish.target)?;
            kept.volumes.insert(Name::clone(name), held);
            Ok(Event::Publishing(Name::clone(name), agent))
        })?;
        let outcome = match link.ask(&order(publish), vec![lent], Instant::now() + FETCH).await {
            Ok(Message::Done(done)) => {
                let healing = dead.map(|dead| Healing { dead, pod, volume: name.to_string(), link });
                self.show(mount, target, healing).await.map(|()| done.warnings)
            }
            other => Err(why(other)),
        };
        match outcome {
            Ok(_) => self.apply(Event::Published(Name::clone(name))),
            Err(_) => self.tell(name, self.forget(name)).await,
        }
        outcome
    }

    /// Attaches a mount; over a dead one, also wherever else that is: in the pod of this name, and what is bound from it.
    async fn show(&self, mount: Detached, target: Target, healing: Option<Healing>) -> Result<(), Refusal> {
        let inner = Arc::clone(&self.0);
        let target = blocking(move || {
            let failed = |error: &dyn ToString| Refusal::new(code::INTERNAL, error.to_string());
            let made = target
                .create()
                .map_err(|error| failed(&format!("cannot make {:?}: {error}", target.path())))?;
            if let Err(error) = mount.attach(&target) {
                if made && let Err(error) = target.remove() {
                    tracing::warn!(target = ?target.path(), %error, "left behind");
                }
                return Err(failed(&error));
            }
            Ok(target)
        });
        let target = target.await?;
        if let Some(Healing { dead, pod, volume, link }) = healing {
            let root = self.0.settings.kubelet_root.clone();
            drop(tokio::spawn(async move {
                let healing = tokio::task::spawn_blocking(move || {
                    let (begun, report) = (Instant::now(), heal::heal(dead, &target));
                    inner.metrics.heals.add(report.healed);
                    tracing::info!(pod, healed = report.healed, took = ?begun.elapsed(), "dead mounts were replaced");
                    for (pid, point, why) in &report.failed {
                        tracing::warn!(
                            pod,
                            pid,
                            ?point,
                            why,
                            "a dead mount cannot be replaced; restart the pod"
                        );
                    }
                    report.failed
                });
                let mut failed = healing.await.unwrap_or_default();
                // A pod's owner knows the pod's own paths; kubelet's copies of them are as dead.
                if failed.iter().any(|(_, point, _)| !point.starts_with(&root)) {
                    failed.retain(|(_, point, _)| !point.starts_with(&root));
                }
                if let Some((_, point, why)) = failed.first() {
                    let text = format!(
                        "{} mounts of this volume died and cannot be replaced, such as {point:?}: {why}; restart the pod",
                        failed.len()
                    );
                    let event = message::Event { volume, reason: "MountDead".to_owned(), text };
                    // An agent that is too old for it has nobody to tell; the log has it.
                    let _ = link.ask(&Message::Event(event), Vec::new(), Instant::now() + BRIEF).await;
                }
            }));
        }
        Ok(())
    }

    /// Keeps nothing of a volume any more; says which agent may have it.
    fn forget(&self, name: &Name) -> Option<Link> {
        let mut agent = None;
        let Ok(()) = self.apply_if(|kept| {
            agent = kept.machine.state(name).and_then(|state| kept.link(state.agent()));
            kept.volumes.remove(name);
            Ok::<_, Infallible>(Event::Forgotten(Name::clone(name)))
        });
        agent
    }

    /// Tells an agent that a volume is gone.
    async fn tell(&self, name: &Name, agent: Option<Link>) {
        let Some(link) = agent else { return };
        let gone = Message::Unpublish(Unpublish { volume: name.to_string() });
        match link.ask(&gone, Vec::new(), Instant::now() + BRIEF).await {
            Ok(Message::Done(_)) => {}
            other => tracing::warn!(volume = %name, why = why(other).text, "the agent did not wipe a volume"),
        }
    }

    /// Waits until nobody else works on a volume.
    async fn turn(&self, name: &Name) -> Result<OwnedMutexGuard<()>, Refusal> {
        let turn = {
            let mut turns = self.0.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Who has or awaits a turn has a reference of its own.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            if turns.len() >= MOST_CALLS && !turns.contains_key(name) {
                let text =
                    format!("{MOST_CALLS} volumes are worked on at once, which is the limit; try again");
                return Err(Refusal::new(code::RESOURCE_EXHAUSTED, text));
            }
            Arc::clone(turns.entry(Name::clone(name)).or_default())
        };
        Ok(turn.lock_owned().await)
    }
}

impl Kept {
    /// Nobody else's target.
    fn alone(&self, name: &Name, target: &Path) -> Result<(), Refusal> {
        let other = |(other, held): &(&Name, &Held)| *other != name && held.at.as_deref() == Some(target);
        self.volumes.iter().find(other).map_or(Ok(()), |(other, _)| Err(occupied(target, other)))
    }
}

/// A mount that died, whose place a new one takes.
struct Healing {
    dead: Device,
    pod: String,
    volume: String,
    /// Who serves the new one.
    link: Link,
}

fn order(publish: Publish) -> Message {
    let Publish { volume, target, pod, attributes, group, tokens, secret_ref } = publish;
    let target = target.to_string_lossy().into_owned();
    Message::Publish(message::Publish { volume, target, pod, attributes, group, tokens, secret_ref })
}

fn occupied(target: &Path, volume: &str) -> Refusal {
    let text = format!("volume {volume} is mounted on {target:?}; unpublish it first");
    Refusal::new(code::FAILED_PRECONDITION, text)
}

fn invalid(error: TargetError) -> Refusal {
    Refusal::new(code::INVALID_ARGUMENT, error)
}

async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    let failed = |_| Refusal::new(code::INTERNAL, "the shim failed in this call; see its log");
    tokio::spawn(work).await.map_err(failed)?
}
