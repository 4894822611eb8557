//! What root asks the shim: `mounts --from-shim` and `abort`. They work when no agent runs, and touch no mount.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::link::Link;
use fuse_secrets_csi::wire::message::{Abort, AgentStatus, Role, VolumeStatus, Volumes};

use super::exit;
use super::mounts::Output;
use super::table::{COLUMNS, Table, ago, shorten};
use crate::config::agent::NODE_SOCKET;
use crate::node::attach;

/// Unmounting may take a while.
const PATIENCE: Duration = Duration::from_secs(15);
/// Of 80 columns, a pod's name and a volume's get so many.
const POD_COLUMNS: usize = 20;
const VOLUME_COLUMNS: usize = 14;
const STATE_COLUMNS: usize = 26;

/// Ends `abort`'s long help.
pub const HELP: &str = "\
For a volume that nothing else ends: no agent comes back, or the pod hangs. Needs root. Its readers get an error, and its \
mount is dead until kubelet's next publish makes it work again, also in containers that run.

Examples:
      fuse-secrets mounts --from-shim
      fuse-secrets abort csi-0a1b2c";

/// Where the shim is asked.
#[derive(Args)]
pub struct Shim {
    /// The shim's node socket
    #[arg(long, env = "FUSE_SECRETS_NODE_SOCKET", value_name = "PATH", default_value = NODE_SOCKET)]
    node_socket: PathBuf,
}

/// Prints what the shim keeps.
pub(super) async fn list(shim: &Shim, output: Output) -> ExitCode {
    match ask(shim, &Message::Volumes(Volumes::default())).await {
        Ok(Message::Volumes(kept)) => {
            exit::printed(print(&mut io::stdout().lock(), &kept, output, SystemTime::now()), exit::OK)
        }
        answer => failed(answer),
    }
}

/// Ends a volume.
pub(super) async fn abort(shim: &Shim, volume: String) -> ExitCode {
    match ask(shim, &Message::Abort(Abort { volume })).await {
        Ok(Message::Done(_)) => ExitCode::from(exit::OK),
        answer => failed(answer),
    }
}

async fn ask(shim: &Shim, question: &Message) -> Result<Message, String> {
    let attached = attach(&shim.node_socket, Role::Observer).await;
    let (link, _questions, _): (Link, _, _) = attached.map_err(|error| error.to_string())?;
    link.ask(question, Vec::new(), Instant::now() + PATIENCE)
        .await
        .map_err(|error| format!("the shim: {error}"))
}

fn failed(answer: Result<Message, String>) -> ExitCode {
    exit::complain(&super::text::harmless(&match answer {
        Ok(Message::Refused(refused)) => format!("the shim refused: {}", refused.text),
        Ok(Message::Unsupported(_)) => "the shim is too old for this; update it".to_owned(),
        Ok(_) => "the shim answered something else".to_owned(),
        Err(why) => why,
    }));
    ExitCode::from(exit::FAILED)
}

fn print(out: &mut impl Write, kept: &Volumes, output: Output, now: SystemTime) -> io::Result<()> {
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut *out, kept)?;
        return writeln!(out);
    }
    let wide = output == Output::Wide;
    if kept.volumes.is_empty() {
        writeln!(out, "the shim keeps no volume")?;
    } else {
        volumes(&kept.volumes, wide).print(out, if wide { usize::MAX } else { COLUMNS })?;
    }
    writeln!(out)?;
    if kept.agents.is_empty() {
        return writeln!(out, "no agent attached so far");
    }
    agents(&kept.agents, now).print(out, if wide { usize::MAX } else { COLUMNS })
}

fn volumes(volumes: &[VolumeStatus], wide: bool) -> Table {
    let mut table = Table::new(&["VOLUME", "POD", "STATE", "AGENT", "WAITING", "GEN", "TARGET"]);
    let number = |number: u64| if number == 0 { "-".to_owned() } else { number.to_string() };
    // A target differs from others at its end least: `.../volumes/kubernetes.io~csi/NAME/mount`.
    let fit = |text: &str, columns| if wide { text.to_owned() } else { shorten(text, columns) };
    for volume in volumes {
        table.row(vec![
            fit(&volume.volume, VOLUME_COLUMNS),
            fit(&volume.pod, POD_COLUMNS),
            volume.state.clone(),
            number(volume.agent),
            if volume.waiting { "yes" } else { "no" }.to_owned(),
            number(volume.generation.into()),
            volume.target.clone(),
        ]);
    }
    table
}

fn agents(agents: &[AgentStatus], now: SystemTime) -> Table {
    let mut table = Table::new(&["AGENT", "PID", "STATE", "ATTACHED", "PROGRAM"]);
    for agent in agents {
        table.row(vec![
            agent.agent.to_string(),
            if agent.pid == 0 { "-".to_owned() } else { agent.pid.to_string() },
            shorten(&agent.state, STATE_COLUMNS),
            format!("{} ago", ago(&agent.since, now)),
            agent.program.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Volumes {
        let volume = |number: u32, state: &str, agent| VolumeStatus {
            volume: format!("csi-{number:064}"),
            target: format!("/var/lib/kubelet/pods/uid-{number}/volumes/kubernetes.io~csi/secrets/mount"),
            pod: "payments/orders-database-0".to_owned(),
            state: state.to_owned(),
            agent,
            waiting: agent == 0,
            generation: 3,
            parts: 4,
        };
        let agent = |agent, pid, state: &str| AgentStatus {
            agent,
            pid,
            program: "fuse-secrets 0.1.0".to_owned(),
            state: state.to_owned(),
            since: "2026-01-01T00:00:00Z".to_owned(),
        };
        Volumes {
            volumes: vec![volume(1, "serving", 2), volume(2, "handing_over", 0)],
            agents: vec![agent(1, 0, "killed by signal 9"), agent(2, 4_321, "serving")],
        }
    }

    fn printed(kept: &Volumes, output: Output) -> String {
        let now = humantime::parse_rfc3339("2026-01-01T00:00:42Z").unwrap();
        let mut text = Vec::new();
        print(&mut text, kept, output, now).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_table_has_volumes_and_agents_and_keeps_to_80_columns() {
        let text = printed(&kept(), Output::Table);
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        for part in ["handing_over", "yes", "killed by signal 9", "42s ago", "4321"] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        let wide = printed(&kept(), Output::Wide);
        assert!(
            wide.contains(&kept().volumes[1].target) && wide.contains(&kept().volumes[0].volume),
            "{wide}"
        );
        let none = printed(&Volumes::default(), Output::Table);
        assert!(none.contains("keeps no volume") && none.contains("no agent"), "{none}");
    }

    #[test]
    fn json_has_everything() {
        let back: Volumes = serde_json::from_str(&printed(&kept(), Output::Json)).unwrap();
        assert!(back.volumes == kept().volumes && back.agents == kept().agents);
    }
}
