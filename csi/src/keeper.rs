//! What is kept, and who may read it: a state machine without I/O. Its [`driver`] holds the descriptors and does what it says.
//!
//! ```text
//!             Publishing ──published──▶ Served ◀──────adopted────── Adopting ◀─┐ an agent is there
//!  mountinfo                             ▲ │ │                      │ │        │ (at most 64 at a time)
//!  at start ──▶ Unclaimed ──claimed──────┘ │ │ a newer agent        │ │ refused: later again
//!               (an agent of before this   │ ▼ (at most 2)          │ ▼        │
//!                shim deposits it again)   │ Draining ──drained──▶ Waiting ────┘◀──quiet── Hushing
//!                                          └───its agent is gone──▶ │ ▲                        ▲
//!                                                  gone: attempts+1 ┘ └                        │ an agent is there
//!                                                   no agent for the gap deadline ──▶ Failing ─┘
//! ```
//! *The fence*: a volume has one reader at a time, because the kernel would feed two. Who reads is an agent (`Publishing`,
//! `Served`, `Draining`, `Adopting`) or the thread that answers EIO (`Failing`, `Hushing`); only from `Waiting`, where nobody does,
//! it is given away. An agent stops being the reader when it says so (drained, refused) or when its process is gone, never because its
//! connection is.
//!
//! *Agents*: the one that attached last serves, older ones stand by and get everything back when it goes. One that misses its
//! heartbeats, or does not adopt or drain in time, is killed; its volumes move when it is gone.
//!
//! *Suspects*: an agent that dies while it adopts may have died of what it adopted, or of a signal that has nothing to do with it. So
//! the volumes that it was adopting come last from then on, and each alone, the one with the fewest deaths first; one that was
//! alone when another agent died is given away as not to be trusted, which costs it its values until the store answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_secrets_csi::wire::message::AgentStatus;

/// What does it: sockets, descriptors, mounts.
pub(crate) mod driver;

/// A volume's name.
pub(crate) type Name = Arc<str>;

/// Most agents whose processes live: one that serves, one that comes, and two that have trouble leaving.
pub(crate) const MOST_AGENTS: usize = 4;
/// An agent that was silent for so long is taken for hung.
pub(crate) const SILENCE: Duration = Duration::from_secs(5);

/// Adoptions in flight after an agent's death.
const MOST_ADOPTING: usize = 64;
/// Volumes on their way from a living agent to another, so that each one's own gap is short on few cores; more than one, as an
/// open may hold a volume back for seconds.
const MOST_MOVING: usize = 2;
/// Agents that are remembered after their end.
const MOST_GONE: usize = 8;
/// An adoption that was refused is asked for again after this, doubled each time ...
const RETRY: Duration = Duration::from_secs(1);
/// ... this often.
const DOUBLINGS: u32 = 5;

/// What happened.
pub(crate) enum Event {
    /// A worker was let in; readers of these volumes wait.
    Attached(u64, About, BTreeSet<Name>),
    /// It answered a heartbeat.
    Answered(u64),
    /// Its connection ended; its process may still read.
    Left(u64),
    /// It did not do in time what it was told.
    Stuck(u64),
    /// Its process is gone; readers of these volumes wait.
    Gone(u64, BTreeSet<Name>),
    /// How the last worker of this supervisor ended, as that one says.
    Ended(u32, String),
    /// A mount of ours of which nothing else is known.
    Found(Name),
    /// An agent that served this volume before this shim ran gave it back to keep.
    Claimed(Name, u64),
    /// An agent is given a new volume.
    Publishing(Name, u64),
    /// It serves it, and it is mounted.
    Published(Name),
    /// Unpublished, refused, aborted.
    Forgotten(Name),
    /// The agent reads it.
    Adopted(Name, u64),
    /// The agent does not, and holds nothing of it.
    Refused(Name, u64),
    /// The agent has let go.
    Drained(Name, u64),
    /// Nobody answers EIO any more.
    Quiet(Name),
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Give it to this agent; so many died while they adopted it and nothing else.
    Adopt(Name, u64, u32),
    /// Have this agent let go of it.
    Drain(Name, u64),
    /// End this agent's process.
    Kill(u64),
    /// Look which volumes are [`Machine::failing`]: another one is, or one no longer.
    Gap,
}

/// What is known of an agent.
pub(crate) struct About {
    /// Its process.
    pub pid: u32,
    /// Its supervisor's.
    pub supervisor: u32,
    /// Program and version, as it says.
    pub program: String,
    /// When it attached, RFC 3339.
    pub since: String,
}

/// Where a volume stands; drawn above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Mounted, held by an agent of before this shim, or by nobody.
    Unclaimed,
    /// The agent fetches its files; not mounted yet.
    Publishing(u64),
    /// The agent reads it.
    Served(u64),
    /// The agent was told to let go.
    Draining(u64),
    /// Nobody reads it.
    Waiting,
    /// The agent was given it.
    Adopting(u64),
    /// Readers get EIO.
    Failing,
    /// Nobody is to answer EIO any more.
    Hushing,
}

impl State {
    /// Which agent has its descriptor; 0: none.
    #[must_use]
    pub(crate) fn agent(self) -> u64 {
        match self {
            Self::Publishing(agent) | Self::Served(agent) | Self::Draining(agent) | Self::Adopting(agent) => {
                agent
            }
            Self::Unclaimed | Self::Waiting | Self::Failing | Self::Hushing => 0,
        }
    }

    /// The word that an observer gets.
    #[must_use]
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Served(_) => "serving",
            Self::Publishing(_) => "publishing",
            Self::Draining(_) | Self::Adopting(_) => "handing_over",
            Self::Waiting => "waiting",
            Self::Failing | Self::Hushing => "failing",
            Self::Unclaimed => "unclaimed",
        }
    }
}

struct Volume {
    state: State,
    /// Since when nobody serves it.
    since: Instant,
    /// Not to be given to an agent before.
    retry: Instant,
    refusals: u32,
    /// Agents that died while they adopted it: a suspect.
    deaths: u32,
    /// Somebody waits for it: first.
    urgent: bool,
}

impl Volume {
    fn is_adopting(&self) -> bool {
        matches!(self.state, State::Adopting(_))
    }
}

#[derive(PartialEq, Eq)]
enum Standing {
    Attached,
    /// Without a connection, or killed, but not known to be gone.
    Leaving,
    Gone,
}

struct Agent {
    about: About,
    standing: Standing,
    answered: Instant,
    killed: bool,
    ended: Option<String>,
}

/// The whole.
pub(crate) struct Machine {
    gap: Duration,
    agents: BTreeMap<u64, Agent>,
    volumes: BTreeMap<Name, Volume>,
}

impl Machine {
    /// Nothing yet. A volume without an agent for `gap` fails its readers.
    #[must_use]
    pub(crate) fn new(gap: Duration) -> Self {
        Self { gap, agents: BTreeMap::new(), volumes: BTreeMap::new() }
    }

    /// Takes in what happened and says what is to be done. What is no longer true of a volume or an agent changes nothing.
    pub(crate) fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Attached(agent, about, urgent) => self.attached(agent, about, &urgent, now),
            Event::Answered(agent) => {
                if let Some(agent) = self.agents.get_mut(&agent) {
                    agent.answered = now;
                }
                // Moves no volume.
                return actions;
            }
            Event::Left(agent) => {
                if let Some(agent) = self.agents.get_mut(&agent).filter(|a| a.standing == Standing::Attached)
                {
                    agent.standing = Standing::Leaving;
                }
            }
            Event::Stuck(agent) => self.kill(agent, &mut actions),
            Event::Gone(agent, urgent) => self.gone(agent, &urgent, now),
            Event::Ended(supervisor, how) => {
                let mut theirs = self.agents.values_mut().rev();
                if let Some(last) = theirs.find(|agent| agent.about.supervisor == supervisor) {
                    last.ended.get_or_insert(how);
                }
            }
            Event::Found(volume) => self.add(volume, State::Unclaimed, now),
            Event::Claimed(volume, agent) => self.turn(&volume, State::Unclaimed, State::Served(agent), now),
            Event::Publishing(volume, agent) => self.add(volume, State::Publishing(agent), now),
            Event::Published(volume) => {
                let by = self.volumes.get(&volume).map_or(0, |volume| volume.state.agent());
                let lives = self.agents.get(&by).is_some_and(|agent| agent.standing != Standing::Gone);
                let to = if lives { State::Served(by) } else { State::Waiting };
                self.turn(&volume, State::Publishing(by), to, now);
            }
            Event::Forgotten(volume) => {
                let was = self.volumes.remove(&volume).map(|volume| volume.state);
                if matches!(was, Some(State::Failing | State::Hushing)) {
                    actions.push(Action::Gap);
                }
            }
            Event::Adopted(volume, agent) => {
                self.turn(&volume, State::Adopting(agent), State::Served(agent), now);
            }
            Event::Refused(volume, agent) => {
                let volume = self.volumes.get_mut(&volume);
                if let Some(volume) = volume.filter(|volume| volume.state == State::Adopting(agent)) {
                    volume.state = State::Waiting;
                    volume.retry = now + RETRY * 2_u32.pow(volume.refusals.min(DOUBLINGS));
                    volume.refusals += 1;
                }
            }
            Event::Drained(volume, agent) => self.turn(&volume, State::Draining(agent), State::Waiting, now),
            Event::Quiet(volume) => {
                if let Some(volume) = self.volumes.get_mut(&volume).filter(|v| v.state == State::Hushing) {
                    volume.state = State::Waiting;
                }
            }
            Event::Tick => {
                let silent = |agent: &Agent| !agent.killed && now.duration_since(agent.answered) >= SILENCE;
                let hung: Vec<u64> = self.living().filter(|(_, a)| silent(a)).map(|(id, _)| *id).collect();
                for agent in hung {
                    self.kill(agent, &mut actions);
                }
            }
        }
        self.settle(now, &mut actions);
        actions
    }

    /// The agent that serves: the last that attached.
    #[must_use]
    pub(crate) fn serving(&self) -> Option<u64> {
        self.agents.iter().rev().find(|(_, agent)| agent.standing == Standing::Attached).map(|(id, _)| *id)
    }

    /// Where a volume stands; `None`: it is not known.
    #[must_use]
    pub(crate) fn state(&self, volume: &str) -> Option<State> {
        self.volumes.get(volume).map(|volume| volume.state)
    }

    /// All volumes.
    pub(crate) fn states(&self) -> impl Iterator<Item = (&Name, State)> {
        self.volumes.iter().map(|(name, volume)| (name, volume.state))
    }

    /// Agents whose processes live.
    fn living(&self) -> impl Iterator<Item = (&u64, &Agent)> {
        self.agents.iter().filter(|(_, agent)| agent.standing != Standing::Gone)
    }

    /// Whether one of these processes may become an agent: not while there are too many, and a process is one agent at most.
    #[must_use]
    pub(crate) fn admits(&self, pid: u32) -> bool {
        self.living().count() < MOST_AGENTS && !self.living().any(|(_, agent)| agent.about.pid == pid)
    }

    /// The agents for an observer.
    #[must_use]
    pub(crate) fn statuses(&self) -> Vec<AgentStatus> {
        let serving = self.serving();
        let status = |(id, agent): (&u64, &Agent)| AgentStatus {
            agent: *id,
            pid: if agent.standing == Standing::Gone { 0 } else { agent.about.pid },
            program: agent.about.program.clone(),
            state: match (&agent.standing, &agent.ended) {
                (Standing::Attached, _) if serving == Some(*id) => "serving".to_owned(),
                (Standing::Attached, _) => "standby".to_owned(),
                (Standing::Leaving, _) => "leaving".to_owned(),
                (Standing::Gone, ended) => ended.clone().unwrap_or_else(|| "ended".to_owned()),
            },
            since: agent.about.since.clone(),
        };
        self.agents.iter().map(status).collect()
    }

    /// Whether living agents hold everything, so that the shim may go.
    #[must_use]
    pub(crate) fn is_safe(&self) -> bool {
        let attached =
            |agent| self.agents.get(&agent).is_some_and(|agent| agent.standing == Standing::Attached);
        self.volumes.values().all(|volume| match volume.state {
            State::Served(agent) => attached(agent),
            State::Unclaimed => true,
            _ => false,
        })
    }

    fn attached(&mut self, agent: u64, about: About, urgent: &BTreeSet<Name>, now: Instant) {
        let new = Agent { about, standing: Standing::Attached, answered: now, killed: false, ended: None };
        self.agents.insert(agent, new);
        for (name, volume) in &mut self.volumes {
            (volume.retry, volume.refusals, volume.urgent) = (now, 0, urgent.contains(name));
        }
    }

    fn gone(&mut self, agent: u64, urgent: &BTreeSet<Name>, now: Instant) {
        let Some(it) = self.agents.get_mut(&agent) else { return };
        it.standing = Standing::Gone;
        for (name, volume) in &mut self.volumes {
            match volume.state {
                State::Adopting(by) if by == agent => volume.deaths += 1,
                State::Served(by) | State::Draining(by) if by == agent => volume.since = now,
                _ => continue,
            }
            (volume.state, volume.retry, volume.urgent) = (State::Waiting, now, urgent.contains(name));
        }
        let gone = |(_, agent): &(&u64, &Agent)| agent.standing == Standing::Gone;
        let ended: Vec<u64> =
            self.agents.iter().rev().filter(gone).skip(MOST_GONE).map(|(id, _)| *id).collect();
        self.agents.retain(|id, _| !ended.contains(id));
    }

    fn kill(&mut self, agent: u64, actions: &mut Vec<Action>) {
        let Some(it) = self.agents.get_mut(&agent).filter(|it| it.standing != Standing::Gone && !it.killed)
        else {
            return;
        };
        (it.standing, it.killed) = (Standing::Leaving, true);
        it.ended = Some("hung and was killed".to_owned());
        actions.push(Action::Kill(agent));
    }

    fn add(&mut self, volume: Name, state: State, now: Instant) {
        let new = Volume { state, since: now, retry: now, refusals: 0, deaths: 0, urgent: false };
        self.volumes.insert(volume, new);
    }

    /// From one state to another; what is in a third stays there.
    fn turn(&mut self, volume: &str, from: State, to: State, now: Instant) {
        let Some(volume) = self.volumes.get_mut(volume).filter(|volume| volume.state == from) else { return };
        (volume.state, volume.since) = (to, now);
        if matches!(to, State::Served(_)) {
            (volume.deaths, volume.refusals, volume.urgent) = (0, 0, false);
        }
    }

    /// Moves every volume towards the agent that serves, or towards EIO.
    fn settle(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let serving = self.serving();
        let count =
            |wanted: fn(&Volume) -> bool| self.volumes.values().filter(|volume| wanted(volume)).count();
        let mut adopting = count(Volume::is_adopting);
        let mut alone = count(|volume| volume.is_adopting() && volume.deaths > 0) > 0;
        let mut moving = adopting + count(|volume| matches!(volume.state, State::Draining(_)));
        let mut gap = false;
        let mut volumes: Vec<(&Name, &mut Volume)> = self.volumes.iter_mut().collect();
        volumes.sort_by_key(|(_, volume)| (volume.deaths, !volume.urgent));
        for (name, volume) in volumes {
            let to = serving.filter(|_| volume.retry <= now);
            let most = if volume.deaths > 0 { 1 } else { MOST_ADOPTING };
            match (volume.state, to) {
                (State::Waiting, Some(to)) if adopting < most && !alone => {
                    (adopting, moving, alone) = (adopting + 1, moving + 1, volume.deaths > 0);
                    volume.state = State::Adopting(to);
                    // The first death was in company, or anybody's.
                    actions.push(Action::Adopt(name.clone(), to, volume.deaths.saturating_sub(1)));
                }
                (State::Failing, Some(_)) => (volume.state, gap) = (State::Hushing, true),
                (State::Waiting, None) if now.duration_since(volume.since) >= self.gap => {
                    (volume.state, gap) = (State::Failing, true);
                }
                (State::Served(by), Some(to)) if by != to && moving < MOST_MOVING => {
                    let attached = |agent: &Agent| agent.standing == Standing::Attached;
                    // Without a connection it cannot be told; it will soon be gone.
                    if self.agents.get(&by).is_some_and(attached) {
                        moving += 1;
                        volume.state = State::Draining(by);
                        actions.push(Action::Drain(name.clone(), by));
                    }
                }
                _ => {}
            }
        }
        if gap {
            actions.push(Action::Gap);
        }
    }
}

#[cfg(test)]
mod tests;
