//! The test run: steps in order, each with a headline and its time; at the end what failed, what could not run and why,
//! and the sum over all test binaries.

use std::process::ExitCode;
use std::time::Instant;

use clap::ValueEnum;

use crate::command::{self, Error};
use crate::images::{self, Architecture};
use crate::{kubernetes, sanity, setup, tools, vault};

/// Runs everything that CI runs
///
/// The last line is the sum over all test binaries: `N passed, N failed, N skipped`. A step that fails without a failed
/// test counts as one. What cannot run on this machine is listed with the reason, and is a failure if CI=true.
///
/// Optional, and never a failure when not asked for: OpenBao, with FUSE_SECRETS_TEST_BAO naming its binary.
///
/// A Vault server is built once into target/tools; FUSE_SECRETS_TEST_VAULT names another binary to use instead. So are csi-sanity,
/// a program that calls the shim as kubelet does, and the programs of a Kubernetes cluster of one node.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this step; may be given several times
    #[arg(long, value_name = "STEP")]
    only: Vec<Step>,
}

/// The steps, in their order.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Step {
    /// Source is formatted
    Fmt,
    /// No warning, also without the embedded store
    Clippy,
    /// Comments for rustdoc name only what exists
    Doc,
    /// Licenses, sources and banned crates
    Deny,
    /// Tests that need neither a kernel mount nor a server
    Unit,
    /// Tests against the real kernel and real servers
    Kernel,
    /// Tests on a real cluster of one node; they are also among those of `kernel`
    Cluster,
}

/// What a step came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// What the run came to.
#[derive(Default)]
struct Report {
    sum: Sum,
    failed: Vec<String>,
    cannot_run: Vec<String>,
    not_asked: Vec<String>,
}

const VAULT: &str = "FUSE_SECRETS_TEST_VAULT";
const OPENBAO: &str = "FUSE_SECRETS_TEST_BAO";
const SANITY: &str = "FUSE_SECRETS_TEST_CSI_SANITY";
const DIAL: &str = "FUSE_SECRETS_TEST_DIAL";
const KUBERNETES: &str = "FUSE_SECRETS_TEST_KUBERNETES";
const IMAGES: &str = "FUSE_SECRETS_TEST_IMAGES";

/// The command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Error> {
    let mut report = Report::default();
    let wanted = |step: Step| args.only.is_empty() || args.only.contains(&step);
    let lacking =
        |name: &str| setup::NEEDS.iter().find(|need| need.name == name).and_then(setup::Need::lacking);

    // What stays missing is told again by whatever cannot run without it.
    report.step("setup: what this machine lacks, installed where it may be", |_| {
        setup::run(&setup::Args { check: false }).map(drop)
    });
    if wanted(Step::Fmt) {
        report.step("fmt: source is formatted", |_| {
            command::run(command::cargo().args(["fmt", "--all", "--check"]))
        });
    }
    if wanted(Step::Clippy) {
        report.step("clippy: no warnings", |_| {
            let clippy = |which: &[&str]| {
                let mut cargo = command::cargo();
                cargo.arg("clippy").args(which).args(["--all-targets", "--", "-D", "warnings"]);
                command::run(&mut cargo)
            };
            clippy(&["--workspace"])?;
            clippy(&["--package", "fuse-secrets", "--no-default-features"])
        });
    }
    if wanted(Step::Doc) {
        report.step("doc: no broken link", |_| {
            let mut cargo = command::cargo();
            cargo.args(["doc", "--no-deps", "--workspace", "--document-private-items"]);
            command::run(cargo.env("RUSTDOCFLAGS", "-D warnings"))
        });
    }
    if wanted(Step::Deny) {
        report.step("deny: licenses, sources, banned crates", |_| {
            let deny = tools::cargo_deny()?;
            let mut deny = std::process::Command::new(deny);
            deny.current_dir(tools::root()).args(["--all-features", "check", "--hide-inclusion-graph"]);
            command::run(deny.args(["bans", "licenses", "sources"]))
        });
    }
    if !wanted(Step::Unit) && !wanted(Step::Kernel) && !wanted(Step::Cluster) {
        return Ok(report.close());
    }

    let mut kernel = wanted(Step::Kernel);
    if kernel && let Some(why) = lacking("/dev/fuse") {
        report.cannot_run.push(format!("kernel: {why}"));
        kernel = false;
    }
    if kernel && let Some(why) = lacking("fusermount3") {
        report.cannot_run.push(format!("mounts of ordinary users: {why}"));
    }
    let mut cluster = wanted(Step::Cluster) || wanted(Step::Kernel);
    if cluster && let Some(why) = setup::lacking_cluster() {
        report.cannot_run.push(format!("a cluster of one node: {why}"));
        cluster = false;
    }
    let mut server = std::env::var_os(VAULT).map(std::path::PathBuf::from);
    if (kernel || cluster) && server.is_none() {
        match lacking("Go") {
            Some(why) => report.cannot_run.push(format!("tests against Vault: {why}")),
            None => report.step("vault: a real server", |_| {
                server = Some(vault::binary()?);
                Ok(())
            }),
        }
    }
    let mut callers = None;
    if kernel {
        match lacking("Go") {
            Some(why) => report.cannot_run.push(format!("csi-sanity, kubelet's registration: {why}")),
            None => report.step("csi: programs that call the shim as Kubernetes does", |_| {
                callers = Some(sanity::programs()?);
                Ok(())
            }),
        }
    }
    let mut parts = None;
    if cluster {
        report.step(
            "kubernetes: a real cluster of one node, and the images of its pods and of the driver",
            |_| {
                let programs = kubernetes::programs()?;
                kubernetes::images()?;
                images::build(Architecture::HOST, "localhost")?;
                parts = Some(programs);
                Ok(())
            },
        );
    }
    if kernel && std::env::var_os(OPENBAO).is_none() {
        report.not_asked.push(format!("OpenBao: {OPENBAO} names no binary"));
    }

    let which: &[&str] = match (wanted(Step::Unit), kernel, cluster) {
        (true, true, _) => &["--workspace"],
        (false, true, _) => &["--package", "fuse-tests"],
        (false, false, true) => &["--package", "fuse-tests", "--test", "cluster"],
        (true, false, _) => &["--workspace", "--exclude", "fuse-tests"],
        (false, false, false) => return Ok(report.close()),
    };
    if kernel || cluster {
        // Tests start the programs of this workspace, which `cargo test` alone would not build.
        report.step("build: the programs that tests start", |_| {
            command::run(command::cargo().args(["build", "--workspace", "--all-targets"]))
        });
    }
    report.step("test: unit tests, and tests with kernel and servers where they can run", |sum| {
        let mut cargo = command::cargo();
        cargo.arg("test").args(which).arg("--no-fail-fast");
        if let Some(server) = &server {
            cargo.env(VAULT, server);
        }
        if let Some(callers) = &callers {
            cargo.env(SANITY, &callers.sanity).env(DIAL, &callers.dial);
        }
        if let Some(programs) = &parts {
            cargo.env(KUBERNETES, programs).env(IMAGES, tools::images());
        }
        let ended_well = command::watch(&mut cargo, |line| sum.add(line))?;
        if ended_well || sum.failed > 0 {
            Ok(())
        } else {
            Err("cargo test failed before any test did".into())
        }
    });
    Ok(report.close())
}

impl Report {
    /// Runs one step under its headline. A failure is kept, and the next step runs all the same.
    fn step(&mut self, headline: &str, body: impl FnOnce(&mut Sum) -> Result<(), Error>) {
        println!("\n=== {headline}");
        let start = Instant::now();
        let mut sum = Sum::default();
        let done = body(&mut sum);
        let name = headline.split(':').next().unwrap_or(headline);
        if let Err(error) = &done {
            self.failed.push(format!("{name}: {error}"));
            sum.failed += 1;
        } else if sum.failed > 0 {
            self.failed.push(format!("{name}: {} tests", sum.failed));
        }
        let word = if sum.failed == 0 { "done" } else { "FAILED" };
        println!("=== {name}: {word} in {:.1} s", start.elapsed().as_secs_f64());
        self.sum.passed += sum.passed;
        self.sum.failed += sum.failed;
        self.sum.skipped += sum.skipped;
    }

    /// Prints what is left to say.
    fn close(mut self) -> ExitCode {
        let must = std::env::var("CI").is_ok_and(|value| value == "true");
        if must {
            self.sum.failed += self.cannot_run.len() as u64;
        } else {
            self.sum.skipped += self.cannot_run.len() as u64;
        }
        println!();
        for (headline, lines) in [
            ("failed", &self.failed),
            ("could not run", &self.cannot_run),
            ("not asked for", &self.not_asked),
        ] {
            for line in lines {
                println!("{headline}: {line}");
            }
        }
        let Sum { passed, failed, skipped } = self.sum;
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

impl Sum {
    /// Adds a test binary's last line: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split(';') {
            let mut words = count.split_whitespace();
            let Some(number) = words.next().and_then(|word| word.parse::<u64>().ok()) else { continue };
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.skipped += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_test_binaries_are_summed() {
        let mut sum = Sum::default();
        sum.add(
            "test result: ok. 54 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.23s",
        );
        sum.add(
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s",
        );
        sum.add("test a_test_result ... ok");
        assert_eq!(sum, Sum { passed: 56, failed: 3, skipped: 1 });
    }

    #[test]
    fn a_step_that_fails_counts_and_does_not_stop_the_others() {
        let mut report = Report::default();
        report.step("one: x", |_| Err("broken".into()));
        report.step("two: y", |sum| {
            sum.passed += 4;
            Ok(())
        });
        assert_eq!(report.sum, Sum { passed: 4, failed: 1, skipped: 0 });
        assert_eq!(report.failed, ["one: broken"]);
    }
}
