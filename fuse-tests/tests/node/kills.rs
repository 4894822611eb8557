//! Processes that are killed, at whatever moment, while eight readers judge every value.

use std::time::Duration;

use fuse_tests::node::kill;
use fuse_tests::readers::Seen;
use fuse_tests::wait::{pause, until};
use rustix::process::Signal;

use crate::stage::{PATIENCE, Stage, assert_aborted, assert_unharmed};

/// A worker that lived shorter is not replaced at once.
const LIFE: Duration = Duration::from_millis(1_050);
const VOLUMES: usize = 4;

/// How often a worker is killed.
fn kills() -> u64 {
    std::env::var("FUSE_SECRETS_TEST_KILLS").map_or(20, |number| number.parse().unwrap())
}

fn kill_workers(handover: &str) -> Option<Seen> {
    let stage = Stage::new(&["--handover", handover], VOLUMES, "1h")?;
    let mut agent = stage.settled();
    let readers = stage.readers();
    for round in 0..kills() {
        readers.go_on();
        // At another moment of a read each time.
        pause(LIFE + Duration::from_micros(round * 370));
        kill(agent.pid, Signal::KILL);
        agent = stage.succeeded(&agent);
    }
    readers.go_on();
    let (volumes, agents) = stage.node.observe();
    assert!(agents.iter().any(|agent| agent.state == "killed by signal 9"), "{agents:?}");
    assert_eq!(volumes.len(), VOLUMES);
    Some(readers.report(&format!("{} workers killed, {handover}", kills())))
}

#[test]
fn no_read_fails_when_workers_are_killed_and_requests_are_sent_again() {
    if let Some(seen) = kill_workers("resend") {
        assert_unharmed(&seen);
    }
}

#[test]
fn workers_that_are_killed_fail_what_they_had_in_flight_and_nothing_else_where_nothing_is_sent_again() {
    if let Some(seen) = kill_workers("clone") {
        assert_aborted(seen, kills());
    }
}

#[test]
fn no_read_fails_when_a_supervisor_or_a_whole_container_is_killed() {
    let Some(mut stage) = Stage::new(&["--handover", "resend"], VOLUMES, "1h") else { return };
    let agent = stage.settled();
    let readers = stage.readers();
    readers.go_on();
    // Its worker goes with it.
    stage.node.agents()[0].process.kill();
    stage.node.start_agent(&[]);
    let agent = stage.succeeded(&agent);
    readers.go_on();
    let supervisor = stage.node.agents()[1].process.pid();
    [agent.pid, supervisor].into_iter().for_each(|pid| kill(pid, Signal::KILL));
    stage.node.agents()[1].process.kill();
    stage.node.start_agent(&[]);
    stage.succeeded(&agent);
    readers.go_on();
    assert_unharmed(&readers.report("a supervisor and a container killed, resend"));
}

fn kill_shims(handover: &str) -> Option<(Stage, Seen)> {
    let arguments = ["--handover", handover];
    let mut stage = Stage::new(&arguments, VOLUMES, "1h")?;
    stage.settled();
    let readers = stage.readers();
    for _ in 0..2 {
        readers.go_on();
        stage.node.restart_shim(&arguments);
        stage.settled();
        readers.go_on();
    }
    let seen = readers.report(&format!("2 shims killed, {handover}"));
    assert_unharmed(&seen);
    let agent = stage.settled();
    let readers = stage.readers();
    readers.go_on();
    kill(agent.pid, Signal::KILL);
    stage.succeeded(&agent);
    readers.go_on();
    let seen = readers.report(&format!("a worker killed after 2 shims, {handover}"));
    Some((stage, seen))
}

#[test]
fn no_read_fails_when_shims_are_killed_and_their_successors_get_everything_again() {
    if let Some((_stage, seen)) = kill_shims("resend") {
        assert_unharmed(&seen);
    }
}

#[test]
fn no_read_fails_when_shims_are_killed_where_nothing_is_sent_again() {
    if let Some((_stage, seen)) = kill_shims("clone") {
        assert_aborted(seen, 1);
    }
}

#[test]
fn a_worker_that_hangs_is_killed_and_its_readers_go_on() {
    let Some(stage) = Stage::new(&["--handover", "resend"], VOLUMES, "1h") else { return };
    let hung = stage.settled();
    let readers = stage.readers();
    readers.go_on();
    kill(hung.pid, Signal::STOP);
    stage.succeeded(&hung);
    readers.go_on();
    let how = until("how it ended", PATIENCE, || {
        let (_, agents) = stage.node.observe();
        agents.into_iter().find(|agent| agent.agent == hung.agent && agent.pid == 0).map(|agent| agent.state)
    });
    assert_eq!(how, "hung and was killed");
    assert_unharmed(&readers.report("a worker stopped, resend"));
}
