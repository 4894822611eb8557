//! YAML as data: limits against hostile input, and errors that say where and never what.
//!
//! Scalars keep what the author meant: `0644` stays the text `0644` (YAML 1.1 reads it as octal, YAML 1.2 as decimal), while
//! `0o644` is the number 420 in both. Only `true` and `false` are booleans: `secretKey: no` is the text it looks like.

use serde_json::Value;
use serde_saphyr::options::{AliasLimits, Options};

use crate::config::fault::{Broken, broken};

/// Largest text that is read: as much as etcd stores for one object by default is 1.5 MiB, and no class comes near.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Nodes of all documents: [`crate::class::MAX_FILES`] files with all their fields, several times over.
const MAX_NODES: usize = 100_000;
/// Nesting; a class has 8 levels, `secretArgs` are the only free part.
const MAX_DEPTH: usize = 32;
/// What aliases may unfold to.
const MAX_REPLAYED: usize = 20_000;
/// Documents in one text.
const MAX_DOCUMENTS: usize = 500;

/// All documents that are not empty.
pub(crate) fn documents(text: &str) -> Result<Vec<Value>, Broken> {
    if text.len() > MAX_BYTES {
        return Err(broken("is larger than 1 MiB", "split it into several files"));
    }
    serde_saphyr::from_multiple_with_options(text, options()).map_err(|error| in_own_words(&error))
}

fn options() -> Options {
    let mut aliases = AliasLimits::default();
    aliases.max_total_replayed_events = MAX_REPLAYED;
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: MAX_NODES,
            max_events: 4 * MAX_NODES,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_documents: MAX_DOCUMENTS,
            max_total_scalar_bytes: MAX_BYTES,
        },
        alias_limits: aliases,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        with_snippet: false,
    }
}

/// The parser's own texts may quote the document (a key that is there twice, a tag), so only kind and place are taken over.
fn in_own_words(error: &serde_saphyr::Error) -> Broken {
    use serde_saphyr::Error;
    if let Error::AliasError { error, .. } = error.without_snippet() {
        return in_own_words(error);
    }
    let (rule, remedy) = match error.without_snippet() {
        Error::DuplicateMappingKey { .. } => ("a key stands twice in one mapping", "keep one of them"),
        Error::UnknownAnchor { .. } => {
            ("an alias names no anchor", "define the anchor above it or write the value out")
        }
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => (
            "the text is too large, too deep, or unfolds to too much",
            "write fewer documents per file and fewer aliases",
        ),
        Error::NonFiniteFloat { .. } => ("a number is infinite or not a number", "quote it if it is text"),
        Error::Eof { .. } => ("the text ends too early", "close what is open: quotes, brackets, blocks"),
        _ => ("this is not YAML", "check indentation, quotes and colons there"),
    };
    match error.location() {
        Some(at) => broken(format!("line {}, column {}: {rule}", at.line(), at.column()), remedy),
        None => broken(rule, remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_line_and_column_and_no_content() {
        let fault = documents("a: 1\nb: [hunter2, \"hunter2\nc: hunter2").unwrap_err();
        assert!(fault.rule.starts_with("line "), "{fault:?}");
        assert!(!format!("{fault:?}").contains("hunter2"));
        let twice = documents("a: 1\nhunter2: 2\nhunter2: 3\n").unwrap_err();
        assert_eq!(twice.rule, "line 3, column 1: a key stands twice in one mapping");
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..9 {
            let below = format!("*a{},", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{}]\n", below.trim_end_matches(',')));
        }
        let fault = documents(&text).unwrap_err();
        assert!(fault.rule.contains("unfolds to too much"), "{fault:?}");
    }

    #[test]
    fn depth_and_size_are_bounded() {
        assert!(documents(&format!("{}{}", "[".repeat(5_000), "]".repeat(5_000))).is_err());
        assert!(documents(&format!("a: {}", "x".repeat(MAX_BYTES))).unwrap_err().rule.contains("1 MiB"));
        assert!(documents(&"---\na: 1\n".repeat(MAX_DOCUMENTS + 1)).is_err());
    }

    #[test]
    fn a_leading_zero_is_kept_and_empty_documents_are_skipped() {
        let read = documents("---\n---\na: 0644\nb: 0o644\nc: 420\n---\n").unwrap();
        assert_eq!(read, [serde_json::json!({"a": "0644", "b": 420, "c": 420})]);
    }
}
