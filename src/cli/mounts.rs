//! `fuse-secrets mounts`: what is mounted, by whichever agent of this user (for root: of any user).

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{Args, ValueEnum};

use super::exit;
use crate::agent::admin::{Question, Reply, ask_all};
use crate::agent::status::{FileStatus, MountDetail, MountStatus};

/// Printed lines of the narrow table are no longer than this.
const COLUMNS: usize = 80;
/// Of these, the mount point gets at most so many.
const PATH_COLUMNS: usize = 34;

/// Arguments of `mounts`.
#[derive(Args)]
#[command(after_long_help = HELP)]
pub struct Options {
    /// Show one mount, file by file
    #[arg(value_name = "PATH", conflicts_with = "metrics")]
    path: Option<std::path::PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// Print the counters of every agent instead, in the text format of Prometheus
    #[arg(long)]
    metrics: bool,
}

const HELP: &str = "\
STATE is fresh (the store answered the last refresh), stale (it did not; the last known values are served) or gone (for longer
than the class's stale grace; opening such a file fails). REFRESHED is when the store last answered for the secret that
waits longest.

Examples:
      fuse-secrets mounts
      fuse-secrets mounts -o wide
      fuse-secrets mounts /mnt/app
      fuse-secrets mounts -o json | jq '.[] | select(.state != \"fresh\")'";

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
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
    let question = match (&options.path, options.metrics) {
        (Some(path), _) => Question::Mount(full(path)),
        (None, true) => Question::Metrics,
        (None, false) => Question::Mounts,
    };
    let (mut mounts, mut details, mut metrics, mut silent) =
        (Vec::new(), Vec::new(), String::new(), Vec::new());
    for (socket, answer) in ask_all(&question).await {
        match answer {
            Ok(Reply::Mounts(more)) => mounts.extend(more),
            Ok(Reply::Mount(detail)) => details.extend(detail),
            Ok(Reply::Metrics(more)) => metrics.push_str(&more),
            Ok(Reply::Refused(why)) => silent.push(format!("{}: {why}", socket.display())),
            Err(error) => silent.push(format!("{}: {error}", socket.display())),
        }
    }
    for line in &silent {
        eprintln!("fuse-secrets: an agent did not answer: {line}");
    }
    let mut out = io::stdout().lock();
    let now = SystemTime::now();
    let failed = if silent.is_empty() { exit::OK } else { exit::FAILED };
    match (options.path, options.metrics) {
        (Some(path), _) => match details.pop() {
            Some(detail) => exit::printed(print_detail(&mut out, &detail, options.output, now), failed),
            None => {
                eprintln!(
                    "fuse-secrets: no agent serves {}; `fuse-secrets mounts` lists what is served",
                    path.display()
                );
                ExitCode::from(exit::FAILED)
            }
        },
        (None, true) => exit::printed(out.write_all(metrics.as_bytes()), failed),
        (None, false) => exit::printed(print_mounts(&mut out, &mounts, options.output, now), failed),
    }
}

/// The path as the agent knows it: absolute, its parent without links. The directory itself is not touched.
fn full(path: &Path) -> String {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let full = match (parent.canonicalize(), path.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    };
    full.display().to_string()
}

fn print_mounts(
    out: &mut impl Write,
    mounts: &[MountStatus],
    output: Output,
    now: SystemTime,
) -> io::Result<()> {
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut *out, mounts)?;
        return writeln!(out);
    }
    if mounts.is_empty() {
        return writeln!(out, "nothing is mounted (start with: fuse-secrets dev)");
    }
    let wide = output == Output::Wide;
    let mut table = Table::new(if wide {
        &[
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
        ]
    } else {
        &["PATH", "CLASS", "FILES", "GEN", "STATE", "REFRESHED", "OPENS"]
    });
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let ago = |time: &Option<String>| time.as_deref().map_or_else(|| "-".to_owned(), |time| ago(time, now));
    for mount in mounts {
        let (files, generation, opens) =
            (mount.files.to_string(), mount.generation.to_string(), mount.opens.to_string());
        table.row(if wide {
            vec![
                mount.path.clone(),
                or_dash(&mount.namespace),
                or_dash(&mount.pod),
                or_dash(&mount.service_account),
                mount.class.clone(),
                mount.store.clone(),
                files,
                generation,
                mount.state.clone(),
                ago(&mount.stale_since),
                ago(&mount.refreshed),
                opens,
                mount.reads.to_string(),
                ago(&Some(mount.mounted.clone())),
                mount.agent.to_string(),
                or_dash(&mount.last_error),
            ]
        } else {
            // The end of a mount point tells more than its beginning.
            vec![
                shorten(&mount.path, PATH_COLUMNS),
                shorten(&mount.class, 16),
                files,
                generation,
                mount.state.clone(),
                ago(&mount.refreshed),
                opens,
            ]
        });
    }
    table.print(out, if wide { usize::MAX } else { COLUMNS })?;
    let count = |state: &str| mounts.iter().filter(|mount| mount.state == state).count();
    let (stale, gone) = (count("stale"), count("gone"));
    if mounts.len() > 1 || stale + gone > 0 {
        writeln!(out, "{} mounts, {stale} stale, {gone} gone", mounts.len())?;
    }
    Ok(())
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
    if let Some(error) = &mount.last_error {
        lines.push(("last error", error.clone()));
    }
    for (name, text) in lines {
        writeln!(out, "{name:<12}{text}")?;
    }
    writeln!(out)?;
    let mut table = Table::new(&["FILE", "VERSION", "SIZE", "MODE", "MODIFIED", "EXPIRES", "SOURCE"]);
    for file in &detail.files {
        table.row(row(file, now));
    }
    table.print(out, if output == Output::Wide { usize::MAX } else { COLUMNS })
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

/// Columns as wide as their widest cell; numbers are not aligned to the right, so that `cut` works.
struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn print(&self, out: &mut impl Write, columns: usize) -> io::Result<()> {
        let all = || std::iter::once(&self.head).chain(&self.rows);
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for row in all() {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            let line = line.trim_end();
            if line.chars().count() > columns {
                let cut: String = line.chars().take(columns - 1).collect();
                writeln!(out, "{cut}…")?;
            } else {
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    }
}

/// Cuts in the front, which tells least.
fn shorten(text: &str, columns: usize) -> String {
    let length = text.chars().count();
    if length <= columns {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(length - columns + 1).collect();
    format!("…{tail}")
}

/// How long ago an RFC 3339 time is, in its largest unit.
fn ago(time: &str, now: SystemTime) -> String {
    match humantime::parse_rfc3339_weak(time) {
        Ok(time) => span(now.duration_since(time).unwrap_or_default().as_secs()),
        Err(_) => time.to_owned(),
    }
}

fn until(time: &str, now: SystemTime) -> String {
    match humantime::parse_rfc3339_weak(time).map(|time| time.duration_since(now)) {
        Ok(Ok(left)) => format!("in {}", span(left.as_secs())),
        Ok(Err(_)) => "now".to_owned(),
        Err(_) => time.to_owned(),
    }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(number: usize) -> MountStatus {
        MountStatus {
            path: format!(
                "/var/lib/kubelet/pods/9c1b2f0e-0000-4000-8000-{number:012}/volumes/kubernetes.io~csi/secrets/mount"
            ),
            agent: 4_321,
            class: "payments/orders-database-credentials".into(),
            pod: Some("orders-0".into()),
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
        print_mounts(&mut text, mounts, output, now).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn five_hundred_mounts_fit_eighty_columns_and_end_with_a_sum() {
        let mounts: Vec<MountStatus> = (0..500).map(mount).collect();
        let text = printed(&mounts, Output::Table);
        assert_eq!(text.lines().count(), 502);
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(
            text.lines().nth(1).unwrap().contains("/volumes/kubernetes.io~csi/secrets/mount".split_at(8).1),
            "{text}"
        );
        assert_eq!(text.lines().last(), Some("500 mounts, 1 stale, 0 gone"));
    }

    #[test]
    fn wide_shows_everything_and_json_can_be_read_back() {
        let wide = printed(&[mount(7)], Output::Wide);
        for part in ["payments", "orders-0", "https://vault.example:8200", "stale", "42s", "2345678", "4321"]
        {
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

    #[test]
    fn spans_are_told_in_their_largest_unit() {
        assert_eq!([5, 119, 120, 7_200, 172_800].map(span), ["5s", "119s", "2m", "2h", "2d"]);
    }
}
