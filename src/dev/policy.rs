//! ACL policies, as much of them as reads need: `path "…" { capabilities = [ … ] }` in HCL or JSON, with a trailing `*`
//! and `+` for one segment. Everything else a policy can say is refused by name.
//!
//! Writing needs `create` or `update`, whichever: unlike the real server, this one does not tell the two apart.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::ask::Operation;

/// The policy every token has, unless its role says otherwise.
pub(super) const DEFAULT: &str = r#"# What every token may do with itself.
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
path "sys/capabilities-self" { capabilities = ["update"] }
path "sys/internal/ui/resultant-acl" { capabilities = ["read"] }
"#;

const CAPABILITIES: [&str; 8] = ["create", "read", "update", "patch", "delete", "list", "sudo", "deny"];

/// One policy: its text, and what it says.
pub(super) struct Policy {
    pub(super) text: String,
    rules: BTreeMap<String, BTreeSet<String>>,
}

impl Policy {
    /// Parses HCL, or JSON if it starts with a brace. The error is worded as in an answer.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let rules = if text.trim_start().starts_with('{') { json(text) } else { Hcl::new(text).policy() };
        let rules = rules.map_err(|error| format!("failed to parse policy: {error}"))?;
        for (path, capabilities) in &rules {
            if let Some(unknown) = capabilities.iter().find(|name| !CAPABILITIES.contains(&name.as_str())) {
                return Err(format!(
                    "failed to parse policy: path \"{path}\": invalid capability \"{unknown}\""
                ));
            }
        }
        Ok(Self { text: text.to_owned(), rules })
    }
}

/// What the policies together allow at a path: the most specific pattern counts, in several policies their union.
pub(super) fn capabilities(policies: &[&Policy], path: &str) -> BTreeSet<String> {
    let patterns = policies.iter().flat_map(|policy| policy.rules.keys());
    let Some(best) = patterns.filter(|pattern| covers(pattern, path)).max_by_key(|pattern| rank(pattern))
    else {
        return BTreeSet::new();
    };
    let granted: BTreeSet<String> =
        policies.iter().filter_map(|policy| policy.rules.get(best)).flatten().cloned().collect();
    if granted.contains("deny") { BTreeSet::new() } else { granted }
}

/// Whether they allow an operation at a path.
pub(super) fn allows(policies: &[&Policy], operation: Operation, path: &str) -> bool {
    let granted = |path: &str, name: &str| capabilities(policies, path).contains(name);
    match operation {
        Operation::Read => granted(path, "read"),
        Operation::Write => granted(path, "create") || granted(path, "update"),
        Operation::Patch => granted(path, "patch"),
        Operation::Delete => granted(path, "delete"),
        Operation::List => {
            let bare = path.trim_end_matches('/');
            granted(&format!("{bare}/"), "list") || granted(bare, "list")
        }
    }
}

/// Whether they allow anything at all below a mount.
pub(super) fn reaches(policies: &[&Policy], mount: &str) -> bool {
    policies.iter().flat_map(|policy| &policy.rules).any(|(pattern, capabilities)| {
        let literal = pattern.find(['*', '+']).map_or(pattern.as_str(), |wild| &pattern[..wild]);
        let open = literal.len() < pattern.len();
        !capabilities.contains("deny") && (literal.starts_with(mount) || open && mount.starts_with(literal))
    })
}

fn covers(pattern: &str, path: &str) -> bool {
    let (pattern, prefix) = pattern.strip_suffix('*').map_or((pattern, false), |pattern| (pattern, true));
    if !pattern.contains('+') {
        return if prefix { path.starts_with(pattern) } else { path == pattern };
    }
    let mut segments = path.split('/');
    let mut parts = pattern.split('/').peekable();
    while let Some(part) = parts.next() {
        let Some(segment) = segments.next() else { return false };
        let last_of_prefix = prefix && parts.peek().is_none();
        let fits = if last_of_prefix { segment.starts_with(part) } else { part == segment };
        if part != "+" && !fits {
            return false;
        }
        if last_of_prefix {
            return true;
        }
    }
    segments.next().is_none()
}

/// The server's order of precedence: exact before wild, a later wildcard before an earlier one, a closed end before `*`,
/// fewer `+`, then the longer.
fn rank(pattern: &str) -> (bool, usize, bool, std::cmp::Reverse<usize>, usize, &str) {
    let wild = pattern.find(['*', '+']);
    (
        wild.is_none(),
        wild.unwrap_or(pattern.len()),
        !pattern.ends_with('*'),
        std::cmp::Reverse(pattern.matches('+').count()),
        pattern.len(),
        pattern,
    )
}

type Rules = BTreeMap<String, BTreeSet<String>>;

fn json(text: &str) -> Result<Rules, String> {
    let document: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let paths = document.get("path").and_then(Value::as_object).ok_or("the member \"path\" is missing")?;
    let mut rules = Rules::new();
    for (path, body) in paths {
        let list = body.get("capabilities").and_then(Value::as_array);
        let list = list.ok_or_else(|| format!("path \"{path}\": the list of capabilities is missing"))?;
        rules.insert(path.clone(), list.iter().filter_map(Value::as_str).map(str::to_owned).collect());
    }
    Ok(rules)
}

/// A reader of the one kind of HCL block that a policy has.
struct Hcl<'a> {
    rest: &'a str,
}

impl<'a> Hcl<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    fn policy(mut self) -> Result<Rules, String> {
        let mut rules = Rules::new();
        loop {
            self.blank();
            if self.rest.is_empty() {
                return Ok(rules);
            }
            self.word("path")?;
            let path = self.quoted()?;
            self.mark('{')?;
            self.word("capabilities")?;
            self.mark('=')?;
            self.mark('[')?;
            let capabilities: &mut BTreeSet<String> = rules.entry(path).or_default();
            while !self.skip(']') {
                capabilities.insert(self.quoted()?);
                if !self.skip(',') && !self.rest.starts_with(']') {
                    return Err(format!("expected a comma or ] at {}", self.here()));
                }
            }
            self.mark('}')?;
        }
    }

    /// Skips white space and comments.
    fn blank(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            let end = match self.rest {
                text if text.starts_with('#') || text.starts_with("//") => text.find('\n'),
                text if text.starts_with("/*") => text.find("*/").map(|at| at + 2),
                _ => return,
            };
            self.rest = end.map_or("", |end| &self.rest[end..]);
        }
    }

    fn skip(&mut self, mark: char) -> bool {
        self.blank();
        let Some(rest) = self.rest.strip_prefix(mark) else { return false };
        self.rest = rest;
        self.blank();
        true
    }

    fn mark(&mut self, mark: char) -> Result<(), String> {
        if self.skip(mark) { Ok(()) } else { Err(format!("expected {mark} at {}", self.here())) }
    }

    fn word(&mut self, word: &str) -> Result<(), String> {
        self.blank();
        let rest = self.rest.strip_prefix(word).filter(|rest| !rest.starts_with(char::is_alphanumeric));
        self.rest =
            rest.ok_or_else(|| format!("expected {word} at {}: nothing else is supported", self.here()))?;
        Ok(())
    }

    fn quoted(&mut self) -> Result<String, String> {
        self.blank();
        let text = self.rest.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let (text, rest) = text.ok_or_else(|| format!("expected quoted text at {}", self.here()))?;
        self.rest = rest;
        Ok(text.to_owned())
    }

    fn here(&self) -> String {
        match self.rest.split_whitespace().next() {
            Some(word) => format!("{word:?}"),
            None => "the end".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(text: &str, path: &str) -> bool {
        let policy = Policy::parse(text).unwrap();
        allows(&[&policy], Operation::Read, path)
    }

    #[test]
    fn an_exact_path_beats_a_prefix() {
        let text = r#"path "a/*" { capabilities = ["read"] } path "a/b" { capabilities = ["deny"] }"#;
        assert!(may(text, "a/c"));
        assert!(!may(text, "a/b"));
    }

    #[test]
    fn a_plus_stands_for_one_segment() {
        let text = r#"path "secret/data/+/db" { capabilities = ["read"] }"#;
        assert!(may(text, "secret/data/app/db"));
        assert!(!may(text, "secret/data/app/x/db"));
        assert!(!may(text, "secret/data/app/db/x"));
        assert!(may(r#"path "secret/+/a*" { capabilities = ["read"] }"#, "secret/data/app/db"));
    }

    #[test]
    fn the_longer_prefix_counts() {
        let text =
            r#"path "a/*" { capabilities = ["deny"] } path "a/b/*" { capabilities = ["read", "list",] }"#;
        assert!(may(text, "a/b/c"));
        assert!(!may(text, "a/c"));
    }

    #[test]
    fn comments_and_json_are_read() {
        assert!(may("# x\npath \"a\" { // y\n capabilities = [/* z */ \"read\"] }", "a"));
        assert!(may(r#"{"path":{"a":{"capabilities":["read"]}}}"#, "a"));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let error = |text| Policy::parse(text).err().unwrap();
        assert!(error("path {").contains("expected quoted text at \"{\""));
        assert!(error(r#"path "x" { capabilities = ["fly"] }"#).ends_with("invalid capability \"fly\""));
        assert!(error(r#"path "x" { policy = "read" }"#).contains("expected capabilities at \"policy\""));
    }
}
