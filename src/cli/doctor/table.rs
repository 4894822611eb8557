//! A table of four columns whose cells wrap at blanks, 80 columns wide.

use std::fmt;

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

/// Lines of at most `width` characters; a longer word is cut.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        while !word.is_empty() {
            let rest = word.split_off(word.len().min(width));
            let piece: String = word.into_iter().collect();
            match lines.last_mut() {
                Some(line) if line.chars().count() + 1 + piece.chars().count() <= width => {
                    line.push(' ');
                    line.push_str(&piece);
                }
                _ => lines.push(piece),
            }
            word = rest;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_wraps_at_blanks_and_long_words_are_cut() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrap("", 4), Vec::<String>::new());
    }
}
