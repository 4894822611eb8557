//! Running other programs: what failed is named with its arguments and, where it was kept, its output.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Why a task cannot go on, in words for the person in front of it.
pub(crate) type Error = Box<dyn std::error::Error>;

/// The cargo that runs this task, so that the pinned toolchain is kept.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::tools::root());
    command
}

/// Runs a program whose output the user sees.
pub(crate) fn run(command: &mut Command) -> Result<(), Error> {
    let status = command.status().map_err(|error| cannot_start(command, &error))?;
    if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", line(command)).into()) }
}

/// Runs a program and keeps what it prints on its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String, Error> {
    let output = command.output().map_err(|error| cannot_start(command, &error))?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("{} ended with {}: {}", line(command), output.status, error.trim()).into())
}

/// Runs a program whose output the user sees, and shows each line of it to `seen` too. Whether it ended well.
pub(crate) fn watch(command: &mut Command, mut seen: impl FnMut(&str)) -> Result<bool, Error> {
    command.stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| cannot_start(command, &error))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            seen(&line);
        }
    }
    Ok(child.wait()?.success())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<OsString> = words.map(ToOwned::to_owned).collect();
    words.join(" ".as_ref()).to_string_lossy().into_owned()
}

fn cannot_start(command: &Command, error: &std::io::Error) -> Error {
    format!("cannot run {}: {error}", command.get_program().to_string_lossy()).into()
}
