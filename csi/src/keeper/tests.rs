use proptest::prelude::*;

use super::*;

const GAP: Duration = Duration::from_secs(30);

fn about(pid: u32) -> About {
    About { pid, supervisor: pid + 1000, program: String::new(), since: String::new() }
}

/// Agents that do as they are told when the history says so, and what they hold.
struct World {
    machine: Machine,
    now: Instant,
    next: u64,
    alive: BTreeSet<u64>,
    told: Vec<Action>,
    readers: BTreeMap<Name, BTreeSet<u64>>,
    /// Whether the thread that answers EIO reads it, as far as the driver has looked.
    answering: BTreeSet<Name>,
}

impl World {
    fn new() -> Self {
        Self {
            machine: Machine::new(GAP),
            now: Instant::now(),
            next: 1,
            alive: BTreeSet::new(),
            told: Vec::new(),
            readers: BTreeMap::new(),
            answering: BTreeSet::new(),
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.machine.handle(event, self.now) {
            if let Action::Adopt(volume, agent, _) = &action {
                assert!(self.alive.contains(agent), "given to an agent that is gone");
                let readers = self.readers.entry(volume.clone()).or_default();
                assert!(readers.is_empty(), "{volume} given to {agent} while {readers:?} read it");
                assert!(!self.answering.contains(volume), "{volume} given away while EIO is answered");
                readers.insert(*agent);
            }
            match action {
                Action::Kill(agent) => self.die(agent),
                told => self.told.push(told),
            }
        }
        let adopting = self.machine.states().filter(|(_, s)| matches!(s, State::Adopting(_))).count();
        let draining = self.machine.states().filter(|(_, s)| matches!(s, State::Draining(_))).count();
        assert!(adopting <= MOST_ADOPTING && draining <= MOST_MOVING, "{adopting} {draining}");
        let suspects = self.machine.volumes.values().filter(|v| v.deaths > 0 && v.is_adopting()).count();
        assert!(suspects == 0 || adopting == 1, "{suspects} suspects among {adopting} that are adopted");
    }

    fn attach(&mut self) -> u64 {
        let agent = self.next;
        self.next += 1;
        self.alive.insert(agent);
        self.handle(Event::Attached(agent, about(u32::try_from(agent).unwrap()), BTreeSet::new()));
        agent
    }

    fn die(&mut self, agent: u64) {
        if self.alive.remove(&agent) {
            self.readers.values_mut().for_each(|readers| {
                readers.remove(&agent);
            });
            self.handle(Event::Gone(agent, BTreeSet::new()));
        }
    }

    fn publish(&mut self, name: &str) {
        let (Some(agent), None) = (self.machine.serving(), self.machine.state(name)) else { return };
        self.handle(Event::Publishing(name.into(), agent));
        self.readers.insert(name.into(), [agent].into());
        self.handle(Event::Published(name.into()));
    }

    /// One of what was told is done, or refused if it can be.
    fn act(&mut self, which: usize, refuse: bool) {
        if self.told.is_empty() {
            return;
        }
        let told = self.told.swap_remove(which % self.told.len());
        let mut lets_go = |volume: &Name, agent| {
            if let Some(readers) = self.readers.get_mut(volume) {
                readers.remove(&agent);
            }
        };
        match told {
            Action::Adopt(_, agent, _) | Action::Drain(_, agent) if !self.alive.contains(&agent) => {}
            Action::Adopt(volume, agent, _) if refuse => {
                lets_go(&volume, agent);
                self.handle(Event::Refused(volume, agent));
            }
            Action::Adopt(volume, agent, _) => self.handle(Event::Adopted(volume, agent)),
            Action::Drain(volume, agent) => {
                lets_go(&volume, agent);
                self.handle(Event::Drained(volume, agent));
            }
            Action::Gap => self.look(),
            Action::Kill(_) => unreachable!("done at once"),
        }
    }

    fn look(&mut self) {
        let all =
            |wanted| self.machine.states().filter(move |(_, s)| *s == wanted).map(|(name, _)| name.clone());
        self.answering = all(State::Failing).collect();
        for quiet in all(State::Hushing).collect::<Vec<_>>() {
            self.handle(Event::Quiet(quiet));
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.alive.clone().into_iter().for_each(|agent| self.handle(Event::Answered(agent)));
        self.handle(Event::Tick);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Attach,
    Die(usize),
    Leave(usize),
    Hang(usize),
    Publish(u8),
    Unpublish(u8),
    Act(usize, bool),
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => Just(Step::Attach),
        1 => (0_usize..4).prop_map(Step::Die),
        1 => (0_usize..4).prop_map(Step::Leave),
        1 => (0_usize..4).prop_map(Step::Hang),
        6 => (0_u8..100).prop_map(Step::Publish),
        1 => (0_u8..100).prop_map(Step::Unpublish),
        8 => (0_usize..1000, prop::bool::weighted(0.2)).prop_map(|(which, refuse)| Step::Act(which, refuse)),
        2 => (0_u64..20).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_reader_at_a_time_and_in_the_end_all_are_with_the_last_agent(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            let agent = |which: usize| world.alive.iter().nth(which).copied();
            match step {
                Step::Attach if world.alive.len() < MOST_AGENTS => { world.attach(); }
                Step::Attach => {}
                Step::Die(which) => { if let Some(agent) = agent(which) { world.die(agent) } }
                Step::Leave(which) => { if let Some(agent) = agent(which) { world.handle(Event::Left(agent)) } }
                Step::Hang(which) => { if let Some(agent) = agent(which) { world.handle(Event::Stuck(agent)) } }
                Step::Publish(name) => world.publish(&format!("v{name}")),
                Step::Unpublish(name) => {
                    let name: Name = format!("v{name}").into();
                    world.readers.remove(&name);
                    world.told.retain(|told| !matches!(told, Action::Adopt(v, ..) | Action::Drain(v, _) if *v == name));
                    world.handle(Event::Forgotten(name));
                    world.look();
                }
                Step::Act(which, refuse) => world.act(which, refuse),
                Step::Pass(seconds) => world.pass(Duration::from_secs(seconds)),
            }
        }
        // Whoever has no connection ends, one agent is there, and everybody does as told.
        for agent in world.alive.clone() {
            if world.machine.agents[&agent].standing == Standing::Leaving { world.die(agent) }
        }
        if world.alive.is_empty() { world.attach(); }
        for _ in 0..40 {
            while !world.told.is_empty() { world.act(0, false) }
            world.pass(Duration::from_secs(2));
        }
        let last = world.machine.serving().unwrap();
        for (name, state) in world.machine.states() {
            prop_assert_eq!(state, State::Served(last), "{}", name);
            prop_assert_eq!(&world.readers[name], &BTreeSet::from([last]));
        }
        prop_assert!(world.machine.is_safe());
        prop_assert!(world.machine.agents.len() <= MOST_AGENTS + MOST_GONE);
    }
}

/// What an agent that dies now leaves to the next one.
fn next_agent(world: &mut World, last: u64) -> u64 {
    world.told.clear();
    world.die(last);
    world.attach()
}

fn adopt(volume: &str, agent: u64, attempts: u32) -> Action {
    Action::Adopt(volume.into(), agent, attempts)
}

#[test]
fn volumes_that_an_agent_died_over_are_adopted_alone_and_distrusted_only_if_another_dies_over_one() {
    let mut world = World::new();
    let first = world.attach();
    ["a", "b", "c"].iter().for_each(|volume| world.publish(volume));
    let second = next_agent(&mut world, first);
    assert_eq!(world.told, [adopt("a", second, 0), adopt("b", second, 0), adopt("c", second, 0)]);
    world.act(0, false);
    let third = next_agent(&mut world, second);
    assert_eq!(world.told, [adopt("a", third, 0)], "the innocent first");
    world.act(0, false);
    assert_eq!(world.told, [adopt("b", third, 0)], "and then one at a time, trusted");
    let fourth = next_agent(&mut world, third);
    world.act(0, false);
    assert_eq!(world.told, [adopt("c", fourth, 0)], "the one with fewer deaths");
    world.act(0, false);
    assert_eq!(world.told, [adopt("b", fourth, 1)], "alone when an agent died: not trusted");
    world.act(0, false);
    let fifth = next_agent(&mut world, fourth);
    assert_eq!(
        world.told,
        [adopt("a", fifth, 0), adopt("b", fifth, 0), adopt("c", fifth, 0)],
        "an adoption that worked is forgiven"
    );
}

#[test]
fn a_volume_that_kills_every_agent_does_not_keep_the_others_from_their_readers() {
    let mut world = World::new();
    let mut agent = world.attach();
    ["a", "b", "killer", "z"].iter().for_each(|volume| world.publish(volume));
    for round in 0..5 {
        agent = next_agent(&mut world, agent);
        let kills = |told: &Action| matches!(told, Action::Adopt(volume, ..) if &**volume == "killer");
        while let Some(other) = world.told.iter().position(|told| !kills(told)) {
            world.act(other, false);
        }
        assert_eq!(world.told, [adopt("killer", agent, u32::saturating_sub(round, 1))]);
        let served = |volume| world.machine.state(volume) == Some(State::Served(agent));
        assert!(["a", "b", "z"].into_iter().all(served));
    }
}

#[test]
fn after_the_gap_deadline_readers_get_an_error_until_an_agent_comes_and_only_then_it_is_adopted() {
    let mut world = World::new();
    let first = world.attach();
    world.publish("a");
    world.die(first);
    world.pass(GAP.saturating_sub(Duration::from_secs(1)));
    assert_eq!(world.machine.state("a"), Some(State::Waiting));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.machine.state("a"), Some(State::Failing));
    assert_eq!(world.told, [Action::Gap]);
    world.act(0, false);
    let second = world.attach();
    assert_eq!(world.machine.state("a"), Some(State::Hushing));
    assert_eq!(world.told, [Action::Gap], "not adopted while somebody still answers");
    world.act(0, false);
    assert_eq!(world.told, [Action::Adopt("a".into(), second, 0)]);
}

#[test]
fn a_newer_agent_gets_a_volume_only_when_the_older_one_has_let_go() {
    let mut world = World::new();
    let first = world.attach();
    (0..20).for_each(|n| world.publish(&format!("v{n:02}")));
    let second = world.attach();
    assert_eq!(world.told.len(), MOST_MOVING);
    assert!(world.told.iter().all(|told| matches!(told, Action::Drain(_, agent) if *agent == first)));
    world.act(0, false);
    assert_eq!(
        world
            .told
            .iter()
            .filter(|told| matches!(told, Action::Adopt(_, agent, 0) if *agent == second))
            .count(),
        1
    );
    while !world.told.is_empty() {
        world.act(0, false);
    }
    assert!(world.machine.states().all(|(_, state)| state == State::Served(second)));
    world.die(second);
    assert!(
        world.told.iter().all(|told| matches!(told, Action::Adopt(_, agent, 0) if *agent == first)),
        "the standby"
    );
    assert_eq!(world.told.len(), 20);
}

#[test]
fn a_silent_agent_is_killed_and_said_to_have_hung_whatever_its_supervisor_says() {
    let mut world = World::new();
    let first = world.attach();
    world.publish("a");
    let second = world.attach();
    world.now += SILENCE;
    world.handle(Event::Answered(second));
    world.handle(Event::Ended(1001, "killed by signal 9".to_owned()));
    world.handle(Event::Tick);
    assert!(!world.alive.contains(&first) && world.alive.contains(&second));
    let states: Vec<String> = world.machine.statuses().into_iter().map(|agent| agent.state).collect();
    assert_eq!(states, ["hung and was killed", "serving"]);
    world.die(second);
    world.handle(Event::Ended(1002, "killed by signal 9".to_owned()));
    assert_eq!(world.machine.statuses()[1].state, "killed by signal 9");
}

#[test]
fn a_refused_adoption_is_asked_for_again_later_and_fails_readers_meanwhile() {
    let mut world = World::new();
    let first = world.attach();
    world.publish("a");
    world.die(first);
    world.attach();
    let mut failed = false;
    for _ in 0..120 {
        while !world.told.is_empty() {
            world.act(0, true);
        }
        failed |= world.machine.state("a") == Some(State::Failing);
        world.pass(Duration::from_secs(1));
    }
    assert!(failed, "a volume that no agent takes must not hang its readers");
    for _ in 0..60 {
        while !world.told.is_empty() {
            world.act(0, false);
        }
        world.pass(Duration::from_secs(1));
    }
    assert_eq!(world.machine.state("a"), Some(State::Served(2)));
}

#[test]
fn urgent_volumes_are_given_away_first() {
    let mut world = World::new();
    world.attach();
    (0..100).for_each(|n| world.publish(&format!("v{n:02}")));
    world.alive.clear();
    world.readers.clear();
    world.handle(Event::Gone(1, ["v99".into()].into()));
    world.alive.insert(2);
    world.handle(Event::Attached(2, about(2), ["v98".into()].into()));
    assert_eq!(world.told[0], Action::Adopt("v98".into(), 2, 0));
    assert_eq!(world.told.len(), MOST_ADOPTING);
}

#[test]
fn one_process_is_one_agent_and_there_are_four_at_most() {
    let mut world = World::new();
    let first = world.attach();
    assert!(!world.machine.admits(1) && world.machine.admits(9));
    (1..MOST_AGENTS).for_each(|_| {
        world.attach();
    });
    assert!(!world.machine.admits(9));
    world.die(first);
    assert!(world.machine.admits(9) && world.machine.admits(1));
}
