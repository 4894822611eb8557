//! What is wrong with a text that people wrote: which document, which field, which rule, what to write instead. Never the
//! value: it may be a certificate's text, an argument, or a password in an address.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Fault {
    /// Where: `SecretProviderClass app/db`, `environment`.
    pub document: String,
    /// The field as its author spelt it: `spec.parameters.objects[2].secretKey`, `--max-age`. Empty: the document itself.
    pub field: String,
    /// The broken rule.
    pub rule: String,
    /// What to write instead.
    pub remedy: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.document)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}; {}", self.rule, self.remedy)
    }
}

/// All faults of what was read, in the order of reading; never empty. Displays as one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// The faults.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Fault> {
        self.0.iter()
    }

    /// A single one, of a whole document.
    pub(crate) fn one(document: &str, Broken { rule, remedy }: Broken) -> Self {
        let document = printable(document);
        Self(vec![Fault {
            document,
            field: String::new(),
            rule: printable(&rule),
            remedy: printable(&remedy),
        }])
    }

    /// The same, of a file's documents.
    pub(crate) fn of(mut self, file: &str) -> Self {
        for fault in &mut self.0 {
            fault.document = format!("{}: {}", printable(file), fault.document);
        }
        self
    }

    /// These, and then those.
    #[must_use]
    pub(crate) fn and(mut self, more: Self) -> Self {
        self.0.extend(more.0);
        self
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// A rule that one value breaks, and the remedy; a [`Sink`] knows document and field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) rule: Cow<'static, str>,
    pub(crate) remedy: Cow<'static, str>,
}

/// A broken rule in words.
pub(crate) fn broken(rule: impl Into<Cow<'static, str>>, remedy: impl Into<Cow<'static, str>>) -> Broken {
    Broken { rule: rule.into(), remedy: remedy.into() }
}

/// Collects the faults of one document while it is read on.
pub(crate) struct Sink {
    document: String,
    faults: RefCell<Vec<Fault>>,
}

impl Sink {
    /// A sink without faults.
    pub(crate) fn new(document: impl Into<String>) -> Self {
        Self { document: document.into(), faults: RefCell::default() }
    }

    /// Adds one fault.
    pub(crate) fn add(&self, field: impl Into<String>, Broken { rule, remedy }: Broken) {
        self.faults.borrow_mut().push(Fault {
            document: self.document.clone(),
            field: printable(&field.into()),
            rule: printable(&rule),
            remedy: printable(&remedy),
        });
    }

    /// The value, or a fault and nothing.
    pub(crate) fn take<T>(&self, field: &str, parsed: Result<T, Broken>) -> Option<T> {
        parsed.map_err(|fault| self.add(field, fault)).ok()
    }

    /// `value`, unless anything was wrong.
    pub(crate) fn finish<T>(self, value: Option<T>) -> Result<T, Faults> {
        let faults = self.faults.into_inner();
        match value {
            Some(value) if faults.is_empty() => Ok(value),
            _ => Err(Faults(faults)),
        }
    }
}

/// Names come from the document: they must neither steer a terminal nor fill a log.
fn printable(text: &str) -> String {
    const LONGEST: usize = 600;
    let mut shown = String::with_capacity(text.len().min(LONGEST));
    for (index, c) in text.chars().enumerate() {
        match c {
            _ if index == LONGEST => {
                shown.push('…');
                break;
            }
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// All values, or all faults of all documents.
pub(crate) fn collect<T>(results: impl IntoIterator<Item = Result<T, Faults>>) -> Result<Vec<T>, Faults> {
    let (mut values, mut faults) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(Faults(more)) => faults.extend(more),
        }
    }
    if faults.is_empty() { Ok(values) } else { Err(Faults(faults)) }
}
