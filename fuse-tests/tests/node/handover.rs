//! Agents beside agents: the newest serves, older ones stand by.

use rustix::process::Signal;

use crate::stage::{Stage, assert_aborted, assert_unharmed};

const VOLUMES: usize = 8;

fn hand_over(handover: &str) {
    let Some(mut stage) = Stage::new(&["--handover", handover], VOLUMES, "1h") else { return };
    let older = stage.settled();
    let readers = stage.readers();
    readers.go_on();
    stage.node.start_agent(&[]);
    let newer = stage.succeeded(&older);
    readers.go_on();
    let (_, agents) = stage.node.observe();
    let standby = agents.iter().find(|agent| agent.agent == older.agent).unwrap();
    assert_eq!((standby.state.as_str(), standby.pid), ("standby", older.pid));
    assert_unharmed(&readers.report(&format!("planned hand-over, {handover}")));

    let readers = stage.readers();
    readers.go_on();
    stage.node.agents().remove(1).process.kill();
    assert_eq!(stage.succeeded(&newer).agent, older.agent, "the standby takes over");
    readers.go_on();
    let seen = readers.report(&format!("the newer agent killed, {handover}"));
    if handover == "clone" {
        assert_aborted(seen, 1)
    } else {
        assert_unharmed(&seen)
    }

    let readers = stage.readers();
    readers.go_on();
    stage.node.start_agent(&[]);
    let newer = stage.succeeded(&older);
    readers.go_on();
    let ended = stage.node.agents().remove(1).process.stop();
    assert!(ended.success(), "{ended}");
    assert_eq!(stage.succeeded(&newer).agent, older.agent);
    readers.go_on();
    assert_unharmed(&readers.report(&format!("the newer agent told to leave, {handover}")));
}

#[test]
fn no_read_fails_in_a_planned_hand_over_and_the_older_agent_stands_by() {
    hand_over("resend");
}

#[test]
fn no_read_fails_in_a_planned_hand_over_where_nothing_is_sent_again() {
    hand_over("clone");
}

/// There is one version of the programs, so the newer agent is the same program; that an older and a newer one read each other's state
/// is shown by recorded bytes with unknown fields, in the tests of record and snapshot.
#[test]
fn an_upgrade_and_its_rollback_need_no_store() {
    let Some(mut stage) = Stage::new(&["--handover", "resend"], VOLUMES, "1h") else { return };
    let mut serving = stage.settled();
    stage.node.cluster.store.stop();
    let readers = stage.readers();
    for step in ["upgrade", "rollback"] {
        readers.go_on();
        stage.node.start_agent(&[]);
        serving = stage.succeeded(&serving);
        readers.go_on();
        let ended = stage.node.agents().remove(0).process.stop();
        assert!(ended.success(), "{step}: {ended}");
        assert_eq!(stage.settled().agent, serving.agent, "{step}");
    }
    readers.go_on();
    assert_unharmed(&readers.report("upgrade and rollback without a store, resend"));
    // The one that was rolled back to is alone, and no other state is left than the shim's.
    stage.node.agents()[0].process.signal(Signal::KILL);
    stage.node.agents().clear();
    stage.node.start_agent(&[]);
    stage.succeeded(&serving);
    assert_eq!(stage.versions(), [Ok(1); VOLUMES]);
}
