//! Tables of text, and how long ago something was: what the commands that list things have in common.

use std::io::{self, Write};
use std::time::SystemTime;

use super::text::{harmless, middle};

/// Printed lines of a narrow table are no longer than this.
pub(super) const COLUMNS: usize = 80;

/// Columns as wide as their widest cell; numbers are not aligned to the right, so that `cut` works.
pub(super) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| harmless(cell)).collect());
    }

    pub(super) fn print(&self, out: &mut impl Write, columns: usize) -> io::Result<()> {
        self.print_fitted(out, columns, &[])
    }

    /// The same, with cells of the elastic columns, given with what they keep, cut in the middle until the lines fit. The first gives
    /// first.
    pub(super) fn print_fitted(
        &self,
        out: &mut impl Write,
        columns: usize,
        elastic: &[(usize, usize)],
    ) -> io::Result<()> {
        let all = || std::iter::once(&self.head).chain(&self.rows);
        let natural = (0..self.head.len())
            .map(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        let widths = fit(natural, columns, elastic);
        for row in all() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let cell = if elastic.iter().any(|(at, _)| *at == column) {
                    middle(cell, *width)
                } else {
                    cell.clone()
                };
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

/// Widths that add up to `columns`: the elastic columns give, one after the other, each down to what it keeps.
fn fit(mut widths: Vec<usize>, columns: usize, elastic: &[(usize, usize)]) -> Vec<usize> {
    for &(at, least) in elastic {
        let whole = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        widths[at] = widths[at].saturating_sub(whole.saturating_sub(columns)).max(least.min(widths[at]));
    }
    widths
}

/// Cuts in the front, which tells least.
pub(super) fn shorten(text: &str, columns: usize) -> String {
    let length = text.chars().count();
    if length <= columns {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(length - columns + 1).collect();
    format!("…{tail}")
}

/// How long ago an RFC 3339 time is, in its largest unit.
pub(super) fn ago(time: &str, now: SystemTime) -> String {
    match humantime::parse_rfc3339_weak(time) {
        Ok(time) => span(now.duration_since(time).unwrap_or_default().as_secs()),
        Err(_) => time.to_owned(),
    }
}

/// How far away an RFC 3339 time is.
pub(super) fn until(time: &str, now: SystemTime) -> String {
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

    #[test]
    fn spans_are_told_in_their_largest_unit() {
        assert_eq!([5, 119, 120, 7_200, 172_800].map(span), ["5s", "119s", "2m", "2h", "2d"]);
    }
}
