//! Refreshes that fail for a while, told to the pod's owner once, again if they go on for an hour (by then the first event is gone), and
//! once when they succeed again.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use super::{Events, Reason};
use crate::agent::Agent;
use crate::volume::{Pod, Report};

/// A failure that heals in this time is nobody's business.
const TOLERATED: Duration = Duration::from_secs(120);
/// How long an API server keeps an event.
const AGAIN: Duration = Duration::from_secs(3600);
/// How often all volumes are looked at.
const LOOK: Duration = Duration::from_secs(15);

/// What was told of failing volumes, by volume. No longer than there are volumes.
#[derive(Default)]
pub struct Failing(HashMap<String, SystemTime>);

impl Failing {
    /// What is to be told of a volume now.
    pub fn look(&mut self, volume: &str, report: &Report, now: SystemTime) -> Option<(Reason, String)> {
        let since = |at| now.duration_since(at).unwrap_or_default();
        let Some(began) = report.stale_since else {
            self.0.remove(volume)?;
            return Some((Reason::RefreshRecovered, "the secrets are refreshed again".to_owned()));
        };
        if since(began) < TOLERATED || self.0.get(volume).is_some_and(|told| since(*told) < AGAIN) {
            return None;
        }
        self.0.insert(volume.to_owned(), now);
        let (began, served) = (
            humantime::format_rfc3339_seconds(began),
            if report.gone > 0 {
                format!("{} files are not served any more, their grace has ended", report.gone)
            } else {
                "the last known values are served".to_owned()
            },
        );
        let why = report.last_error.as_deref().unwrap_or("no answer");
        Some((Reason::RefreshFailed, format!("secrets cannot be refreshed since {began}, {served}: {why}")))
    }

    /// Forgets all others.
    pub fn keep(&mut self, is_served: impl Fn(&str) -> bool) {
        self.0.retain(|volume, _| is_served(volume));
    }
}

/// Looks at an agent's volumes, until it is gone.
pub async fn watch(agent: Weak<Agent>, events: Events) {
    let mut failing = Failing::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(agent) = agent.upgrade() else { return };
        let now = SystemTime::now();
        let served = agent.served();
        for served in &served {
            let (volume, unknown) = (served.volume(), Pod::default());
            if let Some((reason, text)) = failing.look(&volume.id().0, &volume.report(), now) {
                events.tell(&volume.id().0, volume.pod().unwrap_or(&unknown), reason, &text);
            }
        }
        let names: Vec<&str> = served.iter().map(|served| served.volume().id().0.as_str()).collect();
        failing.keep(|volume| names.contains(&volume));
        drop::<Arc<Agent>>(agent);
    }
}
