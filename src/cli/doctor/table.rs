//! A table of four columns whose cells wrap at blanks, 80 columns wide.

use std::fmt;

use crate::cli::text::wrap;

/// Widths in characters; with one blank between two columns they make 80.
const WIDTHS: [usize; 4] = [15, 4, 23, 35];

/// One row, as many lines high as its longest cell.
pub(super) fn row(f: &mut fmt::Formatter<'_>, cells: [&str; 4]) -> fmt::Result {
    let [mut a, mut b, mut c, mut d] =
        [0, 1, 2, 3].map(|column| wrap(cells[column], WIDTHS[column]).into_iter());
    loop {
        let cells = [a.next(), b.next(), c.next(), d.next()];
        if cells.iter().all(Option::is_none) {
            return Ok(());
        }
        let line =
            cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{:width$}", cell.as_deref().unwrap_or("")));
        writeln!(f, "{}", line.collect::<Vec<_>>().join(" ").trim_end())?;
    }
}
