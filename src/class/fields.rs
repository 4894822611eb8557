//! Walks one mapping of a document: each field is asked for by name, and what nobody asked for is unknown.

use std::cell::RefCell;

use serde_json::{Map, Value};

use crate::config::fault::{Broken, Sink, broken};
use crate::config::text;

/// One mapping and where it stands.
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
    sink: &'a Sink,
    asked: RefCell<Vec<&'static str>>,
}

impl<'a> Fields<'a> {
    /// The mapping at `path`; anything else there is a fault.
    pub(crate) fn new(value: &'a Value, path: String, sink: &'a Sink) -> Option<Self> {
        if let Value::Object(map) = value {
            return Some(Self { map, path, sink, asked: RefCell::default() });
        }
        sink.add(path, broken("is not a mapping", "write it as lines of name: value"));
        None
    }

    /// The path of one of its fields.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A fault of one of its fields.
    pub(crate) fn fault(&self, name: &str, fault: Broken) {
        self.sink.add(self.path(name), fault);
    }

    /// The raw value; null counts as absent, as in Kubernetes.
    pub(crate) fn raw(&self, name: &'static str) -> Option<&'a Value> {
        let mut asked = self.asked.borrow_mut();
        if !asked.contains(&name) {
            asked.push(name);
        }
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Names that are there and begin with `prefix`.
    pub(crate) fn names_with(&self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str).filter(move |name| name.starts_with(prefix))
    }

    /// A text.
    pub(crate) fn text(&self, name: &'static str) -> Option<&'a str> {
        match self.raw(name)? {
            Value::String(text) => Some(text),
            Value::Array(_) | Value::Object(_) => {
                self.fault(
                    name,
                    broken("is not text", "write one text; a block after | keeps several lines together"),
                );
                None
            }
            _ => {
                self.fault(name, broken("is not text", "put it in quotes"));
                None
            }
        }
    }

    /// A text that must be there and must not be empty.
    pub(crate) fn required(&self, name: &'static str, remedy: &'static str) -> Option<&'a str> {
        if self.raw(name).is_none() {
            self.fault(name, broken("is missing", remedy));
            return None;
        }
        let text = self.text(name)?;
        if text.is_empty() {
            self.fault(name, broken("is empty", remedy));
            return None;
        }
        Some(text)
    }

    /// A text that stands for something; empty counts as absent, as in the reference providers.
    pub(crate) fn parse<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Broken>,
    ) -> Option<T> {
        let text = self.text(name).filter(|text| !text.is_empty())?;
        self.sink.take(&self.path(name), parse(text))
    }

    /// A switch that is a boolean.
    pub(crate) fn boolean(&self, name: &'static str) -> Option<bool> {
        let value = self.raw(name)?;
        if value.as_bool().is_none() {
            self.fault(name, broken("is not a boolean", "write true or false, without quotes"));
        }
        value.as_bool()
    }

    /// A mapping inside it.
    pub(crate) fn mapping(&self, name: &'static str) -> Option<Fields<'a>> {
        Fields::new(self.raw(name)?, self.path(name), self.sink)
    }

    /// A list of mappings inside it; `None` if it is absent or no list.
    pub(crate) fn list(&self, name: &'static str) -> Option<Vec<Fields<'a>>> {
        match self.raw(name)? {
            Value::Array(items) => Some(mappings(items, &self.path(name), self.sink)),
            _ => {
                self.fault(name, broken("is not a list", "write each entry on a line that begins with -"));
                None
            }
        }
    }

    /// The texts of a list inside it, each with its path; absent is empty.
    pub(crate) fn texts(&self, name: &'static str) -> Vec<(String, &'a str)> {
        const REMEDY: &str = "write a list of texts, such as [a, b]";
        let items = match self.raw(name) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items,
            Some(_) => {
                self.fault(name, broken("is not a list", REMEDY));
                return Vec::new();
            }
        };
        let each =
            items.iter().enumerate().map(|(index, item)| (format!("{}[{index}]", self.path(name)), item));
        let text = |(path, item): (String, &'a Value)| match item.as_str() {
            Some(text) => Some((path, text)),
            None => {
                self.sink.add(path, broken("is not text", "put it in quotes"));
                None
            }
        };
        each.filter_map(text).collect()
    }

    /// Faults for every field that was not asked for.
    pub(crate) fn finish(self) {
        let asked = self.asked.into_inner();
        for name in self.map.keys().filter(|name| !asked.contains(&name.as_str())) {
            let path = if self.path.is_empty() { name.clone() } else { format!("{}.{name}", self.path) };
            self.sink.add(path, text::unknown(name, asked.iter().copied()));
        }
    }
}

/// The mappings of a list; anything else in it is a fault.
pub(crate) fn mappings<'a>(items: &'a [Value], path: &str, sink: &'a Sink) -> Vec<Fields<'a>> {
    let each = items.iter().enumerate();
    each.filter_map(|(index, item)| Fields::new(item, format!("{path}[{index}]"), sink)).collect()
}
