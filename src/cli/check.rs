//! `fuse-secrets check FILE...`: reads class documents and says what they ask for, or everything that is wrong with them.
//! Needs no store and no credential (`check --publish` does: see `publish`). Never prints what a fault is about, only where it is and what to write.
//!
//! Exit codes: 0 all documents are good; 65 (`EX_DATAERR`) a document has faults; 66 (`EX_NOINPUT`) a file cannot be read.

use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::exit;
use super::text::middle as shorten;
use crate::class::{self, Class, Fault, Faults};
use crate::config::fault::{Sink, broken};
use crate::config::text::spell;
use crate::config::yaml::MAX_BYTES;
use crate::reference::{Encoding, FileSpec, Method};

/// `check --publish`: one publish repeated, without a mount.
pub mod publish;

/// Printed lines are no longer than this.
const COLUMNS: usize = 80;
/// What a document's lines are indented by.
const INDENT: usize = 7;

/// Ends the command's long help.
pub const HELP: &str = "\
Needs no store and no credential. Exit codes: 0 all documents are good, 65 a document has faults, 66 a file cannot be read.

Examples:
      fuse-secrets check app.yaml
      kubectl get secretproviderclass -A -o yaml | fuse-secrets check -
  Why a pod does not start, from outside its node:
      kubectl fuse-secrets check --pod payments/orders-0";

/// Arguments of `check`.
#[derive(Args)]
#[command(after_long_help = HELP)]
pub struct Options {
    /// Files with SecretProviderClass or SecretsStoreImport documents; - is standard input
    #[arg(required_unless_present = "publish", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Repeat a publish, with the settings of this agent, without mounting: log in, read every file, say what a pod would be told.
    /// A document of JSON as `kubectl fuse-secrets check` writes it, with tokens; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "files")]
    publish: Option<PathBuf>,
    /// Of a publish: stop where a token is needed, and ask no store
    #[arg(long, requires = "publish")]
    without_token: bool,
    /// Of a publish: the agent's configuration file
    #[arg(long, env = "FUSE_SECRETS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people, at 80 columns.
    #[default]
    Table,
    /// For programs: everything, nothing shortened.
    Json,
}

/// What the files hold.
pub struct Outcome {
    documents: Vec<(String, Result<Class, Faults>)>,
    unreadable: bool,
}

/// Runs the command.
pub async fn command(options: Options) -> ExitCode {
    let Options { files, publish, without_token, config, output } = options;
    if let Some(document) = publish {
        return publish::run(&document, config.as_deref(), without_token, output).await;
    }
    let outcome = run(&files);
    exit::printed(outcome.print(&mut io::stdout().lock(), output), outcome.exit_code())
}

/// Reads all files; `-` is standard input.
#[must_use]
pub fn run(files: &[PathBuf]) -> Outcome {
    let mut outcome = Outcome { documents: Vec::new(), unreadable: false };
    for file in files {
        let name = file.display().to_string();
        match read(file) {
            Ok(text) => {
                outcome
                    .documents
                    .extend(class::parse_each(&text).into_iter().map(|result| (name.clone(), result)));
            }
            Err(error) => {
                outcome.unreadable = true;
                let sink = Sink::new("file");
                sink.add(
                    "",
                    broken(format!("cannot be read: {error}"), "check its path, permissions and encoding"),
                );
                outcome.documents.push((name, sink.finish(None)));
            }
        }
    }
    outcome
}

impl Outcome {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.unreadable {
            66
        } else if self.documents.iter().any(|(_, result)| result.is_err()) {
            65
        } else {
            0
        }
    }

    /// Prints it.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn print(&self, out: &mut impl Write, format: Format) -> io::Result<()> {
        match format {
            Format::Table => self.documents.iter().try_for_each(|(file, result)| match result {
                Ok(class) => print_class(out, file, class),
                Err(faults) => print_faults(out, file, faults),
            }),
            Format::Json => {
                let documents: Vec<_> =
                    self.documents.iter().map(|(file, result)| as_json(file, result)).collect();
                let all = json!({ "ok": self.exit_code() == 0, "documents": documents });
                writeln!(out, "{all:#}")
            }
        }
    }
}

/// At most one byte more than a class may have: enough to see that it is too large.
fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let limit = MAX_BYTES as u64 + 1;
    if file == Path::new("-") {
        io::stdin().take(limit).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(file)?.take(limit).read_to_string(&mut text)?;
    }
    Ok(text)
}

fn print_class(out: &mut impl Write, file: &str, class: &Class) -> io::Result<()> {
    head(out, "ok", &class.to_string(), file)?;
    paragraph(out, &summary(class))?;
    table(out, class)?;
    for warning in &class.warnings {
        paragraph(out, &format!("warning: {}: {}", warning.field, warning.text))?;
    }
    Ok(())
}

fn print_faults(out: &mut impl Write, file: &str, faults: &Faults) -> io::Result<()> {
    let mut document: Option<&str> = None;
    for Fault { document: of, field, rule, remedy } in faults.iter() {
        if document != Some(of) {
            head(out, "FAULT", of, file)?;
            document = Some(of);
        }
        let place = if field.is_empty() { String::new() } else { format!("{field}: ") };
        paragraph(out, &format!("{place}{rule}; {remedy}"))?;
    }
    Ok(())
}

fn head(out: &mut impl Write, verdict: &str, document: &str, file: &str) -> io::Result<()> {
    let title = shorten(&format!("{verdict:<INDENT$}{document}"), COLUMNS);
    let file = shorten(file, COLUMNS - INDENT);
    let room = COLUMNS.saturating_sub(title.chars().count() + 2);
    if file.chars().count() <= room {
        writeln!(out, "{title}  {file:>room$}")
    } else {
        writeln!(out, "{title}\n{:INDENT$}{file}", "")
    }
}

fn summary(class: &Class) -> String {
    let settings = &class.settings;
    let address = match &settings.connection.addresses {
        Some(addresses) => addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        None => "store left to the mount".to_owned(),
    };
    let role = settings.login.role.as_deref().unwrap_or("left to the mount");
    let freshness = class.freshness();
    format!("{address}, role {role}, read every {}", spell(freshness.interval))
}

/// The class's files: encodings and modes whole, the rest shortened in the middle where it must.
fn table(out: &mut impl Write, class: &Class) -> io::Result<()> {
    let row = |file: &FileSpec| {
        [
            file.path.to_string(),
            request(file),
            file.key.clone().unwrap_or_else(|| "(all)".to_owned()),
            encoding(file.encoding).to_owned(),
            file.ownership
                .or(class.settings.ownership)
                .mode
                .map_or("default".to_owned(), |m| format!("{m:04o}")),
        ]
    };
    let head = ["FILE", "SECRET", "KEY", "ENCODING", "MODE"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head).chain(class.files.iter().map(row)).collect();
    let natural = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let room = COLUMNS - INDENT - 4 * 2 - natural(3) - natural(4);
    let key = natural(2).min(room / 4);
    let path = natural(0).min((room - key) / 2).max(natural(0).min((room - key).saturating_sub(natural(1))));
    let secret = natural(1).min(room - key - path);
    for [file, request, field, encoding, mode] in &rows {
        let line = format!(
            "{:path$}  {:secret$}  {:key$}  {encoding:<w$}  {mode}",
            shorten(file, path),
            shorten(request, secret),
            shorten(field, key),
            w = natural(3),
        );
        writeln!(out, "{:INDENT$}{}", "", line.trim_end())?;
    }
    Ok(())
}

fn request(file: &FileSpec) -> String {
    match file.request.method {
        Method::Get => file.request.to_string(),
        Method::Post => format!("POST {}", file.request),
        Method::Put => format!("PUT {}", file.request),
    }
}

fn encoding(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::Utf8 => "utf-8",
        Encoding::Base64 => "base64",
        Encoding::Hex => "hex",
    }
}

fn as_json(file: &str, result: &Result<Class, Faults>) -> serde_json::Value {
    let class = match result {
        Ok(class) => class,
        Err(faults) => {
            return json!({ "file": file, "ok": false, "faults": faults.iter().collect::<Vec<_>>() });
        }
    };
    let settings = &class.settings;
    let freshness = class.freshness();
    let files = class.files.iter().map(|file| {
        let ownership = file.ownership.or(settings.ownership);
        json!({
            "path": file.path.as_str(),
            "method": match file.request.method { Method::Get => "GET", Method::Post => "POST", Method::Put => "PUT" },
            "secretPath": file.request.path,
            "query": file.request.query,
            "hasArgs": file.request.args.is_some(),
            "key": file.key,
            "encoding": encoding(file.encoding),
            "uid": ownership.uid,
            "gid": ownership.gid,
            "mode": ownership.mode.map(|mode| format!("{mode:04o}")),
        })
    });
    json!({
        "file": file,
        "ok": true,
        "kind": class.kind,
        "namespace": class.namespace,
        "name": class.name,
        "addresses": settings.connection.addresses.iter().flatten().map(ToString::to_string).collect::<Vec<_>>(),
        "role": settings.login.role,
        "refreshInterval": spell(freshness.interval),
        "maxAge": spell(freshness.max_age),
        "openDeadline": spell(freshness.open_deadline),
        "staleGrace": freshness.stale_grace.map_or("unlimited".to_owned(), spell),
        "files": files.collect::<Vec<_>>(),
        "warnings": class.warnings,
    })
}

/// Wraps at blanks; what has none and is too long is broken.
fn paragraph(out: &mut impl Write, text: &str) -> io::Result<()> {
    let mut line = String::new();
    let mut indent = INDENT;
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        while indent + line.chars().count() + usize::from(!line.is_empty()) + word.len() > COLUMNS {
            if line.is_empty() {
                line.extend(word.drain(..COLUMNS - indent));
            }
            writeln!(out, "{:indent$}{line}", "")?;
            line.clear();
            indent = INDENT + 2;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.extend(word);
    }
    writeln!(out, "{:indent$}{line}", "")
}

#[cfg(test)]
mod tests;
