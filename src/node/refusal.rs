//! From what went wrong to what a pod's owner is told: a gRPC code, by which kubelet decides whether to ask again at once, and
//! the text that becomes the pod's event.

use std::io;

use fuse_secrets_csi::wire::Message;
use fuse_secrets_csi::wire::message::Refused;

use crate::agent::ServeError;
use crate::cache::CacheError;
use crate::class::FindError;
use crate::metrics::{Metric, Metrics};
use crate::store::ErrorKind;
use crate::volume::snapshot::WriteError;
use crate::volume::{BuildError, PublishError};

/// gRPC's codes, as far as a publish ends with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The pod's spec must change.
    InvalidArgument = 3,
    /// The store was too slow.
    DeadlineExceeded = 4,
    /// The class, or the secret, or its key does not exist.
    NotFound = 5,
    /// The store refused.
    PermissionDenied = 7,
    /// A limit of this node.
    ResourceExhausted = 8,
    /// The class, the driver or the configuration must change.
    FailedPrecondition = 9,
    /// A fault of this program, or the kernel refused.
    Internal = 13,
    /// The store, or this agent, cannot be reached now.
    Unavailable = 14,
}

/// No, and why: what was asked, what is in the way, what to change. Never a value or a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// Which kind of no.
    pub code: Code,
    /// What to change.
    pub text: String,
}

impl Refusal {
    /// With this code and text.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// Its counter.
    #[must_use]
    pub fn metric<'a>(&self, metrics: &'a Metrics) -> &'a Metric {
        match self.code {
            Code::InvalidArgument => &metrics.node_refused_invalid_argument,
            Code::DeadlineExceeded => &metrics.node_refused_deadline_exceeded,
            Code::NotFound => &metrics.node_refused_not_found,
            Code::PermissionDenied => &metrics.node_refused_permission_denied,
            Code::ResourceExhausted => &metrics.node_refused_resource_exhausted,
            Code::FailedPrecondition => &metrics.node_refused_failed_precondition,
            Code::Internal => &metrics.node_refused_internal,
            Code::Unavailable => &metrics.node_refused_unavailable,
        }
    }
}

impl From<Refusal> for Message {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Refused { code: refusal.code as u32, text: event(&refusal.text) })
    }
}

/// Bytes of a text that becomes an event: those end at 1024, of which kubelet's own words and the volume's name take up to 160.
const LONGEST_EVENT: usize = 860;

/// A text as long as an event may be: whole lines and how many are left out; of one long line beginning and end, where the remedy
/// is. The log has all of it.
pub fn event(text: &str) -> String {
    /// `\nand 2000 more`.
    const COUNT: usize = 20;
    if text.len() <= LONGEST_EVENT {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut left = text.lines().count();
    for line in text.lines() {
        if kept.is_empty() {
            kept = shorten(line, LONGEST_EVENT - COUNT);
        } else if kept.len() + 1 + line.len() <= LONGEST_EVENT - COUNT {
            kept.extend(["\n", line]);
        } else {
            break;
        }
        left -= 1;
    }
    if left == 0 { kept } else { format!("{kept}\nand {left} more") }
}

/// At most `room` bytes of a line, without its middle.
fn shorten(line: &str, room: usize) -> String {
    const GAP: &str = " ... ";
    if line.len() <= room {
        return line.to_owned();
    }
    let (mut tail, mut head) = (line.len() - room / 3, room - room / 3 - GAP.len());
    while !line.is_char_boundary(head) {
        head -= 1;
    }
    while !line.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{}{GAP}{}", &line[..head], &line[tail..])
}

impl From<FindError> for Refusal {
    fn from(error: FindError) -> Self {
        let code = match &error {
            FindError::Faults(_) => Code::FailedPrecondition,
            FindError::Unknown { .. } => Code::Unavailable,
            FindError::Unreadable { .. } => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ServeError> for Refusal {
    fn from(error: ServeError) -> Self {
        Self::new(serve(&error), error.to_string())
    }
}

fn serve(error: &ServeError) -> Code {
    match error {
        // Of several, the one that somebody must do something about.
        ServeError::Publish(PublishError::Store(errors)) => {
            let codes = || errors.iter().map(|(_, error)| store(error.kind));
            let lasting = codes().find(|code| !matches!(code, Code::Unavailable | Code::DeadlineExceeded));
            lasting.or(codes().next()).unwrap_or(Code::Internal)
        }
        ServeError::Publish(PublishError::Cache(error)) => match error {
            CacheError::Limit { .. } => Code::ResourceExhausted,
            CacheError::Unproven(error) => store(error.kind),
            CacheError::Stopped => Code::Unavailable,
            CacheError::Keys { .. } => Code::Internal,
        },
        ServeError::Publish(PublishError::Build(BuildError::Extract(_))) => Code::NotFound,
        ServeError::Publish(PublishError::Build(BuildError::Write(WriteError::Memory(_)))) => {
            Code::ResourceExhausted
        }
        ServeError::Serve(error) if error.kind() == io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
        // The shim is away, or busy.
        ServeError::Serve(error) if error.kind() == io::ErrorKind::NotConnected => Code::Unavailable,
        _ => Code::Internal,
    }
}

fn store(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Unreachable | ErrorKind::RateLimited | ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Deadline => Code::DeadlineExceeded,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::Missing => Code::NotFound,
        ErrorKind::Full => Code::ResourceExhausted,
        ErrorKind::Certificate | ErrorKind::Refused | ErrorKind::Malformed | ErrorKind::Local => {
            Code::FailedPrecondition
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::pages::MemoryError;
    use crate::store::StoreError;
    use crate::store::answer::ExtractError;

    fn of(kinds: &[ErrorKind]) -> Refusal {
        let error = |kind| StoreError {
            kind,
            asked: "GET http://vault:8200/v1/secret/data/app".to_owned(),
            answered: "refused".to_owned(),
            remedy: Some("change something".to_owned()),
            retry_after: None,
        };
        let errors = kinds.iter().map(|kind| ("password".to_owned(), error(*kind))).collect();
        ServeError::Publish(PublishError::Store(errors)).into()
    }

    #[test]
    fn what_the_store_said_keeps_its_text_and_what_lasts_decides_the_code() {
        let refusal = of(&[ErrorKind::Denied]);
        assert_eq!(refusal.code, Code::PermissionDenied);
        let text = "password: GET http://vault:8200/v1/secret/data/app: refused; change something";
        assert_eq!(refusal.text, text);
        assert_eq!(of(&[ErrorKind::Unreachable]).code, Code::Unavailable);
        assert_eq!(of(&[ErrorKind::Deadline]).code, Code::DeadlineExceeded);
        assert_eq!(of(&[ErrorKind::Deadline, ErrorKind::Missing]).code, Code::NotFound);
        assert_eq!(of(&[ErrorKind::Certificate]).code, Code::FailedPrecondition);
    }

    #[test]
    fn a_limit_is_resource_exhausted_with_used_limit_and_remedy() {
        let remedy = "raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=) or serve fewer volumes";
        let full = MemoryError::Full { used: 60_000, limit: 65_536, wanted: 8_192, remedy };
        let build = BuildError::Write(WriteError::Memory(full));
        let memory = Refusal::from(ServeError::Publish(PublishError::Build(build)));
        assert_eq!(memory.code, Code::ResourceExhausted);
        assert!(memory.text.contains("60000 of 65536") && memory.text.contains("RLIMIT_MEMLOCK"), "{memory}");
        let limit = CacheError::Limit {
            what: "entries",
            used: 9,
            wanted: 2,
            limit: 10,
            remedy: "raise cacheEntries",
        };
        let cache = Refusal::from(ServeError::Publish(PublishError::Cache(limit)));
        assert_eq!(cache.code, Code::ResourceExhausted);
        assert!(cache.text.contains("9 of 10 entries") && cache.text.contains("cacheEntries"), "{cache}");
    }

    #[test]
    fn a_key_that_is_missing_is_not_found_and_names_those_that_exist() {
        let missing = ExtractError::MissingKey {
            key: "pasword".to_owned(),
            available: vec!["password".to_owned()],
            more: 0,
        };
        let build = BuildError::Extract(vec![("db".to_owned(), missing)]);
        let refusal = Refusal::from(ServeError::Publish(PublishError::Build(build)));
        assert_eq!(refusal.code, Code::NotFound);
        assert_eq!(refusal.text, "db: the secret has no key \"pasword\"; it has \"password\"");
    }

    #[test]
    fn a_long_text_is_cut_to_an_event_by_whole_lines_with_a_count() {
        let short = "a: is unknown; remove it\nb: is unknown; remove it";
        assert_eq!(event(short), short);
        let lines: Vec<String> = (0..200).map(|n| format!("field{n}: is unknown; remove it")).collect();
        let cut = event(&lines.join("\n"));
        let shown = cut.lines().count() - 1;
        assert!(cut.len() <= LONGEST_EVENT && cut.len() > LONGEST_EVENT - 60, "{}", cut.len());
        assert!(cut.starts_with(&lines[..shown].join("\n")), "{cut}");
        assert!(cut.ends_with(&format!("\nand {} more", 200 - shown)), "{cut}");
        let long = format!("asked: {}; the remedy", "é".repeat(2_000));
        let cut = event(&format!("{long}\n{long}"));
        assert!(cut.len() <= LONGEST_EVENT && cut.starts_with("asked: é"), "{cut}");
        assert!(cut.ends_with("é; the remedy\nand 1 more") && cut.contains(" ... "), "{cut}");
        let Message::Refused(message) = Refusal::new(Code::NotFound, long).into() else {
            panic!("not a refusal")
        };
        assert!(message.text.len() <= LONGEST_EVENT);
    }

    #[test]
    fn a_refusal_becomes_a_message_and_is_counted_by_its_code() {
        let metrics = Metrics::default();
        let refusal = Refusal::new(Code::NotFound, "nothing is there");
        refusal.metric(&metrics).increment();
        assert_eq!(metrics.node_refused_not_found.value(), 1);
        let Message::Refused(message) = refusal.into() else { panic!("not a refusal") };
        assert_eq!((message.code, message.text.as_str()), (5, "nothing is there"));
    }
}
