//! One request as the store sees it, and the fields of its body.

use std::time::{Duration, SystemTime};

use axum::http::Method;
use serde_json::{Map, Value};

use super::reply::Refusal;
use crate::secret::{SecretBytes, Token};

/// What is done: the capability that a policy must give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    List,
    Write,
    Patch,
    Delete,
}

/// One request.
pub(super) struct Ask {
    pub(super) operation: Operation,
    /// Below `/v1/`, decoded.
    pub(super) path: String,
    pub(super) query: Vec<(String, String)>,
    pub(super) body: SecretBytes,
    pub(super) token: Option<Token>,
    /// The store's time.
    pub(super) now: SystemTime,
}

impl Ask {
    /// Which operation a method is; `GET ?list=true` is LIST.
    pub(super) fn operation(method: &Method, query: &[(String, String)]) -> Result<Operation, Refusal> {
        let list = query.iter().any(|(name, value)| name == "list" && value == "true");
        match method.as_str() {
            "GET" | "HEAD" if list => Ok(Operation::List),
            "GET" | "HEAD" => Ok(Operation::Read),
            "LIST" => Ok(Operation::List),
            "POST" | "PUT" => Ok(Operation::Write),
            "PATCH" => Ok(Operation::Patch),
            "DELETE" => Ok(Operation::Delete),
            _ => Err(Refusal { status: axum::http::StatusCode::METHOD_NOT_ALLOWED, errors: Vec::new() }),
        }
    }

    /// The last value of a query parameter.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The body's fields.
    pub(super) fn fields(&self) -> Result<Fields, Refusal> {
        Fields::parse(self.body.expose())
    }
}

/// A body's members. As with the real server, lists may be arrays or text with commas, durations numbers of seconds or
/// text like `1h30m`, and numbers and truth values may stand in quotes, as `vault write` sends them.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    fn parse(body: &[u8]) -> Result<Self, Refusal> {
        if body.is_empty() {
            return Ok(Self(Map::new()));
        }
        // The parser's message would quote from the body.
        let broken = |_| Refusal::internal("the body is not a JSON object");
        serde_json::from_slice(body).map(Self).map_err(broken)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn raw(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.raw(name).and_then(Value::as_str).filter(|text| !text.is_empty())
    }

    pub(super) fn list(&self, name: &str) -> Option<Vec<String>> {
        self.raw(name).map(strings)
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, Refusal> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let flag = value.as_bool().or_else(|| value.as_str()?.parse().ok());
        flag.map(Some).ok_or_else(|| wrong(name, "true or false"))
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
        number.map(Some).ok_or_else(|| wrong(name, "a number"))
    }

    pub(super) fn duration(&self, name: &str) -> Result<Option<Duration>, Refusal> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let duration = match value {
            Value::String(text) => duration(text),
            value => value.as_u64().map(Duration::from_secs),
        };
        duration.map(Some).ok_or_else(|| wrong(name, "a duration such as 30s, 5m or 1h"))
    }
}

/// A value as a list: its elements, or text cut at commas; what is no text is written as JSON.
pub(super) fn strings(value: &Value) -> Vec<String> {
    match value {
        Value::Array(items) => items.iter().map(text).collect(),
        Value::String(text) => {
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
        }
        Value::Null => Vec::new(),
        value => vec![text(value)],
    }
}

/// A value as text.
pub(super) fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// `90`, `90s`, `1h30m`: whole numbers of d, h, m, s; at most a century.
pub(super) fn duration(text: &str) -> Option<Duration> {
    const CENTURY: u64 = 100 * 366 * 86_400;
    let mut total = 0u64;
    let mut number = String::new();
    for c in text.chars() {
        let unit = match c {
            '0'..='9' => {
                number.push(c);
                continue;
            }
            'd' => 86_400,
            'h' => 3_600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        total = total.checked_add(number.parse::<u64>().ok()?.checked_mul(unit)?)?;
        number.clear();
    }
    if !number.is_empty() {
        total = total.checked_add(number.parse().ok()?)?;
    }
    (total <= CENTURY).then(|| Duration::from_secs(total))
}

fn wrong(name: &str, expected: &str) -> Refusal {
    Refusal::bad(format!("error converting input for field \"{name}\": expected {expected}"))
}
