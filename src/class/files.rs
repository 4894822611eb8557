//! The rules that files of both kinds share: what a secret path is, what a mode is, which paths go together.

use std::collections::HashSet;

use serde_json::Value;

use crate::class::MAX_FILES;
use crate::config::fault::{Broken, Sink, broken};
use crate::config::text;
use crate::reference::{Encoding, FilePath};

/// A store's path and its query.
pub(crate) struct SecretPath {
    pub(crate) path: String,
    pub(crate) query: Option<String>,
}

/// `secret/data/app?version=2`: a leading `/` and `v1/` are cut, as the reference providers do. A path that a URL parser
/// would rewrite (`..`, `//`) is refused: a policy would see another path than the class's author.
pub(crate) fn secret_path(text: &str) -> Result<SecretPath, Broken> {
    const REMEDY: &str = "write the API path as the store's policies spell it, such as secret/data/app";
    let text = text.strip_prefix('/').unwrap_or(text);
    let text = text.strip_prefix("v1/").unwrap_or(text);
    let (path, query) = match text.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (text, None),
    };
    if path.is_empty() {
        return Err(broken("names no path", REMEDY));
    }
    if path.len() > 2048 {
        return Err(broken("is longer than 2048 bytes", REMEDY));
    }
    if path.chars().chain(query.unwrap_or_default().chars()).any(|c| c.is_control() || c == '#') {
        return Err(broken("has a control character or #", REMEDY));
    }
    if path.contains(['\\', '%']) {
        return Err(broken("has a \\ or %", "write the path unescaped: the driver escapes it"));
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(broken("has an empty part or a part . or ..", REMEDY));
    }
    if query.is_some_and(|query| query.contains(char::is_whitespace)) {
        return Err(broken("has a blank in its query", "escape it as %20"));
    }
    let query = query.filter(|query| !query.is_empty()).map(str::to_owned);
    Ok(SecretPath { path: path.to_owned(), query })
}

/// Where a file appears.
pub(crate) fn file_path(text: &str) -> Result<FilePath, Broken> {
    // The rule without the path: the field already says which one it is.
    FilePath::parse(text).map_err(|error| broken(error.rule(), "choose a relative path such as tls/key.pem"))
}

/// utf-8, base64 or hex, of any case.
pub(crate) fn encoding(text: &str) -> Result<Encoding, Broken> {
    match text.to_ascii_lowercase().as_str() {
        "utf-8" | "utf8" => Ok(Encoding::Utf8),
        "base64" => Ok(Encoding::Base64),
        "hex" => Ok(Encoding::Hex),
        _ => Err(broken("is unknown", "choose one of utf-8, base64, hex")),
    }
}

/// `filePermission`: octal with a leading zero as people write it (`0640`, which reaches us as text), or the number that YAML
/// made of `0o640` or that somebody computed (416). A plain number that reads as an octal mode (640, 400) is refused: YAML
/// means decimal by it and its author does not.
pub(crate) fn file_permission(value: &Value) -> Result<u16, Broken> {
    const REMEDY: &str = "write it in octal with the leading 0, such as 0440";
    match value {
        Value::String(text) if text.starts_with('0') => text::mode(text),
        Value::Number(number) => {
            let bits =
                number.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or(broken("is not a mode", REMEDY))?;
            let digits = bits.to_string();
            if digits.len() == 3 && digits.bytes().all(|b| matches!(b, b'0' | b'4' | b'6')) && bits >= 400 {
                return Err(broken("is decimal to YAML, yet reads as octal", REMEDY));
            }
            text::permission(bits)
        }
        _ => Err(broken("is not an octal number", REMEDY)),
    }
}

/// Rules between the paths of one volume, also of files that are wrong otherwise; each with the field that names it.
pub(crate) fn check_together(paths: &[(FilePath, String)], list: &str, sink: &Sink) {
    if paths.len() > MAX_FILES {
        let rule = format!("has {} files, more than {MAX_FILES}", paths.len());
        sink.add(list, broken(rule, "spread them over several classes and volumes"));
    }
    let mut seen = HashSet::new();
    for (path, field) in paths {
        if !seen.insert(path.as_str()) {
            sink.add(field, broken(format!("appears twice: {path}"), "give each file a path of its own"));
        }
    }
    for (path, field) in paths {
        let path = path.as_str();
        let mut directories = path.match_indices('/').map(|(at, _)| &path[..at]);
        if let Some(directory) = directories.find(|directory| seen.contains(directory)) {
            let rule = format!("lies below {directory}, which is a file");
            sink.add(field, broken(rule, "rename one: a path is either a file or a directory"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_path_is_normalised_as_the_reference_does() {
        for text in ["secret/data/app", "/secret/data/app", "v1/secret/data/app", "/v1/secret/data/app"] {
            assert_eq!(secret_path(text).ok().unwrap().path, "secret/data/app");
        }
        let versioned = secret_path("secret/data/app?version=3").ok().unwrap();
        assert_eq!(
            (versioned.path.as_str(), versioned.query.as_deref()),
            ("secret/data/app", Some("version=3"))
        );
    }

    #[test]
    fn a_secret_path_that_a_url_parser_would_rewrite_is_refused() {
        for text in [
            "",
            "/",
            "v1/",
            "?version=1",
            "a//b",
            "a/../b",
            "a/./b",
            "a/",
            "a#b",
            "a\nb",
            "a%2fb",
            "a\\b",
            "a?x y",
        ] {
            assert!(secret_path(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn file_permissions_survive_the_octal_trap() {
        let read = |value: Value| file_permission(&value);
        assert_eq!(read("0644".into()), Ok(0o644));
        assert_eq!(read("0o600".into()), Ok(0o600));
        assert_eq!(read(420.into()), Ok(0o644));
        assert_eq!(read(288.into()), Ok(0o440));
        for bad in [644, 600, 640, 400, 440, 444, 493, 511, -1] {
            assert!(read(bad.into()).unwrap_err().remedy.contains("leading 0"), "{bad}");
        }
        for bad in ["0755", "0888", "rw-r--r--", "644", ""] {
            assert!(read(bad.into()).is_err(), "{bad}");
        }
    }
}
