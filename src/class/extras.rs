//! What neither resource has and a class may say all the same: freshness and ownership, as annotations
//! `fuse-secrets/max-age` on both kinds, and as parameters `maxAge` of a `SecretProviderClass`.

use crate::class::fields::Fields;
use crate::config::fault::{Broken, broken};
use crate::config::settings::{FreshnessSettings, INTERVAL, OPEN_DEADLINE};
use crate::config::text;
use crate::reference::Ownership;

const PREFIX: &str = "fuse-secrets/";

/// Freshness and ownership of a class. One that stands at both places is a fault: nobody could say which counts.
pub(crate) fn read(
    annotations: Option<&Fields<'_>>,
    parameters: Option<&Fields<'_>>,
) -> (FreshnessSettings, Ownership) {
    let places = Places { annotations, parameters };
    let interval = |t: &str| text::duration(t, INTERVAL);
    let freshness = FreshnessSettings {
        interval: places.read("fuse-secrets/refresh-interval", "refreshInterval", interval),
        max_age: places.read("fuse-secrets/max-age", "maxAge", interval),
        open_deadline: places
            .read("fuse-secrets/open-deadline", "openDeadline", |t| text::duration(t, OPEN_DEADLINE)),
        stale_grace: places.read("fuse-secrets/stale-grace", "staleGrace", text::grace),
    };
    let ownership = Ownership {
        uid: places.read("fuse-secrets/uid", "uid", text::id),
        gid: places.read("fuse-secrets/gid", "gid", text::id),
        mode: places.read("fuse-secrets/mode", "mode", text::mode),
    };
    places.unknown();
    (freshness, ownership)
}

const ANNOTATIONS: [&str; 7] = [
    "fuse-secrets/refresh-interval",
    "fuse-secrets/max-age",
    "fuse-secrets/open-deadline",
    "fuse-secrets/stale-grace",
    "fuse-secrets/uid",
    "fuse-secrets/gid",
    "fuse-secrets/mode",
];

struct Places<'a> {
    annotations: Option<&'a Fields<'a>>,
    parameters: Option<&'a Fields<'a>>,
}

impl Places<'_> {
    fn read<T>(
        &self,
        annotation: &'static str,
        parameter: &'static str,
        parse: impl Fn(&str) -> Result<T, Broken>,
    ) -> Option<T> {
        let here = self.annotations.filter(|fields| fields.raw(annotation).is_some());
        let there = self.parameters.filter(|fields| fields.raw(parameter).is_some());
        if let (Some(_), Some(parameters)) = (here, there) {
            let rule = format!("stands beside the annotation {annotation}");
            parameters.fault(parameter, broken(rule, "keep one of the two"));
        }
        let from_parameter = there.and_then(|fields| fields.parse(parameter, &parse));
        let from_annotation = here.and_then(|fields| fields.parse(annotation, &parse));
        from_parameter.or(from_annotation)
    }

    /// Annotations of others are theirs; one of ours that we do not know is a typing error.
    fn unknown(&self) {
        let Some(annotations) = self.annotations else { return };
        for name in annotations.names_with(PREFIX).filter(|name| !ANNOTATIONS.contains(name)) {
            annotations.fault(name, text::unknown(name, ANNOTATIONS));
        }
    }
}
