//! `fuse-secrets doctor`: what this node gives, and what is lost without it. Facts are gathered from the kernel; the
//! `Report` is judged from them alone, so that every verdict is tested with recorded facts.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write as _};
use std::process::ExitCode;

use fuse_secrets_csi::wire::handover;
use fuse_secrets_csi::wire::message::Handover;
use serde::{Deserialize, Serialize};

use super::text::harmless;
use super::{Print, exit};
use crate::secret::harden::Swap;
use crate::secret::pages::Backing;

mod facts;
mod table;
mod version;

use facts::{Facts, Fusermount};
use version::Version;

/// Ends the command's long help.
pub const HELP: &str = "\
Judged for whoever asks: run it as the user who will mount. Exit codes: 0 all is there or only less than it could be (note), \
1 something is lost that matters (LOST).

Examples:
      fuse-secrets doctor
      fuse-secrets doctor -o json | jq '.checks[] | select(.verdict != \"good\")'";

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Something is less than it could be; nothing that was promised is lost.
    Note,
    /// Something is lost that matters.
    Lost,
}

/// One line of the report.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub check: Cow<'static, str>,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What is lost, and the remedy; empty where nothing is.
    pub remedy: String,
}

/// All checks, in the order in which a mount needs them.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The lines.
    pub checks: Vec<Check>,
}

/// Arguments of `doctor`.
#[derive(clap::Args)]
#[command(after_long_help = HELP)]
pub struct Options {
    /// Judge for the agent with this process number: it mounts nothing itself, and its limits count
    #[arg(long, value_name = "PID")]
    agent_pid: Option<u32>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Print,
}

/// Runs the command.
pub(super) fn run(options: &Options) -> ExitCode {
    let report = report(options.agent_pid);
    let text = match options.output {
        Print::Table => report.to_string(),
        Print::Json => format!("{:#}\n", serde_json::json!(report)),
    };
    exit::printed(io::stdout().lock().write_all(text.as_bytes()), report.exit_code())
}

/// Looks at this node: for this process, or for the agent with this process number.
#[must_use]
pub fn report(agent: Option<u32>) -> Report {
    Facts::gather(agent).judge()
}

impl Report {
    /// Exit code of the command: 0 all is there, 1 something is lost that matters.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        u8::from(self.checks.iter().any(|check| check.verdict == Verdict::Lost))
    }
}

/// A table at 80 columns.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table::row(f, ["CHECK", "", "FOUND", "WHAT IS LOST, AND THE REMEDY"])?;
        self.checks.iter().try_for_each(|check| check.fmt(f))
    }
}

/// Its row.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Good => "good",
            Verdict::Note => "note",
            Verdict::Lost => "LOST",
        };
        // Of other nodes it is what others wrote.
        let [check, found, remedy] = [&*self.check, &self.found, &self.remedy].map(harmless);
        table::row(f, [&check, verdict, &found, &remedy])
    }
}

impl Facts {
    fn judge(&self) -> Report {
        let mounting = [self.fuse(), self.mounting(), self.other_users()];
        let serving = [
            self.secret_memory(),
            self.locked_memory(),
            self.swap(),
            self.hand_over(),
            self.request_timeout(),
        ];
        // The shim mounts for an agent.
        let mounting = mounting.into_iter().filter(|_| !self.agent);
        Report { checks: std::iter::once(self.kernel()).chain(mounting).chain(serving).collect() }
    }

    fn kernel(&self) -> Check {
        let check = Check::of("kernel", &self.release);
        match Version::parse(&self.release) {
            None => check
                .lost("the version cannot be read; 5.10 is the oldest that is served, 6.1 gives everything"),
            Some(version) if version < Version(5, 10, 0) => {
                check.lost("too old to mount; 5.10 or newer is needed")
            }
            Some(version) if version < Version(5, 14, 0) => {
                check.note("memfd_secret(2) comes with 5.14; 6.1 or newer gives everything")
            }
            Some(version) if version < Version(6, 1, 0) => check.note("6.1 or newer gives everything"),
            Some(_) => check,
        }
    }

    fn fuse(&self) -> Check {
        match &self.fuse_device {
            Ok(()) => Check::of("FUSE", "/dev/fuse opens"),
            Err(error) => {
                let remedy = match error.kind() {
                    io::ErrorKind::NotFound => "nothing can be mounted: load the module (modprobe fuse)",
                    io::ErrorKind::PermissionDenied => {
                        "nothing can be mounted: /dev/fuse must be readable and writable for this user, and allowed \
                         in the container's devices"
                    }
                    _ => "nothing can be mounted: is the module loaded (modprobe fuse)?",
                };
                Check::of("FUSE", format!("/dev/fuse: {}", error.kind())).lost(remedy)
            }
        }
    }

    fn mounting(&self) -> Check {
        match &self.fusermount {
            _ if self.root => Check::of("mounting", "as root, without fusermount3"),
            Some(Fusermount { path, setuid: true }) => Check::of("mounting", path.display().to_string()),
            Some(Fusermount { path, setuid: false }) => {
                Check::of("mounting", format!("{} is not setuid", path.display())).lost(
                    "an ordinary user cannot mount: install the package fuse3 as your distribution ships it",
                )
            }
            None => Check::of("mounting", "no fusermount3 in PATH")
                .lost("an ordinary user cannot mount: install the package fuse3, or run as root"),
        }
    }

    fn other_users(&self) -> Check {
        let allowed = self.fuse_conf.lines().any(|line| line.trim() == "user_allow_other");
        match (self.root, allowed) {
            (true, _) => Check::of("other users", "may read, as root mounts"),
            (false, true) => Check::of("other users", "may read, by /etc/fuse.conf"),
            (false, false) => Check::of("other users", "may not read")
                .note("only you see the files of your mounts: put user_allow_other into /etc/fuse.conf"),
        }
    }

    fn secret_memory(&self) -> Check {
        let check = |found: &str| Check::of("secret memory", found);
        match &self.backing {
            Ok(Backing::Secret) => check("memfd_secret(2) works"),
            Ok(Backing::Locked) => {
                let (found, remedy) = if self.knows_secret_memory {
                    ("memfd_secret(2) is switched off", "boot with secretmem.enable=1")
                } else {
                    ("no memfd_secret(2)", "use a kernel with it (5.14, on by default from 6.5)")
                };
                check(found).lost(format!(
                    "secrets rest in locked memory, which root and the kernel can read; {remedy}"
                ))
            }
            Err(error) => check("none to be had").lost(error.clone()),
        }
    }

    fn locked_memory(&self) -> Check {
        /// Below this a few dozen volumes fill it: the kernel's own default since 5.16.
        const ENOUGH: u64 = 8 << 20;
        let locked = match &self.locked {
            Ok(locked) => locked,
            Err(error) => {
                return Check::of("locked memory", "unknown").lost(format!("/proc cannot be read: {error}"));
            }
        };
        let size = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), bytes);
        let found = format!(
            "{} (hard {}), {} in use{}",
            size(locked.soft),
            size(locked.hard),
            bytes(locked.held),
            if locked.exempt { ", exempt by CAP_IPC_LOCK" } else { "" }
        );
        let check = Check::of("locked memory", found);
        match (locked.exempt, locked.hard) {
            (false, Some(hard)) if hard < ENOUGH => check.note(
                "few volumes fit, others are refused: raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=) to 8 MiB or more",
            ),
            _ => check,
        }
    }

    fn swap(&self) -> Check {
        let lockable = self.locked.as_ref().is_ok_and(|locked| locked.exempt || locked.hard.is_none());
        match &self.swap {
            Ok(Swap::Off) => Check::of("swap", "off"),
            Ok(Swap::On) if lockable => Check::of("swap", "on; the whole process is locked"),
            Ok(Swap::On) => Check::of("swap", "on").lost(
                "secrets in use (buffers, connections) may reach the disk: turn swap off, set memory.swap.max=0, or \
                 lift RLIMIT_MEMLOCK",
            ),
            Err(error) => Check::of("swap", "unknown").lost(format!("/proc cannot be read: {error}")),
        }
    }

    fn hand_over(&self) -> Check {
        if handover::suits(&self.release) == Handover::Resend {
            return Check::of("hand-over", "RESEND: no read fails");
        }
        Check::of("hand-over", "clone").note(
            "if the agent is killed, reads in flight at that moment fail: RESEND is safe from 6.12.96, 6.18.39, 7.1.4 on",
        )
    }

    fn request_timeout(&self) -> Check {
        let [default, max] = self.request_timeouts;
        if (default, max) == (0, 0) {
            return Check::of("request timeout", "none");
        }
        Check::of("request timeout", format!("default {default} s, max {max} s")).lost(
            "a store or an agent that is away for that long kills the mounts: set fs.fuse.default_request_timeout and \
             fs.fuse.max_request_timeout to 0",
        )
    }
}

impl Check {
    pub(super) fn of(check: impl Into<Cow<'static, str>>, found: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Good, found: found.into(), remedy: String::new() }
    }

    pub(super) fn note(self, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Note, remedy: remedy.into(), ..self }
    }

    pub(super) fn lost(self, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Lost, remedy: remedy.into(), ..self }
    }
}

/// A size for people, in the largest unit that it reaches.
fn bytes(size: u64) -> String {
    match size {
        0x10_0000.. => format!("{} MiB", size >> 20),
        0x400.. => format!("{} KiB", size >> 10),
        _ => format!("{size} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::locked::Locked;

    /// A node with everything, as an ordinary user of it sees it.
    fn facts() -> Facts {
        Facts {
            agent: false,
            release: "6.18.44-1-generic".to_owned(),
            root: false,
            fuse_device: Ok(()),
            fusermount: Some(Fusermount { path: "/usr/bin/fusermount3".into(), setuid: true }),
            fuse_conf: "# user_allow_other\nuser_allow_other\n".to_owned(),
            backing: Ok(Backing::Secret),
            knows_secret_memory: true,
            locked: Ok(Locked { soft: Some(8 << 20), hard: Some(8 << 20), held: 0, exempt: false }),
            swap: Ok(Swap::Off),
            request_timeouts: [0, 0],
        }
    }

    fn verdict(facts: &Facts, check: &str) -> (Verdict, String) {
        let report = facts.judge();
        let line = report.checks.into_iter().find(|line| line.check == check).unwrap();
        (line.verdict, format!("{}: {}", line.found, line.remedy))
    }

    #[test]
    fn a_node_with_everything_exits_0_and_names_no_remedy() {
        let report = facts().judge();
        assert_eq!(report.exit_code(), 0);
        assert!(report.checks.iter().all(|line| line.verdict == Verdict::Good && line.remedy.is_empty()));
    }

    #[test]
    fn each_thing_that_is_missing_is_lost_with_its_remedy() {
        let node = |change: fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            facts
        };
        for (facts, check, remedy) in [
            (node(|f| f.release = "5.4.0-216".to_owned()), "kernel", "5.10"),
            (node(|f| f.release = "unknown".to_owned()), "kernel", "cannot be read"),
            (node(|f| f.fuse_device = Err(io::ErrorKind::NotFound.into())), "FUSE", "modprobe fuse"),
            (node(|f| f.fuse_device = Err(io::ErrorKind::PermissionDenied.into())), "FUSE", "writable"),
            (node(|f| f.fusermount = None), "mounting", "fuse3"),
            (
                node(|f| f.fusermount = Some(Fusermount { path: "/f".into(), setuid: false })),
                "mounting",
                "setuid",
            ),
            (node(|f| f.backing = Ok(Backing::Locked)), "secret memory", "secretmem.enable=1"),
            (
                node(|f| (f.backing, f.knows_secret_memory) = (Ok(Backing::Locked), false)),
                "secret memory",
                "5.14",
            ),
            (node(|f| f.backing = Err("RLIMIT_MEMLOCK".to_owned())), "secret memory", "RLIMIT_MEMLOCK"),
            (node(|f| f.swap = Ok(Swap::On)), "swap", "memory.swap.max=0"),
            (node(|f| f.request_timeouts = [0, 60]), "request timeout", "max 60 s"),
        ] {
            let (verdict, text) = verdict(&facts, check);
            assert_eq!(verdict, Verdict::Lost, "{check}: {text}");
            assert!(text.contains(remedy), "{check}: {text}");
            assert_eq!(facts.judge().exit_code(), 1);
        }
    }

    #[test]
    fn what_is_only_less_is_noted_and_exits_0() {
        let node = |change: fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            facts
        };
        for (facts, check) in [
            (node(|f| f.release = "5.15.0".to_owned()), "kernel"),
            (node(|f| f.release = "6.8.0-31-generic".to_owned()), "hand-over"),
            (node(|f| f.fuse_conf = "#user_allow_other\n".to_owned()), "other users"),
            (
                node(|f| {
                    f.locked = Ok(Locked { soft: Some(65_536), hard: Some(65_536), held: 0, exempt: false });
                }),
                "locked memory",
            ),
        ] {
            assert_eq!(verdict(&facts, check).0, Verdict::Note, "{check}");
            assert_eq!(facts.judge().exit_code(), 0);
        }
    }

    #[test]
    fn an_agent_is_not_judged_by_what_only_who_mounts_needs() {
        let mut facts = facts();
        facts.agent = true;
        (facts.fuse_device, facts.fusermount) = (Err(io::ErrorKind::NotFound.into()), None);
        let report = facts.judge();
        assert_eq!(report.exit_code(), 0, "{report}");
        assert_eq!(report.checks.len(), 6);
    }

    #[test]
    fn swap_is_no_loss_where_the_whole_process_can_be_locked() {
        let mut facts = facts();
        facts.swap = Ok(Swap::On);
        facts.locked = Ok(Locked { soft: Some(65_536), hard: Some(65_536), held: 0, exempt: true });
        assert_eq!(verdict(&facts, "swap").0, Verdict::Good);
    }

    #[test]
    fn the_table_keeps_to_80_columns_and_json_has_every_check() {
        let mut facts = facts();
        facts.backing = Ok(Backing::Locked);
        facts.request_timeouts = [30, 60];
        facts.swap = Ok(Swap::On);
        let report = facts.judge();
        let text = report.to_string();
        assert!(text.lines().all(|line| line.chars().count() <= 80 && line == line.trim_end()), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["checks"].as_array().unwrap().len(), report.checks.len());
        assert_eq!(json["checks"][4]["verdict"], "lost");
    }

    #[test]
    fn this_node_can_be_looked_at() {
        let report = report(None);
        println!("{report}");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(report.checks[0].found, release.trim());
    }
}
