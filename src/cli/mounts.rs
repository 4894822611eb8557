//! `fuse-secrets mounts`: what is mounted, by whichever agent of this user (for root: of any user).

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{Args, ValueEnum};

use super::exit;
use super::observe::{self, Shim};
use super::serving::locate;
use super::table::{COLUMNS, Table, ago, shorten, until};
use super::text::{columns, harmless, wrap};
use crate::agent::admin::{Question, Reply, ask_all};
use crate::agent::status::{FileStatus, MountDetail, MountStatus};
use crate::fuse::mount::points;

/// Of a narrow table's columns, the mount point gets at most so many.
const PATH_COLUMNS: usize = 34;
/// And a file's path.
const FILE_COLUMNS: usize = 24;
/// The first column of what is told of one mount.
const NAME_COLUMNS: usize = 12;

/// Arguments of `mounts`.
#[derive(Args)]
#[command(after_long_help = HELP)]
pub struct Options {
    /// Show one mount, file by file
    #[arg(value_name = "PATH", conflicts_with = "metrics")]
    path: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// Print the counters of every agent instead, in the text format of Prometheus
    #[arg(long, conflicts_with = "output")]
    metrics: bool,
    /// Ask the shim instead of the agents: what it keeps, who serves it, how the last agent ended; needs root
    #[arg(long, conflicts_with_all = ["path", "metrics"])]
    from_shim: bool,
    #[command(flatten)]
    shim: Shim,
}

const HELP: &str = "\
STATE is fresh (the store answered the last refresh), stale (it did not; the last known values are served) or gone (for \
longer than the class's stale grace; opening such a file fails). REFRESHED is when the store last answered for the secret \
that waits longest. Shown are the agents of this user; to root, those of all users.

Examples:
      fuse-secrets mounts
      fuse-secrets mounts -o wide
      fuse-secrets mounts /mnt/app
      fuse-secrets mounts --from-shim
      fuse-secrets mounts -o json | jq '.[] | select(.state != \"fresh\")'";

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// 80 columns.
    #[default]
    Table,
    /// Everything, in wide columns.
    Wide,
    /// For programs.
    Json,
}

/// Runs the command.
pub async fn run(options: Options) -> ExitCode {
    let now = SystemTime::now();
    if options.from_shim {
        return observe::list(&options.shim, options.output).await;
    }
    if options.metrics {
        let mut texts = Vec::new();
        let take = |socket: &Path, reply| {
            if let Reply::Metrics(text) = reply {
                texts.push((agent(socket), text));
            }
        };
        let code = ask(&Question::Metrics, take).await;
        return exit::printed(io::stdout().write_all(labelled(&texts).as_bytes()), code);
    }
    if let Some(path) = &options.path {
        // What cannot be looked up may still be the name of a mount.
        let full = locate(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.clone());
        let mut found = None;
        let take = |_: &Path, reply| {
            if let Reply::Mount(Some(detail)) = reply {
                found = Some(detail);
            }
        };
        let code = ask(&Question::Mount(full.display().to_string()), take).await;
        return match found {
            Some(detail) => {
                exit::printed(print_detail(&mut io::stdout().lock(), &detail, options.output, now), code)
            }
            None => {
                exit::complain(&unknown(&full, &list().await.0));
                ExitCode::from(exit::FAILED)
            }
        };
    }
    let (mounts, code) = list().await;
    let printed = print_mounts(&mut io::stdout().lock(), &mounts, options.output, columns(), now);
    // A dead mount, another user's, or that of an agent that hangs.
    let served = |point: &PathBuf| mounts.iter().any(|mount| Path::new(&mount.path) == point);
    let strange: Vec<_> = points().unwrap_or_default().into_iter().filter(|point| !served(point)).collect();
    if !strange.is_empty() {
        exit::complain(&format!("no agent that you may ask serves the {}", several(&strange)));
    }
    exit::printed(printed, code)
}

/// Asks all agents; those that do not answer are named, and make the command fail.
async fn ask(question: &Question, mut take: impl FnMut(&Path, Reply)) -> u8 {
    let mut code = exit::OK;
    for (socket, answer) in ask_all(question).await {
        let why = match answer {
            Ok(Reply::Refused(why)) => why,
            Err(error) => error.to_string(),
            Ok(reply) => {
                take(&socket, reply);
                continue;
            }
        };
        exit::complain(&harmless(&format!("an agent did not answer: {}: {why}", socket.display())));
        code = exit::FAILED;
    }
    code
}

async fn list() -> (Vec<MountStatus>, u8) {
    let mut mounts: Vec<MountStatus> = Vec::new();
    let take = |_: &Path, reply| {
        if let Reply::Mounts(more) = reply {
            mounts.extend(more);
        }
    };
    let code = ask(&Question::Mounts, take).await;
    mounts.sort_by(by_pod);
    (mounts, code)
}

/// The process number that a socket's name carries.
fn agent(socket: &Path) -> String {
    let name = socket.file_stem().unwrap_or_default().to_string_lossy();
    harmless(name.strip_prefix("agent-").unwrap_or(&name))
}

/// Mount points in a line, not too many.
fn several(points: &[PathBuf]) -> String {
    const SHOWN: usize = 5;
    let names: Vec<_> = points.iter().take(SHOWN).map(|point| point.display().to_string()).collect();
    let more = points.len().saturating_sub(SHOWN);
    let noun = if points.len() == 1 { "mount" } else { "mounts" };
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    harmless(&format!("{noun} of fuse-secrets at {}{rest}", names.join(", ")))
}

/// What to say of a path that nobody serves.
fn unknown(path: &Path, mounts: &[MountStatus]) -> String {
    let shown = path.display();
    let hint = if points().unwrap_or_default().iter().any(|point| point == path) {
        "something is mounted there, but its agent is gone, hangs, or is another user's".to_owned()
    } else if let Some(mount) = mounts.iter().find(|mount| path.starts_with(&mount.path)) {
        format!("it lies in the mount {}", mount.path)
    } else {
        let text = path.display().to_string();
        let near = |mount: &&MountStatus| {
            let (a, b) = (Path::new(&mount.path).file_name(), path.file_name());
            strsim::levenshtein(&mount.path, &text) <= 3 || a.is_some() && a == b
        };
        match mounts.iter().find(near) {
            Some(mount) => format!("did you mean {}?", mount.path),
            None => "`fuse-secrets mounts` lists what is served".to_owned(),
        }
    };
    harmless(&format!("no agent serves {shown}; {hint}"))
}

/// The counters of several agents as one text, each sample with its agent's process number.
fn labelled(texts: &[(String, String)]) -> String {
    let mut metrics: Vec<(&str, String)> = Vec::new();
    for (agent, text) in texts {
        for line in text.lines() {
            let (comment, rest) = line
                .strip_prefix("# HELP ")
                .or(line.strip_prefix("# TYPE "))
                .map_or((false, line), |rest| (true, rest));
            let Some((sample, value)) = rest.split_once(' ') else { continue };
            let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
            let at = metrics.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
                metrics.push((name, String::new()));
                metrics.len() - 1
            });
            let block = &mut metrics[at].1;
            if !comment {
                let comma = if labels == "}" { "" } else { "," };
                block.push_str(&format!("{name}{{agent=\"{agent}\"{comma}{labels} {value}\n"));
            } else if !block.contains(line) {
                block.push_str(line);
                block.push('\n');
            }
        }
    }
    metrics.into_iter().map(|(_, block)| block).collect()
}

fn print_mounts(
    out: &mut impl Write,
    mounts: &[MountStatus],
    output: Output,
    columns: usize,
    now: SystemTime,
) -> io::Result<()> {
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut *out, mounts)?;
        return writeln!(out);
    }
    if mounts.is_empty() {
        return writeln!(out, "nothing is mounted (start with: fuse-secrets dev)");
    }
    if output == Output::Wide {
        let mut table = Table::new(PODS_WIDE);
        mounts.iter().for_each(|mount| table.row(wide_row(mount, now)));
        table.print(out, usize::MAX)?;
    } else if mounts.iter().any(|mount| mount.pod.is_some()) {
        let mut table = Table::new(&["POD", "CLASS", "FILES", "GEN", "STATE", "REFRESHED", "OPENS"]);
        mounts.iter().for_each(|mount| table.row(pod_row(mount, now)));
        table.print_fitted(out, columns, &[(1, 12), (0, 8)])?;
    } else {
        let mut table = Table::new(&["PATH", "CLASS", "FILES", "GEN", "STATE", "REFRESHED", "OPENS"]);
        for mount in mounts {
            let mut row = pod_row(mount, now);
            // The end of a mount point tells more than its beginning.
            row[0] = shorten(&mount.path, PATH_COLUMNS);
            row[1] = shorten(&mount.class, 16);
            table.row(row);
        }
        table.print(out, COLUMNS)?;
    }
    if mounts.len() > 1 || mounts.iter().any(|mount| mount.state != "fresh") {
        writeln!(out, "{}", sum(mounts))?;
    }
    Ok(())
}

/// The columns of [`wide_row`].
pub(super) const PODS_WIDE: &[&str] = &[
    "PATH",
    "NAMESPACE",
    "POD",
    "ACCOUNT",
    "CLASS",
    "STORE",
    "FILES",
    "GEN",
    "STATE",
    "SINCE",
    "REFRESHED",
    "OPENS",
    "READS",
    "MOUNTED",
    "AGENT",
    "LAST ERROR",
];

/// Everything of a mount.
pub(super) fn wide_row(mount: &MountStatus, now: SystemTime) -> Vec<String> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    vec![
        mount.path.clone(),
        or_dash(&mount.namespace),
        or_dash(&mount.pod),
        or_dash(&mount.service_account),
        mount.class.clone(),
        mount.store.clone(),
        mount.files.to_string(),
        mount.generation.to_string(),
        mount.state.clone(),
        since(&mount.stale_since, now),
        since(&mount.refreshed, now),
        mount.opens.to_string(),
        mount.reads.to_string(),
        ago(&mount.mounted, now),
        mount.agent.to_string(),
        or_dash(&mount.last_error),
    ]
}

/// What of a mount fits 80 columns: `namespace/pod`, class, files, generation, state, refreshed, opens.
pub(super) fn pod_row(mount: &MountStatus, now: SystemTime) -> Vec<String> {
    let (class, pod) = match (&mount.namespace, &mount.pod) {
        // A pod's class is one of its own namespace.
        (Some(namespace), Some(pod)) => {
            let class = mount.class.strip_prefix(namespace).and_then(|rest| rest.strip_prefix('/'));
            (class.unwrap_or(&mount.class), format!("{namespace}/{pod}"))
        }
        _ => (mount.class.as_str(), mount.path.clone()),
    };
    vec![
        pod,
        class.to_owned(),
        mount.files.to_string(),
        mount.generation.to_string(),
        mount.state.clone(),
        since(&mount.refreshed, now),
        mount.opens.to_string(),
    ]
}

/// By pod, those without one first, each by mount point.
pub(super) fn by_pod(a: &MountStatus, b: &MountStatus) -> std::cmp::Ordering {
    (&a.namespace, &a.pod, &a.path).cmp(&(&b.namespace, &b.pod, &b.path))
}

/// The line below the table.
pub(super) fn sum<'a>(mounts: impl IntoIterator<Item = &'a MountStatus>) -> String {
    let (mut all, mut stale, mut gone) = (0, 0, 0);
    for mount in mounts {
        all += 1;
        stale += usize::from(mount.state == "stale");
        gone += usize::from(mount.state == "gone");
    }
    let noun = if all == 1 { "mount" } else { "mounts" };
    format!("{all} {noun}, {stale} stale, {gone} gone")
}

fn since(time: &Option<String>, now: SystemTime) -> String {
    time.as_deref().map_or_else(|| "-".to_owned(), |time| ago(time, now))
}

fn print_detail(
    out: &mut impl Write,
    detail: &MountDetail,
    output: Output,
    now: SystemTime,
) -> io::Result<()> {
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut *out, detail)?;
        return writeln!(out);
    }
    let wide = output == Output::Wide;
    let mount = &detail.mount;
    let since = mount.stale_since.as_deref().map(|since| format!(", since {} ago", ago(since, now)));
    let mut lines = vec![
        ("path", mount.path.clone()),
        ("class", mount.class.clone()),
        ("store", mount.store.clone()),
        ("state", format!("{}{}", mount.state, since.unwrap_or_default())),
        ("generation", mount.generation.to_string()),
        ("mounted", format!("{} ago, by process {}", ago(&mount.mounted, now), mount.agent)),
        ("use", format!("{} opens, {} reads", mount.opens, mount.reads)),
    ];
    if let (Some(namespace), Some(pod), Some(account)) =
        (&mount.namespace, &mount.pod, &mount.service_account)
    {
        lines.insert(1, ("pod", format!("{namespace}/{pod}, service account {account}")));
    }
    if let Some(refreshed) = &mount.refreshed {
        lines.push(("refreshed", format!("{} ago", ago(refreshed, now))));
    }
    for (name, text) in lines {
        writeln!(out, "{name:<NAME_COLUMNS$}{}", harmless(&text))?;
    }
    let error = harmless(mount.last_error.as_deref().unwrap_or_default());
    let room = if wide { usize::MAX } else { COLUMNS - NAME_COLUMNS };
    for (index, line) in wrap(&error, room).iter().enumerate() {
        let name = if index == 0 { "last error" } else { "" };
        writeln!(out, "{name:<NAME_COLUMNS$}{line}")?;
    }
    writeln!(out)?;
    let mut table = Table::new(&["FILE", "VERSION", "SIZE", "MODE", "MODIFIED", "EXPIRES", "SOURCE"]);
    for file in &detail.files {
        let mut row = row(file, now);
        if !wide {
            row[0] = shorten(&row[0], FILE_COLUMNS);
        }
        table.row(row);
    }
    table.print(out, if wide { usize::MAX } else { COLUMNS })
}

fn row(file: &FileStatus, now: SystemTime) -> Vec<String> {
    let dash = || "-".to_owned();
    let key = file.key.as_ref().map(|key| format!("#{key}")).unwrap_or_default();
    vec![
        file.path.clone(),
        file.version.map_or_else(dash, |version| version.to_string()),
        file.size.map_or_else(|| "gone".to_owned(), |size| size.to_string()),
        format!("{:04o}", file.mode),
        format!("{} ago", ago(&file.modified, now)),
        file.expires.as_deref().map_or_else(dash, |end| until(end, now)),
        format!("{}{key}", file.request),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli) fn mount(number: usize) -> MountStatus {
        MountStatus {
            path: format!(
                "/var/lib/kubelet/pods/9c1b2f0e-0000-4000-8000-{number:012}/volumes/kubernetes.io~csi/secrets/mount"
            ),
            agent: 4_321,
            class: "payments/orders-database-credentials".into(),
            pod: Some(format!("orders-database-6f7c9d8b5-{number:05}")),
            namespace: Some("payments".into()),
            service_account: Some("orders".into()),
            store: "https://vault.example:8200".into(),
            files: 3,
            generation: 12,
            state: if number == 7 { "stale" } else { "fresh" }.into(),
            stale_since: (number == 7).then(|| "2026-01-01T00:00:00Z".into()),
            mounted: "2025-12-31T00:00:00Z".into(),
            refreshed: Some("2026-01-01T00:00:00Z".into()),
            opens: 1_234_567,
            reads: 2_345_678,
            last_error: None,
        }
    }

    fn printed(mounts: &[MountStatus], output: Output) -> String {
        let now = humantime::parse_rfc3339("2026-01-01T00:00:42Z").unwrap();
        let mut text = Vec::new();
        print_mounts(&mut text, mounts, output, COLUMNS, now).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn five_hundred_mounts_fit_eighty_columns_and_end_with_a_sum() {
        let mounts: Vec<MountStatus> = (0..500).map(mount).collect();
        let text = printed(&mounts, Output::Table);
        assert_eq!(text.lines().count(), 502);
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(text.lines().nth(1).unwrap().starts_with("payments/orde"), "{text}");
        assert_eq!(text.lines().last(), Some("500 mounts, 1 stale, 0 gone"));
    }

    #[test]
    fn mounts_without_a_pod_are_told_by_the_end_of_their_path() {
        let mut local = mount(1);
        (local.pod, local.namespace) = (None, None);
        let text = printed(&[local], Output::Table);
        assert!(text.starts_with("PATH ") && text.contains("kubernetes.io~csi/secrets/mount"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
    }

    #[test]
    fn wide_shows_everything_and_json_can_be_read_back() {
        let wide = printed(&[mount(7)], Output::Wide);
        for part in ["payments", "-00007", "https://vault.example:8200", "stale", "42s", "2345678", "4321"] {
            assert!(wide.contains(part), "{part} is missing: {wide}");
        }
        let back: Vec<MountStatus> = serde_json::from_str(&printed(&[mount(7)], Output::Json)).unwrap();
        assert_eq!(back[0].path, mount(7).path);
    }

    #[test]
    fn nothing_mounted_says_how_to_begin() {
        assert!(printed(&[], Output::Table).contains("fuse-secrets dev"));
        assert_eq!(printed(&[], Output::Json).trim(), "[]");
    }
}
