//! Text for terminals.

/// Lines of at most `width` characters; a longer word is cut.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
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

/// Without control characters, which would steer the terminal: what another user's agent answers is that user's text.
pub(super) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Columns of the terminal, for tables that can use more than 80; 80 where there is none.
pub(super) fn columns() -> usize {
    /// Eyes find no row in a wider one.
    const MOST: usize = 200;
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    size.map_or(80, |size| usize::from(size.ws_col).clamp(80, MOST))
}

/// At most `room` characters: control characters escaped, the middle left out.
pub(super) fn middle(text: &str, room: usize) -> String {
    let mut clean: Vec<char> = Vec::new();
    for c in text.chars() {
        if c.is_control() { clean.extend(c.escape_default()) } else { clean.push(c) }
    }
    if clean.len() <= room {
        return clean.into_iter().collect();
    }
    let head = room.saturating_sub(1).div_ceil(2);
    let tail = room.saturating_sub(1) - head;
    clean[..head].iter().chain(std::iter::once(&'…')).chain(&clean[clean.len() - tail..]).collect()
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
