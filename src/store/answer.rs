//! The answer's JSON: which kind of secret it is, which key, which encoding.
//!
//! ```text
//! {"request_id": …, "lease_id": …, "lease_duration": …, "renewable": …, "data": DATA, …}
//! DATA = {"data": {…}, "metadata": {…}}   KV v2: the keys are those of DATA.data
//! DATA = {…}                              KV v1 and every other engine: the keys are those of DATA
//! ```
//! The shape decides, not the mount: the existing providers do the same, and a mount may not be readable. A body is
//! never turned into a tree of values; what is not wanted stays a slice of it.

/// From the text of a value to the bytes of a file.
mod encoding;
/// JSON text taken apart without building values.
pub(super) mod json;

use std::borrow::Cow;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use self::json::{Members, bytes_of, is_object};
use super::{Answer, Lease};
use crate::reference::Encoding;
use crate::secret::SecretBytes;

/// How many key names an error lists, and how many bytes of them: enough to see a typing mistake, short enough for one event.
const NAMES_LISTED: usize = 20;
const NAMES_BYTES: usize = 300;

/// Why a body is no answer. Says nothing of its content but the store's own warnings.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseError {
    /// No body at all.
    #[error("an empty answer")]
    Empty,
    /// The API's envelope without `data`.
    #[error("an answer without data{}", list(" (the store warns: ", warnings, ")"))]
    NoData {
        /// What the store said about it.
        warnings: Vec<String>,
    },
    /// Something else than the API's envelope.
    #[error("an answer that is not the API's JSON")]
    NotJson,
}

/// Why a file cannot be made from an answer. Never holds a value.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExtractError {
    /// The secret has no such key.
    #[error("the secret has no key {key:?}; {}", names(available, *more))]
    MissingKey {
        /// The key that was asked for.
        key: String,
        /// The names that exist, those that look like `key` first, then by the alphabet; at most 20, and 300 bytes.
        available: Vec<String>,
        /// How many more there are.
        more: usize,
    },
    /// The text is not what the file's encoding promises.
    #[error("the value is not valid {encoding}: {problem}{}", at(*position))]
    Encoding {
        /// `base64` or `hex`.
        encoding: &'static str,
        /// What is wrong.
        problem: &'static str,
        /// Where, in bytes from the start of the text, counted from 0.
        position: Option<usize>,
    },
    /// The answer has no keys to choose from.
    #[error("the answer's data is not a JSON object, so no key can be chosen")]
    Shape,
}

/// Reads what the cache must know of an answer; the body stays whole.
///
/// A lease counts only with an id: KV version 1 sends a duration that binds nobody.
///
/// # Errors
/// [`ParseError`]: no secret is in it.
pub fn parse(body: SecretBytes) -> Result<Answer, ParseError> {
    if body.expose().trim_ascii().is_empty() {
        return Err(ParseError::Empty);
    }
    let envelope = envelope(body.expose()).ok_or(ParseError::NotJson)?;
    let Some(data) = envelope.data else {
        let warnings = envelope.warnings.unwrap_or_default();
        return Err(ParseError::NoData {
            warnings: warnings.iter().map(|text| super::error::one_line(text)).collect(),
        });
    };
    let lease = match envelope.lease_id.filter(|id| !id.is_empty()) {
        Some(id) => Lease {
            id: Some(id.into_owned()),
            duration: envelope.lease_duration.filter(|seconds| *seconds > 0).map(Duration::from_secs),
            renewable: envelope.renewable.unwrap_or_default(),
        },
        None => Lease::default(),
    };
    let version = kv2(data).and_then(|(_, metadata)| version_of(metadata));
    let number = version.as_ref().and_then(|version| version.version);
    let created = version.and_then(|version| humantime::parse_rfc3339(&version.created_time?).ok());
    Ok(Answer { lease, version: number, created, body })
}

/// The bytes of one file: the value of `key`, or without one the whole answer as JSON text.
///
/// A string is given raw, any other value as its JSON text. The whole answer keeps every member but `request_id`, which
/// differs from answer to answer and would look like a rotation.
///
/// # Errors
/// [`ExtractError`]: no such key, not in that encoding, or no keys at all.
pub fn extract(body: &[u8], key: Option<&str>, encoding: Encoding) -> Result<SecretBytes, ExtractError> {
    let text = match key {
        Some(key) => value(body, key)?,
        None => whole(body)?,
    };
    encoding::decode(text, encoding)
}

/// What a 404 says of a version of a KV v2 secret that once was: `version 3 was deleted at …`.
pub(super) fn obituary(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Data<'a> {
        #[serde(borrow)]
        metadata: &'a RawValue,
    }
    let data: Data<'_> = serde_json::from_str(envelope(body)?.data?.get()).ok()?;
    let version = version_of(data.metadata)?;
    let number = version.version?;
    if version.destroyed {
        return Some(format!("version {number} was destroyed"));
    }
    let at = version.deletion_time.filter(|at| humantime::parse_rfc3339(at).is_ok())?;
    Some(format!("version {number} was deleted at {at}"))
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    lease_id: Option<Cow<'a, str>>,
    lease_duration: Option<u64>,
    renewable: Option<bool>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    warnings: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Version {
    version: Option<u64>,
    created_time: Option<String>,
    deletion_time: Option<String>,
    #[serde(default)]
    destroyed: bool,
}

/// The parser's own errors quote what they read: none of them leaves this module.
fn envelope(body: &[u8]) -> Option<Envelope<'_>> {
    serde_json::from_str(std::str::from_utf8(body).ok()?).ok()
}

fn version_of(metadata: &RawValue) -> Option<Version> {
    serde_json::from_str(metadata.get()).ok()
}

/// The secret and its metadata, if `data` has the shape of KV v2.
fn kv2(data: &RawValue) -> Option<(&RawValue, &RawValue)> {
    #[derive(Deserialize)]
    struct Kv2<'a> {
        #[serde(borrow)]
        data: &'a RawValue,
        #[serde(borrow)]
        metadata: &'a RawValue,
    }
    let kv2: Kv2<'_> = serde_json::from_str(data.get()).ok()?;
    (is_object(kv2.data) && is_object(kv2.metadata)).then_some((kv2.data, kv2.metadata))
}

fn value(body: &[u8], key: &str) -> Result<SecretBytes, ExtractError> {
    let data = envelope(body).and_then(|envelope| envelope.data).ok_or(ExtractError::Shape)?;
    let secret = kv2(data).map_or(data, |(secret, _)| secret);
    let Members(members) = serde_json::from_str(secret.get()).map_err(|_| ExtractError::Shape)?;
    match members.iter().rev().find(|(name, _)| name == key) {
        Some((_, value)) => Ok(bytes_of(value)),
        None => {
            let names = members.into_iter().map(|(name, _)| name.into_owned()).collect();
            let (available, more) = closest_first(key, names);
            Err(ExtractError::MissingKey { key: key.to_owned(), available, more })
        }
    }
}

fn whole(body: &[u8]) -> Result<SecretBytes, ExtractError> {
    let text = std::str::from_utf8(body).map_err(|_| ExtractError::Shape)?;
    let Members(members) = serde_json::from_str(text).map_err(|_| ExtractError::Shape)?;
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(body.len() + 2));
    bytes.push(b'{');
    for (name, value) in members.iter().filter(|(name, _)| name != "request_id") {
        if bytes.len() > 1 {
            bytes.push(b',');
        }
        serde_json::to_writer(&mut *bytes, name).map_err(|_| ExtractError::Shape)?;
        bytes.push(b':');
        bytes.extend_from_slice(value.get().as_bytes());
    }
    bytes.push(b'}');
    Ok(SecretBytes::new(std::mem::take(&mut *bytes)))
}

/// The names worth listing, and how many are left out.
fn closest_first(key: &str, mut names: Vec<String>) -> (Vec<String>, usize) {
    /// A third of the name mistyped is still the same name; more is another one.
    fn distance(key: &str, name: &str) -> usize {
        let distance = strsim::damerau_levenshtein(&key.to_lowercase(), &name.to_lowercase());
        if distance <= (key.chars().count() / 3).max(1) { distance } else { usize::MAX }
    }
    names.sort();
    names.dedup();
    names.sort_by_cached_key(|name| distance(key, name));
    let all = names.len();
    let mut bytes = 0;
    let fits = names.iter().take(NAMES_LISTED).take_while(|name| {
        bytes += name.len();
        bytes <= NAMES_BYTES
    });
    let listed = fits.count();
    names.truncate(listed);
    (names, all - listed)
}

fn names(names: &[String], more: usize) -> String {
    match (names, more) {
        ([], 0) => "it has none".to_owned(),
        ([], more) => format!("it has {more} with long names"),
        (names, 0) => list("it has ", names, ""),
        (names, more) => list("it has ", names, &format!(" and {more} more")),
    }
}

fn list(before: &str, items: &[String], after: &str) -> String {
    if items.is_empty() {
        return String::new();
    }
    let items: Vec<_> = items.iter().map(|item| format!("{item:?}")).collect();
    format!("{before}{}{after}", items.join(", "))
}

fn at(position: Option<usize>) -> String {
    position.map_or_else(String::new, |position| format!(" at position {position}"))
}

#[cfg(test)]
mod tests;
